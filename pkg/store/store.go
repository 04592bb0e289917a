package store

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
	"golang.org/x/sys/unix"
)

// Defaults of Config.
const (
	// DefaultLockTimeout is how long an index update waits for another process's.
	DefaultLockTimeout = 10 * time.Second
	// DefaultTableBytes is enough for the block hashes of 64 GiB of large blobs.
	DefaultTableBytes = 32 << 20
	// minTableBytes keeps the blocks of large blobs, for which a read needs memory, small.
	minTableBytes = 64 << 10
)

// Config says which layout to open and how.
type Config struct {
	// Dir is the directory of the layout.
	Dir string
	// Create makes the directory and an empty OCI layout in it if there is none. A
	// directory that holds other files is left alone.
	Create bool
	// LockTimeout bounds the wait for another process that is updating the index.
	// 0 means DefaultLockTimeout.
	LockTimeout time.Duration
	// TableBytes bounds the memory for the block hashes of large blobs, in bytes.
	// 0 means DefaultTableBytes, else it is at least 64 KiB. The fewer bytes, the larger the
	// blocks in which the largest blobs are read.
	TableBytes int64
	// Fault, in tests, is called at each step of an operation that changes the layout.
	// An error is taken for the next operation's. It must be safe for concurrent use.
	Fault func(Step) error
}

// Store is an open image layout. Use Open to make one.
type Store struct {
	dir         string
	layout      Layout
	lockTimeout time.Duration
	fault       func(Step) error

	// Descriptors of DIR, DIR/blobs/sha256 and /proc/self/fd, valid between begin and end.
	root, blobs, proc int
	// refs counts the operations under way, and one for the store being open. The
	// descriptors are closed when it reaches 0.
	refs   atomic.Int64
	closed atomic.Bool

	// named is set where the file system cannot make files without a name.
	named atomic.Bool

	tables tableCache
	small  bufferPool[[wholeBlobMax]byte] // to read whole blobs into
	stream bufferPool[[streamSize]byte]   // to read pieces into
	summer bufferPool[verity.Summer]
}

// Open opens the layout in cfg.Dir. It fails with ErrNotALayout, and a message that says
// what was found, where there is none (and cfg.Create is not set, or the directory holds
// other files).
func Open(cfg Config) (*Store, error) {
	switch {
	case cfg.Dir == "":
		return nil, fmt.Errorf("open layout: Config.Dir is empty")
	case cfg.LockTimeout < 0:
		return nil, fmt.Errorf("open layout %s: Config.LockTimeout is %v, want 0 or more", cfg.Dir, cfg.LockTimeout)
	case cfg.TableBytes != 0 && cfg.TableBytes < minTableBytes:
		return nil, fmt.Errorf("open layout %s: Config.TableBytes is %d, want at least %d", cfg.Dir, cfg.TableBytes, minTableBytes)
	}
	s := &Store{
		dir:         filepath.Clean(cfg.Dir),
		lockTimeout: cfg.LockTimeout,
		fault:       cfg.Fault,
		root:        -1,
		blobs:       -1,
		proc:        -1,
	}
	if s.lockTimeout == 0 {
		s.lockTimeout = DefaultLockTimeout
	}
	s.tables.limit = cfg.TableBytes
	if s.tables.limit == 0 {
		s.tables.limit = DefaultTableBytes
	}
	s.refs.Store(1)
	if err := s.open(cfg.Create); err != nil {
		s.closeAll()
		return nil, fmt.Errorf("open layout %s: %w", s.dir, err)
	}
	return s, nil
}

// Dir returns the directory of the layout.
func (s *Store) Dir() string { return s.dir }

// Layout returns the kind of the layout.
func (s *Store) Layout() Layout { return s.layout }

// Close releases the store. Operations under way finish; later ones fail with fs.ErrClosed.
// Closing twice is allowed.
func (s *Store) Close() error {
	if !s.closed.Swap(true) {
		s.end()
	}
	return nil
}

// Sync makes every blob written so far durable, by whomever it was written: one system call
// for the whole file system. It also reports what failed after a write had returned.
func (s *Store) Sync() error {
	if err := s.begin(); err != nil {
		return fmt.Errorf("sync layout %s: %w", s.dir, err)
	}
	defer s.end()
	if err := retry(func() error { return unix.Syncfs(s.blobs) }); err != nil {
		return fmt.Errorf("sync layout %s: %w", s.dir, explain(err))
	}
	return nil
}

// begin keeps the descriptors open until end.
func (s *Store) begin() error {
	for {
		n := s.refs.Load()
		if n == 0 || s.closed.Load() {
			return fs.ErrClosed
		}
		if s.refs.CompareAndSwap(n, n+1) {
			return nil
		}
	}
}

// beginWrite is begin for an operation that changes the layout.
func (s *Store) beginWrite() error {
	if s.layout == LayoutPrivate {
		return fmt.Errorf("it has the layout of PuzzleFS before 0.2.0, which is only read: extract and rebuild the image into a new layout: %w", ErrReadOnly)
	}
	return s.begin()
}

// end undoes begin.
func (s *Store) end() {
	if s.refs.Add(-1) == 0 {
		s.closeAll()
	}
}

func (s *Store) closeAll() {
	for _, fd := range []int{s.root, s.blobs, s.proc} {
		if fd >= 0 {
			_ = unix.Close(fd) // directories: nothing is lost
		}
	}
}

// blobPath returns the path of a blob, for messages.
func (s *Store) blobPath(d format.Digest) string {
	return filepath.Join(s.dir, blobsDir, d.Hex())
}
