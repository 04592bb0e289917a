package driver

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/mount-utils"
)

// fsType is what mountinfo shows for our mounts.
const fsType = "fuse.puzzlefs"

// device is the "major:minor" of a mounted file system. All binds of one FUSE mount have
// its device, so it tells to which server a target leads without touching it.
type device string

// mountEntry is one line of mountinfo.
type mountEntry struct {
	id, parent int
	dev        device
	point      string
	source     string
	ours       bool
}

// mountTable is mountinfo at one moment.
type mountTable []mountEntry

// readMounts reads the mounts that this process sees.
func readMounts() (mountTable, error) {
	infos, err := mount.ParseMountInfo("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	table := make(mountTable, 0, len(infos))
	for _, i := range infos {
		table = append(table, mountEntry{
			id:     i.ID,
			parent: i.ParentID,
			dev:    device(fmt.Sprintf("%d:%d", i.Major, i.Minor)),
			point:  unescape(i.MountPoint),
			source: unescape(i.Source),
			ours:   i.FsType == fsType,
		})
	}
	return table, nil
}

// unescape undoes the kernel's \ooo for space, tab, newline and backslash.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// at returns what is mounted at path, topmost first.
func (t mountTable) at(path string) []mountEntry {
	var found []mountEntry
	for _, e := range t {
		if e.point == path {
			found = append(found, e)
		}
	}
	// A mount on top has the one below it as its parent; the topmost is nobody's.
	ordered := make([]mountEntry, 0, len(found))
	for len(found) > 0 {
		top := len(found) - 1
		for i, e := range found {
			if !isParent(e, found) {
				top = i
			}
		}
		ordered = append(ordered, found[top])
		found = append(found[:top], found[top+1:]...)
	}
	return ordered
}

func isParent(e mountEntry, among []mountEntry) bool {
	for _, o := range among {
		if o.parent == e.id && o.id != e.id {
			return true
		}
	}
	return false
}

// oursAt reports whether a mount of ours is somewhere in the stack at path.
func (t mountTable) oursAt(path string) bool {
	for _, e := range t.at(path) {
		if e.ours {
			return true
		}
	}
	return false
}

// serves reports whether path shows the file system dev, and nothing is stacked there.
func (t mountTable) serves(path string, dev device) bool {
	stack := t.at(path)
	return len(stack) == 1 && stack[0].ours && stack[0].dev == dev
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
		if !table.oursAt(path) {
			return nil
		}
		if top := table.at(path)[0]; !top.ours {
			return fmt.Errorf("unmount %s: another file system (%s) is mounted on top of ours; unmount that first", path, top.source)
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
