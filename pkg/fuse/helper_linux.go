package fuse

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// helper mounts and unmounts for those who may not; it has the set-user-ID bit. For everybody
// it watches over mounts that are to be unmounted automatically.
const helper = "fusermount3"

// attachByHelper has fusermount3 open the device, mount it, and send it over a socket. With
// AutoUnmount it does not end then, but waits until the socket is closed, by whatever ends this
// process, and unmounts what is mounted still.
func attachByHelper(dir string, cfg *Config, root bool) (*connection, error) {
	if _, err := os.Stat(device); err != nil {
		return nil, explainDevice(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket for %s: %w", helper, err)
	}
	remote := os.NewFile(uintptr(pair[1]), "socket")
	wait, err := startHelper(remote, "-o", strings.Join(cfg.helperOptions(root), ","), "--", dir)
	// Closed before receiving, so that this does not wait for what was never sent.
	_ = remote.Close()
	if err != nil {
		_ = unix.Close(pair[0])
		return nil, fmt.Errorf("mount by %s: %w", helper, err)
	}
	if !cfg.AutoUnmount {
		defer unix.Close(pair[0])
		if err := wait(); err != nil {
			return nil, fmt.Errorf("mount by %s: %w", helper, err)
		}
	}
	fd, err := receive(pair[0])
	if err == nil && !cfg.AutoUnmount {
		return &connection{fd: fd, release: func() {}}, nil
	}
	end := func() error {
		_ = unix.Close(pair[0])
		return wait()
	}
	if err == nil {
		return &connection{fd: fd, release: func() { _ = end() }}, nil
	}
	if cfg.AutoUnmount {
		if said := end(); said != nil {
			return nil, fmt.Errorf("mount by %s: %w", helper, said)
		}
	}
	return nil, errors.Join(fmt.Errorf("receive the connection from %s: %w", helper, err), discard(dir))
}

// helperOptions returns the options for fusermount3, which adds nodev and nosuid by itself.
func (c *Config) helperOptions(root bool) []string {
	options := append(c.flagNames(), "default_permissions", "subtype="+escapeOption(c.Subtype), "fsname="+escapeOption(c.FSName))
	if c.Dev {
		options = append(options, "dev")
	}
	if c.Suid {
		options = append(options, "suid")
	}
	if c.AllowOther || root && !c.RootOnly {
		options = append(options, "allow_other")
	}
	if c.AutoUnmount {
		options = append(options, "auto_unmount")
	}
	return options
}

// escapeOption hides what would end an option.
func escapeOption(s string) string {
	return strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(s)
}

// runHelper runs fusermount3. What it says is the error.
func runHelper(args ...string) error {
	wait, err := startHelper(nil, args...)
	if err != nil {
		return err
	}
	return wait()
}

// startHelper starts fusermount3 with a socket to talk over, if it is not nil. Wait waits for
// its end and returns what it says, as an error, if it failed.
func startHelper(socket *os.File, args ...string) (wait func() error, err error) {
	path, err := exec.LookPath(helper)
	if err != nil {
		return nil, fmt.Errorf("%w: install the package fuse3, or be root and do without what needs it", err)
	}
	cmd := exec.Command(path, args...) //nolint:gosec // the arguments are options and a path
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if socket != nil {
		cmd.ExtraFiles = []*os.File{socket} // the first becomes descriptor 3
		cmd.Env = append(cmd.Env, "_FUSE_COMMFD=3")
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", helper, err)
	}
	return func() error {
		err := cmd.Wait()
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
	}, nil
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
