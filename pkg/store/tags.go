package store

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"runtime"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"golang.org/x/sys/unix"
)

// Tags returns the index entries that name PuzzleFS images (or other images of the same
// media type) by a tag, in the order of the index; the tag is the annotation
// format.AnnotationRefName. Entries of other kinds are passed over.
func (s *Store) Tags() ([]format.Descriptor, error) {
	x, err := s.index()
	if err != nil {
		return nil, fmt.Errorf("list tags of layout %s: %w", s.dir, err)
	}
	return x.tags(), nil
}

// Resolve returns the descriptor that a tag names: of an image manifest, or for
// LayoutPrivate of the rootfs blob itself. It fails with ErrNotFound, and a message that
// lists the tags there are, or with format.ErrNotPuzzleFS where the tag names something of
// another kind.
func (s *Store) Resolve(tag string) (format.Descriptor, error) {
	x, err := s.index()
	if err != nil {
		return format.Descriptor{}, fmt.Errorf("resolve tag %q in layout %s: %w", tag, s.dir, err)
	}
	if err := ValidateTag(tag); err != nil {
		return format.Descriptor{}, fmt.Errorf("resolve tag in layout %s: %w", s.dir, err)
	}
	e, ok := x.find(tag)
	if !ok {
		return format.Descriptor{}, fmt.Errorf("resolve tag %q in layout %s: %s: %w", tag, s.dir, x.describeTags(), ErrNotFound)
	}
	if e.foreign != nil {
		return format.Descriptor{}, fmt.Errorf("resolve tag %q in layout %s: %w", tag, s.dir, e.foreign)
	}
	return e.desc, nil
}

// describeTags says for messages which tags there are.
func (x *index) describeTags() string {
	var names []string
	for _, d := range x.tags() {
		names = append(names, d.Annotations[format.AnnotationRefName])
	}
	if len(names) == 0 {
		return "no such tag, there are none; build or pull an image into the layout first"
	}
	return "no such tag, there are " + shortList(names, 20)
}

// Tag names the image manifest d by a tag, and makes it and everything put before durable
// first. An entry that has the tag is removed, the new one becomes the last; the others
// stay as they are, byte for byte. The annotation ref.name is set to tag; where d has no
// media type or platform, that of an image manifest and of this program are taken, as the
// reference does.
//
// It fails with ErrInvalidTag, with ErrReadOnly for LayoutPrivate, with ErrNotFound or
// ErrDigestMismatch where the layout has no blob of d's digest and size, and with ErrLocked.
// The index is the old or the new one, whatever happens.
func (s *Store) Tag(tag string, d format.Descriptor) error {
	if err := s.tag(tag, d); err != nil {
		return fmt.Errorf("tag %s as %q in layout %s: %w", d.Digest, tag, s.dir, explain(err))
	}
	return nil
}

func (s *Store) tag(tag string, d format.Descriptor) error {
	if err := ValidateTag(tag); err != nil {
		return err
	}
	if err := s.beginWrite(); err != nil {
		return err
	}
	defer s.end()
	size, err := s.size(d.Digest)
	if err != nil {
		return s.readError(d.Digest, err)
	}
	if size != d.Size {
		return fmt.Errorf("%s has %d bytes, the descriptor says %d: %w", s.blobPath(d.Digest), size, d.Size, ErrDigestMismatch)
	}
	annotations := maps.Clone(d.Annotations)
	if annotations == nil {
		annotations = make(map[string]string, 1)
	}
	annotations[format.AnnotationRefName] = tag
	d.Annotations = annotations
	if d.MediaType == "" {
		d.MediaType = format.MediaTypeManifest
	}
	if d.Platform == nil {
		d.Platform = &format.Platform{Architecture: runtime.GOARCH, OS: runtime.GOOS}
	}
	if err := s.Sync(); err != nil {
		return err
	}
	if err := s.at(StepSynced); err != nil {
		return err
	}
	return s.updateIndex(func(x *index) error {
		x.remove(tag)
		return x.add(d)
	})
}

