package store

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// GetEarly is Get for who has something to do with the bytes of a blob that can be thrown away: it returns
// them when they are read, while they are still being hashed on another CPU. Nothing that was made of them
// may be believed before verify has returned nil. verify has to be called, once: it waits until the
// bytes are hashed, and fails with ErrDigestMismatch or with ctx's error. The bytes must not be changed before.
//
// It fails with ErrTooLarge and ErrNotFound, and then there is no verify.
func (s *Store) GetEarly(ctx context.Context, d format.Digest, limit int64) (b []byte, verify func() error, err error) {
	if err := s.begin(); err != nil {
		return nil, nil, s.readError(d, err)
	}
	b, wait, err := s.getEarly(ctx, d, limit)
	if err != nil {
		s.end()
		return nil, nil, s.readError(d, err)
	}
	return b, func() error {
		defer s.end()
		if err := wait(); err != nil {
			return s.readError(d, err)
		}
		return nil
	}, nil
}

func (s *Store) getEarly(ctx context.Context, d format.Digest, limit int64) (b []byte, wait func() error, err error) {
	fd, size, err := s.openFile(d)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(fd)
	if size > min(limit, math.MaxInt) {
		return nil, nil, fmt.Errorf("it has %d bytes, at most %d are read: %w", size, limit, ErrTooLarge)
	}
	b = make([]byte, size)
	h := startHasher(ctx, int(size/streamSize)+1)
	for off := 0; ; {
		piece := b[off:min(off+streamSize, len(b))]
		n, err := preadFull(fd, piece, int64(off))
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			close(h.pieces)
			_ = h.wait(d) // what was read so far is of no use
			return nil, nil, err
		}
		h.pieces <- piece[:n]
		off += n
		if n < len(piece) || off == len(b) {
			break // it may have shrunk: the digest will differ
		}
	}
	close(h.pieces)
	return b, func() error { return h.wait(d) }, nil
}

// hasher hashes pieces on another CPU.
type hasher struct {
	pieces chan []byte // to hash, closed by who sends them
	sum    chan format.Digest
	err    error // ctx's, if that is why there is no digest
}

// startHasher starts one. Sending so many pieces does not block.
func startHasher(ctx context.Context, pieces int) *hasher {
	h := &hasher{pieces: make(chan []byte, pieces), sum: make(chan format.Digest, 1)}
	go func() {
		sum := sha256.New()
		for piece := range h.pieces {
			if h.err == nil {
				h.err = ctx.Err()
			}
			if h.err == nil {
				sum.Write(piece)
			}
		}
		h.sum <- format.Digest(sum.Sum(nil))
	}()
	return h
}

// wait waits for the end of the goroutine, and checks what was hashed against d.
func (h *hasher) wait(d format.Digest) error {
	got := <-h.sum
	switch {
	case h.err != nil:
		return h.err
	case got != d:
		return mismatch(got)
	}
	return nil
}
