package store

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// GetEarly is Get for who has something to do with the bytes of the blob d.Digest that can be thrown away: it
// returns them when they are read, while they are still being hashed on another CPU, by d.Verity as ReadWhole
// does where that is faster. Nothing that was made of them may be believed before verify has returned nil.
// verify has to be called, once: it waits until the bytes are hashed, and fails with ErrDigestMismatch
// or with ctx's error. The bytes must not be changed before.
//
// It fails with ErrTooLarge and ErrNotFound, and then there is no verify.
func (s *Store) GetEarly(ctx context.Context, d format.VerityData, limit int64) (b []byte, verify func() error, err error) {
	if err := s.begin(); err != nil {
		return nil, nil, s.readError(d.Digest, err)
	}
	b, wait, err := s.getEarly(ctx, d, limit)
	if err != nil {
		s.end()
		return nil, nil, s.readError(d.Digest, err)
	}
	return b, func() error {
		defer s.end()
		if err := wait(); err != nil {
			return s.readError(d.Digest, err)
		}
		return nil
	}, nil
}

func (s *Store) getEarly(ctx context.Context, d format.VerityData, limit int64) (b []byte, wait func() error, err error) {
	fd, size, err := s.openFile(d.Digest)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(fd)
	if size > min(limit, math.MaxInt) {
		return nil, nil, fmt.Errorf("it has %d bytes, at most %d are read: %w", size, limit, ErrTooLarge)
	}
	b = make([]byte, size)
	// Room for all of them: reading is not to wait for hashing.
	pieces := make(chan []byte, size/streamSize+1)
	hashed := make(chan error, 1)
	go func() { hashed <- hashPieces(ctx, d, b, pieces) }()
	wait = func() error { return <-hashed }
	_, err = readPieces(ctx, fd, b, func(piece []byte) { pieces <- piece })
	if err != nil {
		close(pieces)
		_ = wait() // of no use any more
		return nil, nil, err
	}
	// It may have shrunk: the digest will differ.
	close(pieces)
	return b, wait, nil
}

// hashPieces checks the pieces of b that it is sent, which follow each other, against d.
func hashPieces(ctx context.Context, d format.VerityData, b []byte, pieces <-chan []byte) error {
	h := sha256.New()
	byVerity := d.Verity != verity.Digest{} && verity.Fast()
	n := 0
	var err error
	for piece := range pieces {
		n += len(piece)
		if err == nil {
			err = ctx.Err()
		}
		if err == nil && !byVerity {
			h.Write(piece)
		}
	}
	if err != nil {
		return err
	}
	if byVerity {
		if n == len(b) && verity.Sum(b) == d.Verity {
			return nil
		}
		h.Write(b[:n])
	}
	if got := format.Digest(h.Sum(nil)); got != d.Digest {
		return mismatch(got)
	}
	return nil
}
