package fuse

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

const device = "/dev/fuse"

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
	if stack := table.At(path); len(stack) > 0 && ours(&stack[0]) {
		return "", fmt.Errorf("%s: %w: unmount it first", stack[0].Source, ErrMounted)
	}
	return path, nil
}

// connection is a connection to the kernel.
type connection struct {
	fd int // of /dev/fuse, for the server to close
	// release ends what watches over the mount, once it is served no longer.
	release func()
}

// attach mounts on dir and returns the connection to the kernel.
func attach(dir string, cfg *Config) (*connection, error) {
	root := os.Geteuid() == 0
	if !root && (cfg.Dev || cfg.Suid || cfg.RootOnly || len(cfg.SELinux) > 0) {
		return nil, fmt.Errorf("dev, suid, SELinux contexts and mounts for root only are for root: %w", ErrConfig)
	}
	if root && !cfg.AutoUnmount {
		fd, err := attachDirectly(dir, cfg)
		return &connection{fd: fd, release: func() {}}, err
	}
	return attachByHelper(dir, cfg, root)
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
	if c.NoAtime {
		flags |= unix.MS_NOATIME
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
	if c.NoAtime {
		names = append(names, "noatime")
	}
	return names
}

func attachDirectly(dir string, cfg *Config) (int, error) {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, explainDevice(err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,default_permissions",
		fd, unix.S_IFDIR, os.Geteuid(), os.Getegid())
	if !cfg.RootOnly {
		options += ",allow_other"
	}
	for _, o := range cfg.SELinux {
		options += "," + quoteSELinux(o)
	}
	if err := unix.Mount(cfg.FSName, dir, typePrefix+cfg.Subtype, cfg.flags(), options); err != nil {
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
	if cfg.RootOnly && slices.Contains(m.SuperOptions, "allow_other") {
		missing = append(missing, "protection from other users")
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
