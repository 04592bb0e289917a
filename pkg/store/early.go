package store

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// GetEarly is Get for who has something to do with the bytes of the blob d.Digest that can be thrown away: it
// returns them when they are read, while they are still being hashed on another CPU, by d.Verity as ReadWhole
// does where that is faster. Nothing that was made of them may be believed before verify has returned nil.
// verify has to be called: it waits until the bytes are hashed, and fails with ErrDigestMismatch or with ctx's
// error, each time that it is called. The bytes must not be changed before.
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
	return b, sync.OnceValue(func() error {
		defer s.end()
		if err := wait(); err != nil {
			return s.readError(d.Digest, err)
		}
		return nil
	}), nil
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
	half := len(b) / 2 / streamSize * streamSize
	// The kernel copies for a third of the time that hashing takes: the other CPU helps before it hashes.
	helped, first, hashed := make(chan error, 1), make(chan int, 1), make(chan error, 1)
	go func() {
		n, err := readPieces(ctx, fd, b[half:], half)
		helped <- err
		before, ok := <-first
		if before == half { // or the blob has shrunk
			before += n
		}
		if ok {
			hashed <- hashEarly(ctx, d, b, before)
		}
		close(hashed)
	}()
	n, err := readPieces(ctx, fd, b[:half], 0)
	if failed := <-helped; err == nil {
		err = failed
	}
	if err != nil {
		close(first)
		for range hashed { // until the goroutine is done
		}
		return nil, nil, err
	}
	first <- n
	return b, func() error { return <-hashed }, nil
}

// readPieces fills b from the offset off on, and returns how much there was.
func readPieces(ctx context.Context, fd int, b []byte, off int) (int, error) {
	done := 0
	for done < len(b) {
		if ctx.Err() != nil {
			return done, ctx.Err()
		}
		piece := b[done:min(done+streamSize, len(b))]
		n, err := preadFull(fd, piece, int64(off+done))
		if done += n; err != nil || n < len(piece) {
			return done, err
		}
	}
	return done, nil
}

// hashEarly checks b, of which n bytes were read, against d.
func hashEarly(ctx context.Context, d format.VerityData, b []byte, n int) error {
	if n == len(b) && d.Verity != (verity.Digest{}) && verity.Fast() && verity.Sum(b) == d.Verity {
		return nil
	}
	h := sha256.New()
	for off := 0; off < n; off += streamSize {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		h.Write(b[off:min(off+streamSize, n)])
	}
	if got := format.Digest(h.Sum(nil)); got != d.Digest {
		return mismatch(got)
	}
	return nil
}
