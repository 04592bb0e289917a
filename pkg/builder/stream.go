package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// stream is the content of all files, one after another, as the chunker reads it. It
// remembers which file each byte belongs to until the chunk with that byte is cut. A
// goroutine of the chunker may read while another asks that.
type stream struct {
	ctx    context.Context
	files  <-chan openFile
	cur    openFile // cur.f is nil between files
	left   int64    // bytes of cur not read yet
	memory *memory  // learns of the files; may be nil

	mu sync.Mutex // guards what follows
	// pending are the files whose content is not cut yet, in order.
	pending []extent
}

// extent is a file with the number of bytes that are still to be cut.
type extent struct {
	inode *format.Inode
	left  int64
}

// piece is a part of a chunk that belongs to one file.
type piece struct {
	inode  *format.Inode
	offset uint64 // in the chunk
	len    uint64
}

// Read implements io.Reader. It fails with ErrChanged if a file does not have the size
// that it had when it was opened.
func (s *stream) Read(p []byte) (int, error) {
	if s.cur.f == nil {
		select {
		case f, ok := <-s.files:
			if !ok {
				return 0, io.EOF
			}
			s.cur, s.left = f, f.size
			if s.memory != nil {
				s.memory.note(f.state, f.size, f.inode)
			}
			s.mu.Lock()
			s.pending = append(s.pending, extent{f.inode, f.size})
			s.mu.Unlock()
		case <-s.ctx.Done():
			return 0, s.ctx.Err()
		}
	}
	if s.left == 0 {
		return 0, s.next()
	}
	// One byte more than the file should have tells whether it grew.
	p = p[:min(int64(len(p)), s.left+1)]
	n, err := s.cur.f.Read(p)
	switch {
	case int64(n) > s.left:
		return 0, fmt.Errorf("read %s: longer than %d bytes: %w", s.cur.path(), s.cur.size, ErrChanged)
	case errors.Is(err, io.EOF):
		return 0, fmt.Errorf("read %s: %d bytes shorter than %d: %w", s.cur.path(), s.left, s.cur.size, ErrChanged)
	case err != nil:
		return n, err
	}
	if s.left -= int64(n); s.left == 0 && n < len(p) {
		// The byte more is not there.
		return n, s.close()
	}
	return n, nil
}

// next makes sure that the current file has ended, and closes it.
func (s *stream) next() error {
	var one [1]byte
	n, err := s.cur.f.Read(one[:])
	if n > 0 {
		return fmt.Errorf("read %s: longer than %d bytes: %w", s.cur.path(), s.cur.size, ErrChanged)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return s.close()
}

// close closes the current file.
func (s *stream) close() error {
	err := s.cur.f.Close()
	s.cur = openFile{}
	return err
}

// cut returns which files the next n bytes of the stream belong to.
func (s *stream) cut(n int) []piece {
	s.mu.Lock()
	defer s.mu.Unlock()
	var pieces []piece
	for offset := uint64(0); n > 0; {
		e := &s.pending[0]
		k := min(e.left, int64(n))
		pieces = append(pieces, piece{e.inode, offset, uint64(k)})
		offset += uint64(k)
		n -= int(k)
		if e.left -= k; e.left == 0 {
			s.pending = s.pending[1:]
		}
	}
	return pieces
}

// release releases what a stream that was not read to its end still holds. The walker and the
// chunker must have ended.
func (s *stream) release() error {
	var err error
	if s.cur.f != nil {
		err = s.close()
	}
	for f := range s.files {
		err = errors.Join(err, f.f.Close())
	}
	return err
}
