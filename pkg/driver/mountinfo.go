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

// oursAt reports whether a mount of ours is somewhere in the stack at path.
func oursAt(t mountinfo.Table, path string) bool { return slices.ContainsFunc(t.At(path), isOurs) }

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
	for range maxStack {
		table, err := readMounts()
		if err != nil {
			return err
		}
		if !oursAt(table, path) {
			return nil
		}
		if top := table.At(path)[0]; !isOurs(top) {
			return fmt.Errorf("unmount %s: another file system (%s) is mounted on top of ours; unmount that first", path, top.Source)
		}
		err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTCONN) {
			err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		// EINVAL: somebody else was faster. The table tells.
		if err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	return fmt.Errorf("unmount %s: still mounted after %d unmounts", path, maxStack)
}
