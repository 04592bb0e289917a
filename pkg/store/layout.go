package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Layout is the kind of an image layout.
type Layout int

// The layouts in the wild.
const (
	// LayoutOCI is the OCI image layout 1.0.0, which PuzzleFS 0.2.0 and later write.
	LayoutOCI Layout = iota + 1
	// LayoutPrivate is the layout of PuzzleFS before 0.2.0: the index names rootfs blobs
	// directly. It is read, never written.
	LayoutPrivate
)

// String returns the name that messages use.
func (l Layout) String() string {
	switch l {
	case LayoutOCI:
		return "OCI image layout"
	case LayoutPrivate:
		return "PuzzleFS layout before 0.2.0"
	}
	return fmt.Sprintf("layout %d", int(l))
}

const (
	layoutFile = "oci-layout"
	indexFile  = "index.json"
	blobsDir   = "blobs/sha256"

	layoutContent        = `{"imageLayoutVersion":"1.0.0"}`
	layoutVersion        = "1.0.0"
	layoutVersionPrivate = "puzzlefs-dev"

	maxLayoutFile = 64 << 10

	dirMode  = 0o755
	fileMode = 0o644
)

// open finds or creates the layout and opens its directories.
func (s *Store) open(create bool) error {
	if create {
		if err := os.MkdirAll(s.dir, dirMode); err != nil {
			return explain(err)
		}
	}
	var err error
	s.root, err = openat(unix.AT_FDCWD, s.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	switch {
	case err == nil:
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("there is no such directory; check the path, or build or pull an image into it: %w", ErrNotALayout)
	case errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("it is not a directory; give the directory that holds %s: %w", layoutFile, ErrNotALayout)
	default:
		return explain(err)
	}
	// Files without a name get one through /proc; without it they get one from the start.
	if s.proc, err = openat(unix.AT_FDCWD, "/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
		s.proc = -1
		s.named.Store(true)
	}

	s.layout, err = s.readLayoutFile()
	if errors.Is(err, unix.ENOENT) {
		if err = s.mark(create); err == nil {
			s.layout, err = s.readLayoutFile()
		}
	}
	if err != nil {
		return explain(err)
	}
	return s.openBlobs(create && s.layout == LayoutOCI)
}

// readLayoutFile returns what oci-layout says.
func (s *Store) readLayoutFile() (Layout, error) {
	b, err := readSmall(s.root, layoutFile, maxLayoutFile)
	if errors.Is(err, unix.ENOENT) {
		return 0, err
	}
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", layoutFile, err)
	}
	var file struct {
		Version string `json:"imageLayoutVersion"`
	}
	if err := json.Unmarshal(b, &file); err != nil {
		return 0, fmt.Errorf("its %s does not hold %s (%w); restore the file: %w", layoutFile, layoutContent, err, ErrNotALayout)
	}
	switch file.Version {
	case layoutVersion:
		return LayoutOCI, nil
	case layoutVersionPrivate:
		return LayoutPrivate, nil
	}
	return 0, fmt.Errorf("its imageLayoutVersion is %q, but only %q and %q are known: %w",
		file.Version, layoutVersion, layoutVersionPrivate, ErrNotALayout)
}

// mark makes an empty directory a layout, if it may: other files are not to become part of
// a layout because somebody gave a wrong path.
func (s *Store) mark(create bool) error {
	others, err := s.otherFiles()
	if err != nil {
		return err
	}
	if unix.Faccessat(s.root, layoutFile, unix.F_OK, unix.AT_SYMLINK_NOFOLLOW) == nil {
		return nil // by another process, and before the others appeared
	}
	switch {
	case len(others) > 0:
		return fmt.Errorf("the directory has no %s but holds %s; give the directory of a layout, or a new or empty one to build or pull into: %w",
			layoutFile, shortList(others, 3), ErrNotALayout)
	case !create:
		return fmt.Errorf("the directory is empty; build or pull an image into it first: %w", ErrNotALayout)
	}
	tmp, err := s.newTemp(s.root)
	if err != nil {
		return fmt.Errorf("create %s: %w", layoutFile, err)
	}
	defer tmp.discard()
	if err := writeAll(tmp.fd, []byte(layoutContent)); err != nil {
		return fmt.Errorf("write %s: %w", layoutFile, err)
	}
	// Another process that creates the same layout may be first, with the same content.
	if err := tmp.link(s.root, layoutFile); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("create %s: %w", layoutFile, err)
	}
	return s.at(StepLayoutMarked)
}

// otherFiles returns the names in the directory that do not come from a layout being
// created, nor from the file system itself.
func (s *Store) otherFiles() ([]string, error) {
	d, err := openDirAgain(s.root, s.dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		return strings.HasPrefix(name, tempPrefix) || name == "lost+found"
	})
	slices.Sort(names)
	return names, nil
}

// openBlobs opens the blob directory. With create, whatever a layout still lacks is made:
// its creation may have been interrupted.
func (s *Store) openBlobs(create bool) error {
	var err error
	s.blobs, err = openat(s.root, blobsDir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOENT) && create {
		for _, dir := range []string{path.Dir(blobsDir), blobsDir} {
			if err := unix.Mkdirat(s.root, dir, dirMode); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("create directory %s: %w", dir, explain(err))
			}
		}
		s.blobs, err = openat(s.root, blobsDir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	}
	switch {
	case err == nil:
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("it has no directory %s; restore it, or build or pull an image into the layout: %w", blobsDir, ErrNotALayout)
	default:
		return fmt.Errorf("open directory %s: %w", blobsDir, explain(err))
	}
	if !create {
		return nil
	}
	if err := s.at(StepLayoutBlobs); err != nil {
		return err
	}
	if err := unix.Faccessat(s.root, indexFile, unix.F_OK, unix.AT_SYMLINK_NOFOLLOW); !errors.Is(err, unix.ENOENT) {
		return nil // whatever is there, the first use of it tells
	}
	// An empty index, under the lock: another process may be tagging.
	return s.updateIndex(func(*index) error { return nil })
}

// shortList joins names for a message, at most so many of them.
func shortList(names []string, most int) string {
	quoted := make([]string, 0, most)
	for _, name := range names[:min(len(names), most)] {
		quoted = append(quoted, strconv.Quote(name))
	}
	list := strings.Join(quoted, ", ")
	if more := len(names) - most; more > 0 {
		list += fmt.Sprintf(" and %d more", more)
	}
	return list
}
