// Package mountinfo reads the kernel's table of mounts.
//
// It is how the project learns what is mounted where: the table tells without touching the
// mounts, which may be dead or hang. Parsing is Kubernetes' own; this package undoes the
// escapes and knows how mounts are stacked.
package mountinfo

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	mount "k8s.io/mount-utils"
)

// Self is the table of the mounts that this process sees.
const Self = "/proc/self/mountinfo"

// Device is the "major:minor" of a mounted file system. All binds of one mount have the
// same, so it tells which file system a path shows.
type Device string

// Mount is one line of the table.
type Mount struct {
	ID, Parent int
	Device     Device
	// Root is the directory of the file system that is seen at Point.
	Root string
	// Point is the absolute path of the mount point.
	Point string
	// Type is the file system's, with its subtype: "fuse.puzzlefs".
	Type string
	// Source is what was given to mount(2): a device, or any text.
	Source string
	// Options are the mount's own, SuperOptions those of its file system.
	Options, SuperOptions []string
}

// Table is the table at one moment.
type Table []Mount

// Read reads the table in a file, which is [Self] except in tests.
func Read(file string) (Table, error) {
	infos, err := mount.ParseMountInfo(file)
	if err != nil {
		return nil, fmt.Errorf("read the mount table %s: %w", file, err)
	}
	table := make(Table, 0, len(infos))
	for i := range infos {
		info := &infos[i]
		table = append(table, Mount{
			ID:           info.ID,
			Parent:       info.ParentID,
			Device:       Device(strconv.Itoa(info.Major) + ":" + strconv.Itoa(info.Minor)),
			Root:         unescape(info.Root),
			Point:        unescape(info.MountPoint),
			Type:         info.FsType,
			Source:       unescape(info.Source),
			Options:      info.MountOptions,
			SuperOptions: info.SuperOptions,
		})
	}
	return table, nil
}

// escapes are what the kernel writes for the bytes that would break a line into other fields.
var escapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#")

func unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s // as most are
	}
	return escapes.Replace(s)
}

// At returns what is mounted at a path, the topmost first. The path must be clean,
// absolute and free of symlinks, as those in the table are.
func (t Table) At(path string) []Mount {
	var found []Mount
	for _, m := range t {
		if m.Point == path {
			found = append(found, m)
		}
	}
	// A mount that covers another has it as its parent; the topmost covers none of the rest.
	stack := make([]Mount, 0, len(found))
	for len(found) > 0 {
		top := slices.IndexFunc(found, func(m Mount) bool { return !covered(m, found) })
		if top < 0 {
			top = len(found) - 1 // parents in a circle: not the kernel's, but no reason to hang
		}
		stack = append(stack, found[top])
		found = slices.Delete(found, top, top+1)
	}
	return stack
}

// covered reports whether another of the mounts lies on m.
func covered(m Mount, mounts []Mount) bool {
	return slices.ContainsFunc(mounts, func(o Mount) bool { return o.Parent == m.ID && o.ID != m.ID })
}
