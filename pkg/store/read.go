package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"os"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"golang.org/x/sys/unix"
)

// wholeBlobMax is the size of the largest blob, in bytes, that ReadBlobAt reads and hashes
// as a whole each time. Larger ones are hashed once and then checked by blocks.
const wholeBlobMax = 1 << 20

// Size returns the length of the blob d in bytes, without reading it. It fails with
// ErrNotFound, and with ErrDigestMismatch where no regular file has its name.
func (s *Store) Size(d format.Digest) (int64, error) {
	if err := s.begin(); err != nil {
		return 0, s.readError(d, err)
	}
	defer s.end()
	size, err := s.size(d)
	if err != nil {
		return 0, s.readError(d, err)
	}
	return size, nil
}

func (s *Store) size(d format.Digest) (int64, error) {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstatat(s.blobs, d.Hex(), &st, unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
		return 0, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, irregularBlob(errIrregular{"something else"})
	}
	return st.Size, nil
}

// Get returns the bytes of the blob d, checked against d. The caller owns them. It fails
// with ErrTooLarge, without reading, if there are more than limit bytes, with ErrNotFound
// and with ErrDigestMismatch.
func (s *Store) Get(ctx context.Context, d format.Digest, limit int64) ([]byte, error) {
	if err := s.begin(); err != nil {
		return nil, s.readError(d, err)
	}
	defer s.end()
	b, err := s.get(ctx, d, limit)
	if err != nil {
		return nil, s.readError(d, err)
	}
	return b, nil
}

func (s *Store) get(ctx context.Context, d format.Digest, limit int64) ([]byte, error) {
	fd, size, err := s.openFile(d)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if size > min(limit, math.MaxInt) {
		return nil, fmt.Errorf("it has %d bytes, at most %d are read: %w", size, limit, ErrTooLarge)
	}
	b := make([]byte, size)
	if err := s.readWhole(ctx, fd, d, b); err != nil {
		return nil, err
	}
	return b, nil
}

// readWhole reads a blob of len(b) bytes into b and checks it. b is cleared on an error.
func (s *Store) readWhole(ctx context.Context, fd int, d format.Digest, b []byte) error {
	h := sha256.New()
	_, err := readPieces(ctx, fd, b, func(piece []byte) { h.Write(piece) })
	if err == nil {
		if got := format.Digest(h.Sum(nil)); got != d {
			err = mismatch(got)
		}
	}
	if err != nil {
		clear(b)
	}
	return err
}

// readPieces fills b from a file, and hands on what it read piece by piece. It returns how much that is, less
// than b has only where the file ends.
func readPieces(ctx context.Context, fd int, b []byte, hand func([]byte)) (int, error) {
	for off := 0; ; {
		if ctx.Err() != nil {
			return off, ctx.Err()
		}
		piece := b[off:min(off+streamSize, len(b))]
		n, err := preadFull(fd, piece, int64(off))
		if err != nil {
			return off, err
		}
		hand(piece[:n])
		off += n
		if n < len(piece) || off == len(b) {
			return off, nil
		}
	}
}

// mismatch is the cause that readError explains.
func mismatch(got format.Digest) error {
	return fmt.Errorf("it holds %s: %w", got, ErrDigestMismatch)
}

// ReadBlobAt reads stored bytes of the blob d into p, beginning off bytes into the blob,
// with the semantics of io.ReaderAt: fewer than len(p) bytes only together with an error,
// io.EOF where the blob ends. Every byte is checked against d before it is returned, and so
// is the blob's end; after an error the rest of p is zero.
//
// A blob of up to 1 MiB is read and hashed as a whole at each call. The first read of a
// larger one hashes it all; later ones check the blocks that they touch.
//
// It fails with ErrNotFound and ErrDigestMismatch.
func (s *Store) ReadBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read blob %s: negative offset %d", d, off)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.begin(); err != nil {
		return 0, s.readError(d, err)
	}
	defer s.end()
	n, err := s.readBlobAt(ctx, d, p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		clear(p[n:])
		return n, s.readError(d, err)
	}
	return n, err
}

func (s *Store) readBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error) {
	fd, size, err := s.openFile(d)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if size > wholeBlobMax {
		return s.readLargeAt(ctx, fd, size, d, p, off)
	}
	if off == 0 && size <= int64(len(p)) {
		if err := s.readWhole(ctx, fd, d, p[:size]); err != nil {
			return 0, err
		}
		return atEnd(int(size), len(p))
	}
	buf := s.small.get()
	defer s.small.put(buf)
	if err := s.readWhole(ctx, fd, d, buf[:size]); err != nil {
		return 0, err
	}
	return atEnd(copy(p, buf[min(off, size):size]), len(p))
}

