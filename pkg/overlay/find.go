package overlay

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

// Overlay is an overlay that is mounted.
type Overlay struct {
	// Dir is where, as the table of mounts shows it.
	Dir string
	// Lower are the directories that are only read, the topmost first; ours have one.
	Lower []string
	// Upper has what differs from them, Work is overlayfs' own. Both are "" for an overlay
	// that cannot be written.
	Upper, Work string
	// Source is what the table of mounts shows as the source.
	Source string
	// PreviousTree is the Tree of the Config that the upper directory was used with before, or
	// "": overlayfs does not say what becomes of changes to another tree. Only Mount sets it.
	PreviousTree string

	device mountinfo.Device
}

// Find returns the overlay that is mounted on a directory, and on top there. It reads the
// table of mounts only and does not touch the mount, whose lower tree may be dead. It fails
// with ErrNotMounted.
func Find(dir string) (*Overlay, error) {
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return nil, err
	}
	path, stack, err := table.Find(dir)
	switch {
	case err != nil:
		return nil, err
	case len(stack) == 0:
		return nil, fmt.Errorf("%s: nothing is mounted there: %w", dir, ErrNotMounted)
	case stack[0].Type != fsType:
		return nil, fmt.Errorf("%s: %s, a file system of type %s, is mounted there: %w", path, stack[0].Source, stack[0].Type, ErrNotMounted)
	}
	return newOverlay(&stack[0]), nil
}

// Ours reports whether the overlay was made by this package.
func (o *Overlay) Ours() bool {
	return o.Source == Source && len(o.Lower) == 1 && o.Lower[0] == filepath.Join(o.Dir, lowerName)
}

// newOverlay reads the options of an overlay.
func newOverlay(m *mountinfo.Mount) *Overlay {
	o := &Overlay{Dir: m.Point, Source: m.Source, device: m.Device}
	for _, option := range m.SuperOptions {
		name, value, _ := strings.Cut(option, "=")
		value = mountinfo.Unescape(value)
		switch name {
		case "lowerdir":
			o.Lower = append(o.Lower, splitLower(value)...)
		case "lowerdir+": // one directory, as Linux shows what was given one by one
			o.Lower = append(o.Lower, value)
		case "upperdir":
			o.Upper = value
		case "workdir":
			o.Work = value
		}
	}
	return o
}

// splitLower splits a list of lower directories at its colons, but for those with a backslash
// before them. Two colons stand before a directory that has only the data of files.
func splitLower(list string) []string {
	var dirs []string
	var dir strings.Builder
	end := func() {
		if dir.Len() > 0 {
			dirs = append(dirs, dir.String())
		}
		dir.Reset()
	}
	for i := 0; i < len(list); i++ {
		switch c := list[i]; {
		case c == ':':
			end()
			continue
		case c == '\\' && i+1 < len(list):
			i++
		}
		dir.WriteByte(list[i])
	}
	end()
	return dirs
}
