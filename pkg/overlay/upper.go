package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

// OpenUpper opens the upper directory, which the caller has to close. An upper directory below
// the mount point, as that of a writable mount is by default, is hidden by the overlay; it is
// reached through a copy of the mount that the overlay lies on, which nobody else sees.
//
// What changes in the directory while the overlay is mounted must come through the overlay.
func (o *Overlay) OpenUpper() (*os.File, error) {
	f, err := o.openUpper()
	if err != nil {
		return nil, fmt.Errorf("open the upper directory of the overlay on %s: %w", o.Dir, err)
	}
	return f, nil
}

func (o *Overlay) openUpper() (*os.File, error) {
	switch {
	case o.Upper == "":
		return nil, errors.New("it has none, so that nothing can have changed")
	case !filepath.IsAbs(o.Upper):
		return nil, fmt.Errorf("it was mounted with the relative path %s, of which nobody knows where it begins", o.Upper)
	case !strings.HasPrefix(o.Upper, strings.TrimSuffix(o.Dir, "/")+"/"):
		return openDir(unix.AT_FDCWD, o.Upper, o.Upper)
	}
	below, err := o.mountBelow()
	if err != nil {
		return nil, err
	}
	rel, err := filepath.Rel(below.Point, o.Upper)
	if err != nil {
		return nil, err
	}
	point, err := unix.Open(below.Point, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: below.Point, Err: err}
	}
	defer unix.Close(point)
	var st unix.Statx_t
	if err := unix.Statx(point, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return nil, &os.PathError{Op: "statx", Path: below.Point, Err: err}
	}
	if st.Mask&unix.STATX_MNT_ID == 0 || st.Mnt_id != uint64(below.ID) {
		return nil, fmt.Errorf("something else is mounted on %s by now, which hides %s: mount with an upper directory elsewhere", below.Point, o.Upper)
	}
	tree, err := unix.OpenTree(point, "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open_tree %s: %w", below.Point, err)
	}
	defer unix.Close(tree)
	return openDir(tree, rel, o.Upper)
}

// mountBelow returns the mount that the overlay lies on.
func (o *Overlay) mountBelow() (mountinfo.Mount, error) {
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return mountinfo.Mount{}, err
	}
	for _, m := range table.At(o.Dir) {
		if m.Device != o.device {
			continue
		}
		for _, below := range table {
			if below.ID == m.Parent {
				return below, nil
			}
		}
	}
	return mountinfo.Mount{}, ErrNotMounted
}

// openDir opens a directory for reading. name is for messages.
func openDir(at int, path, name string) (*os.File, error) {
	fd, err := unix.Openat(at, path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}