// Untag removes the entries of a tag. The blobs stay. It fails with ErrNotFound where there
// is none, and like Tag.
func (s *Store) Untag(tag string) error {
	err := s.beginWrite()
	if err == nil {
		defer s.end()
		err = s.updateIndex(func(x *index) error {
			if !x.remove(tag) {
				return fmt.Errorf("%s: %w", x.describeTags(), ErrNotFound)
			}
			return nil
		})
	}
	if err != nil {
		return fmt.Errorf("remove tag %q from layout %s: %w", tag, s.dir, explain(err))
	}
	return nil
}

// index reads the index as it is now.
func (s *Store) index() (*index, error) {
	if err := s.begin(); err != nil {
		return nil, err
	}
	defer s.end()
	return s.readIndex()
}

// readIndex reads index.json. A layout without one is empty: the reference makes it last.
func (s *Store) readIndex() (*index, error) {
	b, err := readSmall(s.root, indexFile, maxIndexSize)
	if errors.Is(err, unix.ENOENT) && s.layout == LayoutOCI {
		return newIndex(), nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(s.dir, indexFile), explain(err))
	}
	x, err := parseIndex(b, s.layout)
	if err != nil {
		return nil, fmt.Errorf("read %s: restore it, or remove it and tag the images again: %w", filepath.Join(s.dir, indexFile), err)
	}
	return x, nil
}

// updateIndex replaces the index by what change makes of it, while no other process does.
func (s *Store) updateIndex(change func(*index) error) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.at(StepIndexLocked); err != nil {
		return err
	}
	s.cleanTemps()
	x, err := s.readIndex()
	if err != nil {
		return err
	}
	if err := change(x); err != nil {
		return err
	}
	b, err := x.encode()
	if err != nil {
		return err
	}
	return s.writeIndex(b)
}

// writeIndex replaces index.json, durably. The lock is held.
func (s *Store) writeIndex(b []byte) error {
	if len(b) > maxIndexSize {
		return fmt.Errorf("%s would have %d bytes, at most %d are read; remove tags: %w", indexFile, len(b), maxIndexSize, ErrTooLarge)
	}
	tmp, err := s.newNamedTemp()
	if err != nil {
		return fmt.Errorf("create %s: %w", indexFile, err)
	}
	defer tmp.discard()
	if err := writeAll(tmp.fd, b); err != nil {
		return fmt.Errorf("write %s: %w", indexFile, err)
	}
	if err := s.at(StepIndexTempWritten); err != nil {
		return err
	}
	if err := retry(func() error { return unix.Fsync(tmp.fd) }); err != nil {
		return fmt.Errorf("sync %s: %w", indexFile, err)
	}
	if err := s.at(StepIndexTempSynced); err != nil {
		return err
	}
	if err := tmp.rename(s.root, indexFile); err != nil {
		return fmt.Errorf("replace %s: %w", indexFile, err)
	}
	if err := s.at(StepIndexRenamed); err != nil {
		return err
	}
	if err := retry(func() error { return unix.Fsync(s.root) }); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}

// lock takes the lock that index updates of all processes, and of all goroutines of this
// one, take. It is released by unlock, or by the kernel when the process dies.
func (s *Store) lock() (unlock func(), err error) {
	fd, err := openat(s.root, layoutFile, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", layoutFile, err)
	}
	err = flockWithin(fd, s.lockTimeout)
	if err == nil {
		return func() { _ = unix.Close(fd) }, nil
	}
	_ = unix.Close(fd)
	if errors.Is(err, ErrLocked) {
		return nil, fmt.Errorf("another process has %s locked for more than %v; wait for its build or pull to end, or stop it, and try again: %w",
			filepath.Join(s.dir, layoutFile), s.lockTimeout, ErrLocked)
	}
	return nil, fmt.Errorf("lock %s: %w", layoutFile, err)
}

// flockWithin takes the lock of an open file, or fails with ErrLocked when it could not for
// that long.
func flockWithin(fd int, timeout time.Duration) error {
	// There is no flock with a time limit.
	const firstWait, longestWait = time.Millisecond, 50 * time.Millisecond
	deadline := time.Now().Add(timeout)
	for wait := firstWait; ; wait = min(2*wait, longestWait) {
		err := retry(func() error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return ErrLocked
		}
		time.Sleep(min(wait, left))
	}
}
