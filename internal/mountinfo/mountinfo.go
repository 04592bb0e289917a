// Package mountinfo reads the kernel's table of mounts.
//
// It is how the project learns what is mounted where: the table tells without touching the
// mounts, which may be dead or hang. Parsing is Kubernetes' own; this package undoes the
// escapes and knows how mounts are stacked.
package mountinfo

import (
	"fmt"
	"path/filepath"
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
	// Options are the mount's own, SuperOptions those of its file system, as the table shows
	// them: [Unescape] is for their values.
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
			Root:         Unescape(info.Root),
			Point:        Unescape(info.MountPoint),
			Type:         info.FsType,
			Source:       Unescape(info.Source),
			Options:      info.MountOptions,
			SuperOptions: info.SuperOptions,
		})
	}
	return table, nil
}

// Unescape undoes what the kernel does to bytes that would break a line into other fields, or
// a list of options into others: a backslash and three octal digits stand for each.
func Unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s // as most are
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
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

// Find returns what is mounted at a directory that a person named, the topmost first, and the
// path under which the table has it. It does not touch a mount there, which may be dead or
// hang, unless nothing is found without. Nothing is found, without an error, where nothing is
// mounted.
func (t Table) Find(dir string) (path string, stack []Mount, err error) {
	path, err = filepath.Abs(dir)
	if err != nil {
		return "", nil, err
	}
	// A symlink above the mount point can be followed without touching the mount; that the
	// last component is one is tried last.
	candidates := []func() (string, error){
		func() (string, error) { return path, nil },
		func() (string, error) {
			parent, err := filepath.EvalSymlinks(filepath.Dir(path))
			return filepath.Join(parent, filepath.Base(path)), err
		},
		func() (string, error) { return filepath.EvalSymlinks(path) },
	}
	for _, candidate := range candidates {
		found, err := candidate()
		if err != nil {
			return path, nil, err
		}
		if stack := t.At(found); len(stack) > 0 {
			return found, stack, nil
		}
	}
	return path, nil, nil
}

// covered reports whether another of the mounts lies on m.
func covered(m Mount, mounts []Mount) bool {
	return slices.ContainsFunc(mounts, func(o Mount) bool { return o.Parent == m.ID && o.ID != m.ID })
}