// atEnd returns n, and io.EOF where fewer bytes were read than wanted.
func atEnd(n, want int) (int, error) {
	if n < want {
		return n, io.EOF
	}
	return n, nil
}

// Verify reads the blob d and checks it, with constant memory. It fails with ErrNotFound
// and ErrDigestMismatch.
func (s *Store) Verify(ctx context.Context, d format.Digest) error {
	if err := s.begin(); err != nil {
		return s.readError(d, err)
	}
	defer s.end()
	if err := s.verify(ctx, d); err != nil {
		return s.readError(d, err)
	}
	return nil
}

func (s *Store) verify(ctx context.Context, d format.Digest) error {
	fd, size, err := s.openFile(d)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return s.hashFile(ctx, fd, size, d, nil)
}

// hashFile reads the size bytes of a blob and checks them against d. block, if not nil, gets
// the bytes in pieces of streamSize, all but the last full.
func (s *Store) hashFile(ctx context.Context, fd int, size int64, d format.Digest, block func([]byte)) error {
	buf := s.stream.get()
	defer s.stream.put(buf)
	h := sha256.New()
	for off := int64(0); off < size; {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		n, err := preadFull(fd, buf[:min(streamSize, size-off)], off)
		if err != nil {
			return err
		}
		if n == 0 {
			break // it shrank: the digest will differ
		}
		h.Write(buf[:n])
		if block != nil {
			block(buf[:n])
		}
		off += int64(n)
	}
	if got := format.Digest(h.Sum(nil)); got != d {
		return mismatch(got)
	}
	return nil
}

// openFile opens the file of the blob d. It fails with ENOENT, and with ErrDigestMismatch
// where something stands there that is no regular file.
func (s *Store) openFile(d format.Digest) (fd int, size int64, err error) {
	fd, size, err = openRegular(s.blobs, d.Hex())
	if errors.As(err, new(errIrregular)) {
		err = irregularBlob(err)
	}
	return fd, size, err
}

func irregularBlob(err error) error { return fmt.Errorf("%w: %w", err, ErrDigestMismatch) }

// OpenBlob opens the file of the blob d for reading, unverified, for fs-verity's system
// calls. The caller closes it. It fails with ErrNotFound.
func (s *Store) OpenBlob(d format.Digest) (*os.File, error) {
	if err := s.begin(); err != nil {
		return nil, s.readError(d, err)
	}
	defer s.end()
	fd, _, err := s.openFile(d)
	if err != nil {
		return nil, s.readError(d, err)
	}
	return os.NewFile(uintptr(fd), s.blobPath(d)), nil
}

// readError wraps what went wrong when blob d was read.
func (s *Store) readError(d format.Digest, err error) error {
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("read blob %s: layout %s does not have it: %w", d, s.dir, ErrNotFound)
	}
	if errors.Is(err, unix.EIO) && s.sealed(d) {
		err = fmt.Errorf("%w: %w", errSeal, err)
	}
	if errors.Is(err, ErrDigestMismatch) {
		return fmt.Errorf("read blob %s: %s is damaged; remove it, then build or pull the image again: %w", d, s.blobPath(d), err)
	}
	return fmt.Errorf("read blob %s in layout %s: %w", d, s.dir, explain(err))
}

// Blobs yields the digests of all blobs, in no order, good or bad; files with other names
// are passed over. Blobs that come or go meanwhile may or may not be among them. An error
// ends it.
func (s *Store) Blobs() iter.Seq2[format.Digest, error] {
	return func(yield func(format.Digest, error) bool) {
		fail := func(err error) {
			yield(format.Digest{}, fmt.Errorf("list blobs of layout %s: %w", s.dir, explain(err)))
		}
		if err := s.begin(); err != nil {
			fail(err)
			return
		}
		defer s.end()
		dir, err := openDirAgain(s.blobs, s.dir)
		if err != nil {
			fail(err)
			return
		}
		defer dir.Close()
		for {
			const batch = 1024
			names, err := dir.Readdirnames(batch)
			for _, name := range names {
				if d, err := format.ParseHex(name); err == nil && !yield(d, nil) {
					return
				}
			}
			if err == io.EOF {
				return
			}
			if err != nil {
				fail(err)
				return
			}
		}
	}
}
