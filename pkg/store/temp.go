package store

import (
	"crypto/rand"
	"errors"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// tempPrefix begins the names of files being made. They stand in the directory of the
// layout, not among the blobs, so that finding what a killed process left is cheap.
const tempPrefix = ".puzzlefs-tmp-"

// tempFile is a file that is written before it gets its name. Where the file system can,
// it has no name until then, and vanishes with the process. Where it has a temporary name
// it is locked (flock), which tells it from one that a killed process left.
type tempFile struct {
	s  *Store
	fd int
	// name is the temporary name in the directory of the layout, or "".
	name string
}

// newTemp makes a file that can be linked into dir, which is one of s's directories.
func (s *Store) newTemp(dir int) (*tempFile, error) {
	if s.named.Load() {
		return s.newNamedTemp()
	}
	fd := -1
	err := s.at(StepBlobTemp)
	if err == nil {
		fd, err = openat(dir, ".", unix.O_TMPFILE|unix.O_WRONLY, fileMode)
	}
	switch {
	case err == nil:
		return &tempFile{s: s, fd: fd}, nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EISDIR):
		s.named.Store(true)
		return s.newNamedTemp()
	}
	return nil, err
}

// newNamedTemp makes a file with a temporary name.
func (s *Store) newNamedTemp() (*tempFile, error) {
	for {
		name := tempPrefix + rand.Text()
		fd, err := openat(s.root, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, fileMode)
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return nil, err
		}
		t := &tempFile{s: s, fd: fd, name: name}
		var st unix.Stat_t
		err = retry(func() error { return unix.Flock(fd, unix.LOCK_EX) })
		if err == nil {
			err = retry(func() error { return unix.Fstat(fd, &st) })
		}
		if err == nil && st.Nlink > 0 {
			return t, nil
		}
		t.discard()
		if err != nil {
			return nil, err
		}
		// Between its creation and its lock a cleaner took it for one that was left.
	}
}

// link gives the file its name in dir, or fails with EEXIST where there is something.
func (t *tempFile) link(dir int, name string) error {
	if t.name == "" {
		return retry(func() error {
			return unix.Linkat(t.s.proc, strconv.Itoa(t.fd), dir, name, unix.AT_SYMLINK_FOLLOW)
		})
	}
	err := retry(func() error {
		return unix.Renameat2(t.s.root, t.name, dir, name, unix.RENAME_NOREPLACE)
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// The file system cannot. The worst that the gap between looking and renaming
		// can do is to replace a file by another with the same content.
		if err := unix.Faccessat(dir, name, unix.F_OK, unix.AT_SYMLINK_NOFOLLOW); err == nil {
			return unix.EEXIST
		}
		return t.rename(dir, name)
	}
	if err == nil {
		t.name = ""
	}
	return err
}

// giveName gives a file without a name a temporary one, for rename.
func (t *tempFile) giveName() error {
	if t.name != "" {
		return nil
	}
	if err := retry(func() error { return unix.Flock(t.fd, unix.LOCK_EX) }); err != nil {
		return err
	}
	name := tempPrefix + rand.Text()
	if err := t.link(t.s.root, name); err != nil {
		return err
	}
	t.name = name
	return nil
}

// rename gives a file with a temporary name its name, replacing what is there.
func (t *tempFile) rename(dir int, name string) error {
	err := retry(func() error { return unix.Renameat(t.s.root, t.name, dir, name) })
	if err == nil {
		t.name = ""
	}
	return err
}

// discard closes the file, and removes it unless it got its name.
func (t *tempFile) discard() {
	if t.name != "" {
		_ = unix.Unlinkat(t.s.root, t.name, 0) // if it stays, cleanTemps finds it
	}
	_ = unix.Close(t.fd) // what close could report, Sync reports
}

// cleanTemps removes the files that killed processes left. It is best effort: a file that
// cannot be removed does no harm but for its space.
func (s *Store) cleanTemps() {
	d, err := openDirAgain(s.root, s.dir)
	if err != nil {
		return
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return
	}
	for _, name := range names {
		if !strings.HasPrefix(name, tempPrefix) {
			continue
		}
		fd, _, err := openRegular(s.root, name)
		if err != nil {
			continue
		}
		// Whoever makes the file holds its lock.
		if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = unix.Unlinkat(s.root, name, 0)
		}
		_ = unix.Close(fd)
	}
}
