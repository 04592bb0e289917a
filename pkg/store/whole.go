package store

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// WholeRead is a blob to be read as a whole.
type WholeRead struct {
	// Blob is which one. If Verity is not zero, content that has this fs-verity digest is right: who says so, the
	// metadata of an image, is trusted as much as who named Digest. It is looked at where that is
	// faster, and Digest where it is not, and where they disagree.
	Blob format.VerityData
	// Into is where the content goes.
	Into []byte
	// N is set to how many bytes there are.
	N int
}

// content returns what was read.
func (r *WholeRead) content() []byte { return r.Into[:r.N] }

// ReadWhole reads blobs, each as a whole. Several at once are checked in less time than one after the other. If one
// cannot be had, that is the error, and all buffers are zero.
//
// It fails with ErrTooLarge if a blob has more bytes than there is room for, with ErrNotFound and with
// ErrDigestMismatch.
func (s *Store) ReadWhole(ctx context.Context, reads []WholeRead) error {
	if len(reads) == 0 {
		return nil
	}
	if err := s.begin(); err != nil {
		return s.readError(reads[0].Blob.Digest, err)
	}
	defer s.end()
	for i := range reads {
		if err := s.readStored(ctx, &reads[i]); err != nil {
			forget(reads)
			return s.readError(reads[i].Blob.Digest, err)
		}
	}
	if d, err := s.check(reads); err != nil {
		forget(reads)
		return s.readError(d, err)
	}
	return nil
}

// readStored reads a blob without checking it.
func (s *Store) readStored(ctx context.Context, r *WholeRead) error {
	r.N = 0
	fd, size, err := s.openFile(r.Blob.Digest)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if size > int64(len(r.Into)) {
		return fmt.Errorf("it has %d bytes, at most %d are read: %w", size, len(r.Into), ErrTooLarge)
	}
	r.N, err = readPieces(ctx, fd, r.Into[:size], func([]byte) {})
	return err
}

// check checks what was read, and returns the blob that is wrong.
func (s *Store) check(reads []WholeRead) (format.Digest, error) {
	sums := make([]verity.Digest, len(reads))
	if verity.Fast() {
		contents := make([][]byte, len(reads))
		for i := range reads {
			contents[i] = reads[i].content()
		}
		summer := s.summer.get()
		summer.Sum(sums, contents)
		s.summer.put(summer)
	}
	for i := range reads {
		blob := &reads[i].Blob
		if blob.Verity != (verity.Digest{}) && blob.Verity == sums[i] {
			continue
		}
		if got := format.DigestOf(reads[i].content()); got != blob.Digest {
			return blob.Digest, mismatch(got)
		}
	}
	return format.Digest{}, nil
}

// forget takes back what was read and turned out to be of no use.
func forget(reads []WholeRead) {
	for i := range reads {
		clear(reads[i].Into)
		reads[i].N = 0
	}
}
