package driver

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

// fsType is what mountinfo shows for our mounts.
const fsType = "fuse.puzzlefs"

// readMounts reads the mounts that this process sees.
func readMounts() (mountinfo.Table, error) { return mountinfo.Read(mountinfo.Self) }

// isOurs reports whether a mount shows an image.
func isOurs(m mountinfo.Mount) bool { return m.Type == fsType }

// serves reports whether path shows the file system dev, and nothing is stacked there.
func serves(t mountinfo.Table, path string, dev mountinfo.Device) bool {
	stack := t.At(path)
	return len(stack) == 1 && isOurs(stack[0]) && stack[0].Device == dev
}

// maxStack bounds how many mounts are taken off one path: more than any bug has stacked.
const maxStack = 1000

// detachAll unmounts everything of ours that is stacked at path; nothing there is fine.
// A mount in use, and one whose server is dead, is detached lazily, so that this never
// hangs and never fails for being busy. It fails where somebody else's mount lies on top.
func detachAll(path string) error {
	_, err := detachStack(path)
	return err
}

// detachStack is detachAll, and returns what is left at path, which is not ours.
func detachStack(path string) ([]mountinfo.Mount, error) {
	for range maxStack {
		// Reading the table costs more than all else here: once, where there is one mount or none.
		table, err := readMounts()
		if err != nil {
			return nil, err
		}
		stack := table.At(path)
		if !slices.ContainsFunc(stack, isOurs) {
			return stack, nil
		}
		if top := stack[0]; !isOurs(top) {
			return nil, fmt.Errorf("unmount %s: another file system (%s) is mounted on top of ours; unmount that first", path, top.Source)
		}
		err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTCONN) {
			err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case err == nil && len(stack) == 1:
			return nil, nil
		case err != nil && !errors.Is(err, unix.EINVAL):
			return nil, fmt.Errorf("unmount %s: %w", path, err)
		}
		// EINVAL: somebody else was faster. The table tells.
	}
	return nil, fmt.Errorf("unmount %s: still mounted after %d unmounts", path, maxStack)
}
