package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
)

// Names of the directories below the mount point.
const (
	lowerName = "ro"
	upperName = "upper"
	workName  = "work"
	// workSuffix is put behind the name of an upper directory elsewhere, for the work
	// directory beside it.
	workSuffix = ".overlay-work"
)

// MakeDirs makes the directories of a writable mount on dir, which must exist; those that are
// there are used as they are. The upper directory is DIR/upper if upper is "". Undo removes
// what was made, unless there is something in it by then.
//
// It fails with ErrMounted if an overlay is mounted there, fs.ErrNotExist, or what the system
// says; nothing is left then.
func MakeDirs(dir, upper string) (d Dirs, undo func() error, err error) {
	m := &maker{}
	if d, err = m.dirs(dir, upper); err != nil {
		return Dirs{}, nil, fmt.Errorf("prepare %s for a writable mount: %w", dir, errors.Join(err, m.undo()))
	}
	return d, m.undo, nil
}

// The kernel's limits for extended attributes, in bytes.
const (
	maxXattrList  = 64 << 10
	maxXattrValue = 64 << 10
)

// maker makes directories and remembers which.
type maker struct {
	made []string
	work string // the work directory
}

func (m *maker) dirs(dir, upper string) (d Dirs, err error) {
	if d.Dir, err = resolve(dir); err != nil {
		return d, err
	}
	d.Lower, d.Upper, d.Work = filepath.Join(d.Dir, lowerName), filepath.Join(d.Dir, upperName), filepath.Join(d.Dir, workName)
	if upper != "" {
		if upper, err = filepath.Abs(upper); err != nil {
			return d, err
		}
		if err := m.makeAll(upper); err != nil {
			return d, err
		}
		if d.Upper, err = resolve(upper); err != nil {
			return d, err
		}
		if filepath.Dir(d.Upper) != d.Dir {
			d.Work = d.Upper + workSuffix
		}
	}
	if err := d.check(); err != nil {
		return d, err
	}
	// Whether an overlay is there has to be asked before: what is made would be in it.
	if err := checkFree(d); err != nil {
		return d, err
	}
	for _, path := range []string{d.Lower, d.Upper, d.Work} {
		if err := m.make(path); err != nil {
			return d, err
		}
	}
	m.work = d.Work
	d.fresh = slices.Contains(m.made, d.Upper)
	return d, nil
}

// copyRoot gives a new upper directory the owner, permissions and extended attributes of the
// lower one: the overlay shows those of the upper.
func copyRoot(upper, lower string) error {
	var st unix.Stat_t
	if err := unix.Lstat(lower, &st); err != nil {
		return fmt.Errorf("read attributes of %s: %w", lower, err)
	}
	if err := unix.Lchown(upper, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("set owner of %s: %w", upper, err)
	}
	if err := unix.Chmod(upper, st.Mode&0o7777); err != nil {
		return fmt.Errorf("set permissions of %s: %w", upper, err)
	}
	list := make([]byte, maxXattrList)
	n, err := unix.Llistxattr(lower, list)
	if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list extended attributes of %s: %w", lower, err)
	}
	value := make([]byte, maxXattrValue)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		// Those of overlayfs itself say something about the directory they are on.
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		n, err := unix.Lgetxattr(lower, name, value)
		if err == nil {
			err = unix.Lsetxattr(upper, name, value[:n], 0)
		}
		// What the upper file system cannot hold overlayfs leaves out, too.
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("copy the extended attribute %s of %s to %s: %w", name, lower, upper, err)
		}
	}
	return nil
}

// resolve returns the absolute path, without symlinks, of a directory.
func resolve(dir string) (string, error) {
	path, err := filepath.Abs(dir)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", err
	}
	return path, isDir(path)
}

func isDir(path string) error {
	info, err := os.Lstat(path)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s: %w", path, unix.ENOTDIR)
	}
	return nil
}

// check refuses directories that would be in each other's way, and names that nobody finds
// again in the table of mounts.
func (d *Dirs) check() error {
	for _, other := range []string{d.Dir, d.Lower, d.Work} {
		if d.Upper == other || strings.HasPrefix(other, d.Upper+"/") {
			return fmt.Errorf("%w: %s is, or contains, %s: choose another", ErrUpper, d.Upper, other)
		}
	}
	if strings.HasPrefix(d.Upper, d.Lower+"/") {
		return fmt.Errorf("%w: %s is in %s, where the image will be mounted: choose another", ErrUpper, d.Upper, d.Lower)
	}
	odd := func(r rune) bool {
		return r == '"' || unicode.IsSpace(r) && !strings.ContainsRune(" \t\n", r)
	}
	for _, path := range []string{d.Dir, d.Upper} {
		if strings.ContainsFunc(path, odd) {
			return fmt.Errorf("the directory %q has quotes or white space that nobody finds again in the table of mounts: choose another", path)
		}
	}
	return nil
}

// makeAll makes a directory and what is missing above it.
func (m *maker) makeAll(path string) error {
	var missing []string
	for {
		_, err := os.Stat(path)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		missing = append(missing, path)
		path = filepath.Dir(path)
	}
	for i := len(missing) - 1; i >= 0; i-- {
		if err := m.make(missing[i]); err != nil {
			return err
		}
	}
	return nil
}

// make makes a directory, or finds one that is no symlink.
func (m *maker) make(path string) error {
	err := os.Mkdir(path, 0o755)
	if err == nil {
		m.made = append(m.made, path)
		return nil
	}
	switch {
	case errors.Is(err, os.ErrExist):
		return isDir(path)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: unmount what is mounted there, or choose a directory that can be written", err)
	}
	return err
}

// undo removes what was made, the last first.
func (m *maker) undo() error {
	var errs []error
	for i := len(m.made) - 1; i >= 0; i-- {
		path := m.made[i]
		if path == m.work {
			_ = os.Remove(filepath.Join(path, "work")) // overlayfs' own, if it was mounted
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			errs = append(errs, err)
		}
	}
	m.made = nil
	return errors.Join(errs...)
}
