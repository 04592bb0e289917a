package builder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

const (
	// spoolBuffer is how much content is written to the spool at once, in bytes.
	spoolBuffer = 1 << 20
	// spoolBlock is the unit in which zeros are left out, in bytes.
	spoolBlock = 64 << 10
	// maxContent bounds the content of all files of an archive, in bytes. A manifest that can
	// be read lists 1.3 million chunks, the largest of which have 16 MiB.
	maxContent = 20 << 40
)

// spool keeps the content of files from archives, one after another, in a file without a
// name. Zeros become holes.
type spool struct {
	ctx context.Context
	f   *os.File
	buf []byte
	off int64 // of buf in the file
}

// newSpool makes a spool in a directory.
func newSpool(ctx context.Context, dir string) (*spool, error) {
	if dir == "" {
		dir = os.TempDir()
	}
	f, err := unnamedFile(dir)
	if err != nil {
		return nil, fmt.Errorf("make a temporary file for the content of the archive: %w: choose a work directory that is writable", err)
	}
	return &spool{ctx: ctx, f: f, buf: make([]byte, 0, spoolBuffer)}, nil
}

// unnamedFile opens a file in dir that vanishes when it is closed, however the process ends.
func unnamedFile(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), dir), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	f, err := os.CreateTemp(dir, "csi-puzzlefs-build-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// add copies a file of size bytes to the spool and returns where it begins.
func (s *spool) add(r io.Reader, size int64) (off int64, err error) {
	off = s.off + int64(len(s.buf))
	if size > maxContent-off {
		return 0, fmt.Errorf("with its %d bytes there are more than the %d that an image can hold: %w", size, int64(maxContent), format.ErrTooLarge)
	}
	for left := size; left > 0; {
		if err := s.ctx.Err(); err != nil {
			return 0, err
		}
		n := len(s.buf)
		m, err := io.ReadFull(r, s.buf[n:min(int64(cap(s.buf)), int64(n)+left)])
		if err != nil {
			return 0, noEOF(err)
		}
		s.buf = s.buf[:n+m]
		left -= int64(m)
		if len(s.buf) == cap(s.buf) {
			if err := s.flush(); err != nil {
				return 0, err
			}
		}
	}
	return off, nil
}

// noEOF returns err, but io.ErrUnexpectedEOF for an end where there should be none.
func noEOF(err error) error {
	if err == io.EOF { //nolint:errorlint // an error that wraps io.EOF says more
		return io.ErrUnexpectedEOF
	}
	return err
}

// flush writes what is buffered.
func (s *spool) flush() error {
	var zeros [spoolBlock]byte
	for b := s.buf; len(b) > 0; {
		block := b[:min(len(b), spoolBlock)]
		b = b[len(block):]
		if !bytes.Equal(block, zeros[:len(block)]) {
			if _, err := s.f.WriteAt(block, s.off); err != nil {
				return s.explain(err)
			}
		}
		s.off += int64(len(block))
	}
	s.buf = s.buf[:0]
	return nil
}

// finish makes readable what was added, and frees the buffer.
func (s *spool) finish() error {
	if err := s.flush(); err != nil {
		return err
	}
	s.buf = nil
	if err := s.f.Truncate(s.off); err != nil { // for zeros at the end
		return s.explain(err)
	}
	return nil
}

func (s *spool) explain(err error) error {
	err = fmt.Errorf("keep the content of the archive in a temporary file: %w", err)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG) {
		err = fmt.Errorf("%w: choose a work directory with room for all files of the archive", err)
	}
	return err
}

// drop gives the space of content back that is not needed any more. It is best effort: not
// all file systems can.
func (s *spool) drop(off, size int64) {
	_ = unix.Fallocate(int(s.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, size)
}

// open returns a reader of content. Any number may be open at a time.
func (s *spool) open(off, size int64) io.ReadCloser {
	return io.NopCloser(io.NewSectionReader(s.f, off, size))
}

func (s *spool) close() error { return s.f.Close() }
