package fuse

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

const (
	device = "/dev/fuse"
	// helper mounts and unmounts for those who may not; it has the set-user-ID bit.
	helper = "fusermount3"
)

// mountPoint returns the absolute path, without symlinks, of a directory to mount on.
func mountPoint(dir string) (string, error) {
	path, err := filepath.Abs(dir)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	var info os.FileInfo
	if err == nil {
		info, err = os.Stat(path)
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", fmt.Errorf("%w: make the directory first", err)
	case errors.Is(err, unix.ENOTCONN):
		return "", fmt.Errorf("%w: the server of what is mounted there is gone: unmount it first", err)
	case err != nil:
		return "", err
	case !info.IsDir():
		return "", fmt.Errorf("%w: mount on a directory", ErrNotDir)
	}
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return "", err
	}
	if stack := table.At(path); len(stack) > 0 && stack[0].Type == FSType {
		return "", fmt.Errorf("%s: %w: unmount it first", stack[0].Source, ErrMounted)
	}
	return path, nil
}

// attach mounts on dir and returns the connection to the kernel, for the caller to close.
func attach(dir string, cfg *Config) (int, error) {
	if os.Geteuid() == 0 {
		return attachDirectly(dir, cfg)
	}
	if cfg.Dev || cfg.Suid || len(cfg.SELinux) > 0 {
		return -1, fmt.Errorf("dev, suid and SELinux contexts are for root: %w", ErrConfig)
	}
	return attachByHelper(dir, cfg)
}

// flags returns those of mount(2).
func (c *Config) flags() uintptr {
	flags := uintptr(unix.MS_RDONLY)
	if !c.Dev {
		flags |= unix.MS_NODEV
	}
	if !c.Suid {
		flags |= unix.MS_NOSUID
	}
	if c.NoExec {
		flags |= unix.MS_NOEXEC
	}
	return flags
}

// flagNames returns the flags as the table of mounts shows them.
func (c *Config) flagNames() []string {
	names := []string{"ro"}
	if !c.Dev {
		names = append(names, "nodev")
	}
	if !c.Suid {
		names = append(names, "nosuid")
	}
	if c.NoExec {
		names = append(names, "noexec")
	}
	return names
}

func attachDirectly(dir string, cfg *Config) (int, error) {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, explainDevice(err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,allow_other,default_permissions",
		fd, unix.S_IFDIR, os.Geteuid(), os.Getegid())
	for _, o := range cfg.SELinux {
		options += "," + quoteSELinux(o)
	}
	if err := unix.Mount(cfg.FSName, dir, FSType, cfg.flags(), options); err != nil {
		_ = unix.Close(fd) // not connected to anything
		if errors.Is(err, unix.EINVAL) && len(cfg.SELinux) > 0 {
			return -1, fmt.Errorf("mount with %s: %w: the kernel has no SELinux, or its policy does not know the label", strings.Join(cfg.SELinux, " and "), err)
		}
		if errors.Is(err, unix.EPERM) {
			return -1, fmt.Errorf("mount: %w: the capability CAP_SYS_ADMIN is needed; in a container, a privileged one", err)
		}
		if errors.Is(err, unix.ENODEV) {
			return -1, fmt.Errorf("mount: %w: the kernel has no FUSE: run modprobe fuse", err)
		}
		return -1, fmt.Errorf("mount: %w", err)
	}
	return fd, nil
}

// explainDevice says what to do about a device that cannot be opened.
func explainDevice(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("open %s: %w: the kernel has no FUSE: run modprobe fuse, and in a container pass the device in", device, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("open %s: %w: this process needs to read and write the device; in a container, a privileged one", device, err)
	}
	return fmt.Errorf("open %s: %w", device, err)
}

// attachByHelper has fusermount3 open the device, mount it, and send it over a socket.
func attachByHelper(dir string, cfg *Config) (int, error) {
	if _, err := os.Stat(device); err != nil {
		return -1, explainDevice(err)
	}
	options := append(cfg.flagNames(), "default_permissions", "subtype="+subtype, "fsname="+escapeOption(cfg.FSName))
	if cfg.AllowOther {
		options = append(options, "allow_other")
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make a socket for %s: %w", helper, err)
	}
	defer unix.Close(pair[0])
	remote := os.NewFile(uintptr(pair[1]), "socket")
	err = runHelper(remote, "-o", strings.Join(options, ","), dir)
	// Closed before receiving, so that this does not wait for what was never sent.
	_ = remote.Close()
	if err != nil {
		return -1, fmt.Errorf("mount without being root: %w", err)
	}
	fd, err := receive(pair[0])
	if err != nil {
		return -1, errors.Join(fmt.Errorf("receive the connection from %s: %w", helper, err), discard(dir))
	}
	return fd, nil
}

// escapeOption hides what would end an option.
func escapeOption(s string) string {
	return strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(s)
}

// runHelper runs fusermount3. What it says is the error.
func runHelper(socket *os.File, args ...string) error {
	path, err := exec.LookPath(helper)
	if err != nil {
		return fmt.Errorf("%w: install the package fuse3, or be root", err)
	}
	cmd := exec.Command(path, args...) //nolint:gosec // the arguments are options and a path
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if socket != nil {
		cmd.ExtraFiles = []*os.File{socket} // the first becomes descriptor 3
		cmd.Env = append(cmd.Env, "_FUSE_COMMFD=3")
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err = cmd.Run()
	if err == nil {
		return nil
	}
	said := strings.TrimSpace(stderr.String())
	switch {
	case strings.Contains(said, "user_allow_other"):
		return fmt.Errorf("%s: add user_allow_other to /etc/fuse.conf, or do not let other users in: %w", said, err)
	case said != "":
		return fmt.Errorf("%s: %w", said, err)
	}
	return fmt.Errorf("%s: %w", helper, err)
}

// receive receives one descriptor.
func receive(socket int) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return -1, err
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err == nil && len(fds) == 1 {
			return fds[0], nil
		}
	}
	return -1, errors.New("it sent no descriptor")
}

// missingOptions returns what a mount must have and does not.
func missingOptions(m *mountinfo.Mount, cfg *Config) []string {
	var missing []string
	for _, o := range cfg.flagNames() {
		if !slices.Contains(m.Options, o) {
			missing = append(missing, o)
		}
	}
	if !slices.Contains(m.SuperOptions, "default_permissions") {
		missing = append(missing, "default_permissions")
	}
	return missing
}

// forcePoll makes the kernel ask once whether files can be polled, and learn that they
// cannot. Otherwise it would ask when this very process opens a file in the mount, which
// the runtime does in a way that keeps a processor busy that the answer may need.
//
// The library answers for a name that only it knows. Failing to open it is no failure: the
// root may be closed to us, and then all files are.
func (s *Server) forcePoll() {
	fd, err := unix.Open(filepath.Join(s.dir, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	_ = unix.Close(fd)
}
