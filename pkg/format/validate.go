package format

import (
	"bytes"
	"fmt"
	"math"
)

// Limits on single values, those of Linux.
const (
	MaxNameLen    = 255      // NAME_MAX
	MaxSymlinkLen = 4095     // PATH_MAX less the NUL
	MaxXattrKey   = 255      // XATTR_NAME_MAX
	MaxXattrValue = 64 << 10 // XATTR_SIZE_MAX
	maxPerm       = 0o7777
)

// validate checks what can be checked of an inode alone. Decoding and encoding both call
// it, so that what is written can be read.
func (i *Inode) validate() error {
	if i.Ino == 0 || i.Ino > math.MaxInt64 {
		return fmt.Errorf("inode numbers are 1 to 2^63-1: %w", ErrCorrupt)
	}
	if i.Perm > maxPerm {
		return fmt.Errorf("permissions %#o, want at most %#o: %w", i.Perm, maxPerm, ErrCorrupt)
	}
	if i.Major > math.MaxUint32 || i.Minor > math.MaxUint32 {
		return fmt.Errorf("device number %d:%d: %w", i.Major, i.Minor, ErrCorrupt)
	}
	for k := range i.Entries {
		if err := i.Entries[k].validate(); err != nil {
			return fmt.Errorf("directory entry %d: %w", k, err)
		}
	}
	if err := i.validateChunks(); err != nil {
		return err
	}
	if err := i.validateXattrs(); err != nil {
		return err
	}
	if i.Kind == KindSymlink && len(i.Symlink) == 0 {
		return fmt.Errorf("symlink without a target: %w", ErrCorrupt)
	}
	if len(i.Symlink) > MaxSymlinkLen || bytes.IndexByte(i.Symlink, 0) >= 0 {
		return fmt.Errorf("symlink target of %d bytes, want at most %d without NUL: %w", len(i.Symlink), MaxSymlinkLen, ErrCorrupt)
	}
	return nil
}

func (e *DirEntry) validate() error {
	switch {
	case e.Ino == 0 || e.Ino > math.MaxInt64:
		return fmt.Errorf("inode number %d: %w", e.Ino, ErrCorrupt)
	case len(e.Name) == 0 || len(e.Name) > MaxNameLen:
		return fmt.Errorf("name of %d bytes, want 1 to %d: %w", len(e.Name), MaxNameLen, ErrCorrupt)
	case string(e.Name) == ".", string(e.Name) == "..", bytes.IndexByte(e.Name, '/') >= 0, bytes.IndexByte(e.Name, 0) >= 0:
		return fmt.Errorf("name %q: %w", e.Name, ErrCorrupt)
	}
	return nil
}

// validateChunks sees to it that sums of lengths and offsets fit into an int64.
func (i *Inode) validateChunks() error {
	var size uint64
	for k := range i.Chunks {
		c := &i.Chunks[k]
		if c.Len > math.MaxInt64 || c.Blob.Offset > math.MaxInt64-c.Len {
			return fmt.Errorf("chunk %d: %d bytes at offset %d: %w", k, c.Len, c.Blob.Offset, ErrCorrupt)
		}
		if size += c.Len; size > math.MaxInt64 {
			return fmt.Errorf("chunk %d: the file is larger than 2^63-1 bytes: %w", k, ErrCorrupt)
		}
	}
	return nil
}

func (i *Inode) validateXattrs() error {
	for k := range i.Xattrs {
		x := &i.Xattrs[k]
		if len(x.Key) == 0 || len(x.Key) > MaxXattrKey || bytes.IndexByte(x.Key, 0) >= 0 {
			return fmt.Errorf("extended attribute named %q: want 1 to %d bytes without NUL: %w", shorten(string(x.Key)), MaxXattrKey, ErrCorrupt)
		}
		if len(x.Val) > MaxXattrValue {
			return fmt.Errorf("extended attribute %s of %d bytes, want at most %d: %w", x.Key, len(x.Val), MaxXattrValue, ErrCorrupt)
		}
	}
	return nil
}
