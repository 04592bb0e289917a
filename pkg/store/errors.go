package store

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Errors of this package. All are wrapped with what was done to what; use errors.Is.
var (
	// ErrNotFound says that the layout has no such blob or tag.
	ErrNotFound = errors.New("not found")
	// ErrDigestMismatch says that content is not what its digest or descriptor says: a
	// torn or changed blob, or something in its place that is no regular file.
	ErrDigestMismatch = errors.New("digest mismatch")
	// ErrLocked says that another process kept the index locked for longer than
	// Config.LockTimeout.
	ErrLocked = errors.New("layout is locked")
	// ErrReadOnly says that the layout is of a kind that is never written.
	ErrReadOnly = errors.New("layout is read-only")
	// ErrNotALayout says that a directory is no image layout that this package knows.
	ErrNotALayout = errors.New("not an image layout")
	// ErrTooLarge says that a blob or an index exceeds the limit for reading it into memory.
	ErrTooLarge = errors.New("too large")
	// ErrUnknownContent says that nothing was collected, because what a pinned image refers
	// to cannot be read.
	ErrUnknownContent = errors.New("content of a pinned image is not known")
	// ErrInvalidTag says that a string is no tag, or no LAYOUT:TAG.
	ErrInvalidTag = errors.New("invalid tag")
)

// explain adds the cure to errors of the operating system that a person can do something
// about.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w: free space on this file system and try again", err)
	case errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: free space or raise the quota and try again", err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: choose a layout on a writable file system", err)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fmt.Errorf("%w: raise the limit of open files (ulimit -n)", err)
	}
	return err
}
