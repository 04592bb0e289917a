package fuse

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// Unmount unmounts an image from a directory, whoever serves it, with umount(2) as root
// and with fusermount3 otherwise. It does not touch the mount, whose server may be dead.
//
// With lazy set the mount is taken off at once even if it is in use: whoever uses it goes
// on. Without, it fails with ErrBusy. It fails with ErrNotMounted if what is on top at dir
// is not an image, whatever is below.
func Unmount(dir string, lazy bool) error {
	path, err := ourMount(dir)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return detach(path, lazy)
}

// ours reports whether a mount shows an image. Where the type was chosen by a user, the source
// tells, which is the image's digest then.
func ours(m *mountinfo.Mount) bool {
	if m.Type == FSType {
		return true
	}
	_, err := format.ParseDigest(m.Source)
	return err == nil && strings.HasPrefix(m.Type, typePrefix)
}

// ourMount returns the path under which the table of mounts has a directory.
func ourMount(dir string) (string, error) {
	if dir == "" {
		return "", fmt.Errorf("no directory: %w", ErrConfig)
	}
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return "", err
	}
	path, stack, err := table.Find(dir)
	switch {
	case err != nil:
		return "", err
	case len(stack) == 0:
		return "", fmt.Errorf("nothing is mounted there: %w", ErrNotMounted)
	case !ours(&stack[0]):
		return "", fmt.Errorf("%s, a file system of type %s, is mounted there: %w", stack[0].Source, stack[0].Type, ErrNotMounted)
	}
	return path, nil
}

// detach takes the topmost mount off path.
func detach(path string, lazy bool) error {
	unmount := unmountByHelper
	if os.Geteuid() == 0 {
		unmount = unmountDirectly
	}
	if err := unmount(path, lazy); err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

func unmountDirectly(path string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(path, flags)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: fuser -vm %s shows by whom; a lazy unmount does not wait for them", ErrBusy, path)
	case errors.Is(err, unix.EINVAL):
		return ErrNotMounted // any longer
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: the capability CAP_SYS_ADMIN is needed", err)
	}
	return err
}

func unmountByHelper(path string, lazy bool) error {
	args := []string{"-u"}
	if lazy {
		args = append(args, "-z")
	}
	err := runHelper(append(args, "--", path)...)
	switch {
	case err == nil:
		return nil
	case strings.Contains(err.Error(), "busy"):
		return fmt.Errorf("%w: %w: fuser -vm %s shows by whom; a lazy unmount does not wait for them", ErrBusy, err, path)
	case strings.Contains(err.Error(), "not found in"):
		return fmt.Errorf("%w: %w: only who mounted it, or root, can unmount it", ErrNotMounted, err)
	}
	return err
}
