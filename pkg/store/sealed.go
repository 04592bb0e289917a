package store

import (
	"fmt"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"golang.org/x/sys/unix"
)

// errSeal is what it means that a sealed file cannot be read. Without a seal the same error may
// come from a disk or a network that will work again.
var errSeal = fmt.Errorf("the kernel's fs-verity refuses its content: %w", ErrDigestMismatch)

// sealed reports whether the file of the blob d is under the kernel's fs-verity. What such a file
// holds cannot be written to; it is read, linked, touched and removed like any other.
func (s *Store) sealed(d format.Digest) bool {
	var st unix.Statx_t
	err := retry(func() error { return unix.Statx(s.blobs, d.Hex(), unix.AT_SYMLINK_NOFOLLOW, 0, &st) })
	return err == nil && st.Attributes&unix.STATX_ATTR_VERITY != 0
}
