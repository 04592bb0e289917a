package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lookupTimeout bounds the one place where the driver walks into a mount of its own: the
// lookup of a subPath. The server is in this process and answers in microseconds.
const lookupTimeout = 10 * time.Second

// bind shows the directory source at t, read-only and with flags, as one new mount. flags are
// no looser than those of the mount that source is in, of which the new one begins as a copy.
// The target directory exists. The attributes are set before the mount becomes visible, where the
// kernel can (5.12 and later).
func bind(source *os.File, t target, flags mountFlags) error {
	parent, err := t.openParent()
	if err != nil {
		return err
	}
	defer parent.Close()

	err = bindTree(source, parent, filepath.Base(t.real), flags)
	if errors.Is(err, unix.ENOSYS) {
		err = bindClassic(source, parent, filepath.Base(t.real), flags)
	}
	if err != nil {
		return fmt.Errorf("bind to target %s: %w", t.given, err)
	}
	return nil
}

// openBeneath opens the directory subPath ("" for the root) of the mount at dir without
// following a symlink or leaving it. A server that does not answer costs lookupTimeout and a thread, until its mount is
// gone, but not the caller.
func openBeneath(ctx context.Context, dir, subPath string) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	done := make(chan result, 1)
	go func() {
		f, err := openBeneathNow(dir, subPath)
		done <- result{f, err}
	}()
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	select {
	case r := <-done:
		return r.f, r.err
	case <-ctx.Done():
		go func() {
			if r := <-done; r.f != nil {
				r.f.Close()
			}
		}()
		return nil, fmt.Errorf("look up subPath %q in %s: the file system does not answer: %w", subPath, dir, ErrUnavailable)
	}
}

func openBeneathNow(dir, subPath string) (*os.File, error) {
	const flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	root, err := unix.Open(dir, flags, 0)
	if err != nil {
		return nil, fmt.Errorf("open mount %s: %w", dir, err)
	}
	if subPath == "" {
		return os.NewFile(uintptr(root), dir), nil
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, subPath, &unix.OpenHow{
		Flags:   flags,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	switch {
	case errors.Is(err, unix.ENOSYS):
		return nil, fmt.Errorf("open subPath %q: subPath needs openat2(2), Linux 5.6 or later", subPath)
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOTDIR):
		return nil, fmt.Errorf("open subPath %q: want a directory of the image, reached without symlinks: %w: %w", subPath, err, ErrInvalid)
	case err != nil:
		return nil, fmt.Errorf("open subPath %q: %w", subPath, err)
	}
	return os.NewFile(uintptr(fd), filepath.Join(dir, subPath)), nil
}

// bindTree clones source as a detached mount, makes it read-only, and only then attaches it.
func bindTree(source, parent *os.File, name string, flags mountFlags) error {
	fd, err := unix.OpenTree(int(source.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	// Closing the descriptor of a tree that was not attached dissolves the clone.
	defer unix.Close(fd)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if !flags.dev {
		attr.Attr_set |= unix.MOUNT_ATTR_NODEV
	}
	if !flags.suid {
		attr.Attr_set |= unix.MOUNT_ATTR_NOSUID
	}
	if flags.noexec {
		attr.Attr_set |= unix.MOUNT_ATTR_NOEXEC
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	if err := unix.MoveMount(fd, "", int(parent.Fd()), name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// bindClassic is bindTree for kernels before 5.12.
func bindClassic(source, parent *os.File, name string, flags mountFlags) error {
	from := fmt.Sprintf("/proc/self/fd/%d", source.Fd())
	to := fmt.Sprintf("/proc/self/fd/%d/%s", parent.Fd(), name)
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	remount := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY)
	if !flags.dev {
		remount |= unix.MS_NODEV
	}
	if !flags.suid {
		remount |= unix.MS_NOSUID
	}
	if flags.noexec {
		remount |= unix.MS_NOEXEC
	}
	if err := unix.Mount("", to, "", remount, ""); err != nil {
		return errors.Join(fmt.Errorf("remount read-only: %w", err), unix.Unmount(to, unix.MNT_DETACH))
	}
	return nil
}
