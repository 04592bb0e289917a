package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"golang.org/x/sys/unix"
)

// streamSize is the size of the pieces in which content that need not be in memory as a
// whole is read and hashed, in bytes: it stays in a core's cache in between.
const streamSize = 256 << 10

// Put stores data under the digest d, which must be its SHA-256 as the caller computed it;
// the zero digest means that Put computes it. A good blob that is there is left as it is, a
// torn one is replaced. The blob is durable after the next Sync or Tag. data is not kept.
//
// It fails with ErrReadOnly for LayoutPrivate, and leaves nothing behind when it fails.
func (s *Store) Put(data []byte, d format.Digest) error {
	_, err := s.PutNew(data, d)
	return err
}

// PutNew is Put, and reports whether the layout did not have the blob, or had a torn one. Of several that
// put a blob at the same time one is told that it was not there, but each that replaces a torn one.
func (s *Store) PutNew(data []byte, d format.Digest) (added bool, err error) {
	if d.IsZero() {
		d = format.DigestOf(data)
	}
	if added, err = s.put(data, d); err != nil {
		return false, fmt.Errorf("put blob %s into layout %s: %w", d, s.dir, explain(err))
	}
	return added, nil
}

func (s *Store) put(data []byte, d format.Digest) (added bool, err error) {
	if err := s.beginWrite(); err != nil {
		return false, err
	}
	defer s.end()
	name := d.Hex()
	if found, same, err := s.holds(name, data); err != nil || found && same {
		return false, err
	}
	tmp, err := s.newTemp(s.blobs)
	if err != nil {
		return false, err
	}
	defer tmp.discard()
	if err := writeAll(tmp.fd, data); err != nil {
		return false, err
	}
	startWriteback(tmp.fd)
	return s.publish(tmp, d, func() (bool, error) {
		_, same, err := s.holds(name, data)
		if err == nil && !same && format.DigestOf(data) != d {
			// Differing from what is there proves nothing then.
			return false, fmt.Errorf("the data to store is not what the digest names: %w", ErrDigestMismatch)
		}
		return same, err
	})
}

// publish gives tmp, which is written, the name of the blob d. same says whether the blob
// that stands there already is good; a bad one is replaced. It reports whether tmp is the blob now.
func (s *Store) publish(tmp *tempFile, d format.Digest, same func() (bool, error)) (bool, error) {
	if err := s.at(StepBlobWritten); err != nil {
		return false, err
	}
	name := d.Hex()
	err := tmp.link(s.blobs, name)
	if errors.Is(err, unix.EEXIST) {
		good, err := same()
		if err != nil || good {
			return false, err
		}
		if err := tmp.giveName(); err != nil {
			return false, err
		}
		if err := s.at(StepBlobNamed); err != nil {
			return false, err
		}
		if err := tmp.rename(s.blobs, name); err != nil {
			return false, fmt.Errorf("replace the damaged %s: %w", s.blobPath(d), err)
		}
	} else if err != nil {
		return false, err
	}
	return true, s.at(StepBlobLinked)
}

// holds says whether there is something with the name of a blob, and whether it is a
// regular file that holds data. A file that cannot be read holds nothing.
func (s *Store) holds(name string, data []byte) (found, same bool, err error) {
	fd, size, err := openRegular(s.blobs, name)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, false, nil
	case errors.As(err, new(errIrregular)):
		return true, false, nil
	case err != nil:
		return false, false, err
	}
	defer unix.Close(fd)
	if size != int64(len(data)) {
		return true, false, nil
	}
	buf := s.stream.get()
	defer s.stream.put(buf)
	for off := 0; off < len(data); {
		piece := data[off:min(off+streamSize, len(data))]
		n, err := preadFull(fd, buf[:len(piece)], int64(off))
		if errors.Is(err, unix.EIO) {
			return true, false, nil
		}
		if err != nil {
			return true, false, err
		}
		if !bytes.Equal(buf[:n], piece) {
			return true, false, nil
		}
		off += n
	}
	return true, true, nil
}

// PutReader stores what r yields until io.EOF under the digest d, hashing it on the way.
// size is its length in bytes, or negative if that is not known. Memory use is constant.
// A good blob that is there is left as it is, but r is read all the same.
//
// It fails with ErrDigestMismatch where r yields something else, and with r's error wrapped
// where it fails; nothing is left behind then. ctx is checked between reads; r itself must
// return when ctx ends.
func (s *Store) PutReader(ctx context.Context, d format.Digest, size int64, r io.Reader) error {
	if err := s.putReader(ctx, d, size, r); err != nil {
		return fmt.Errorf("put blob %s into layout %s: %w", d, s.dir, explain(err))
	}
	return nil
}

func (s *Store) putReader(ctx context.Context, d format.Digest, size int64, r io.Reader) error {
	if d.IsZero() {
		return errors.New("the digest is missing")
	}
	if err := s.beginWrite(); err != nil {
		return err
	}
	defer s.end()
	tmp, err := s.newTemp(s.blobs)
	if err != nil {
		return err
	}
	defer tmp.discard()
	if err := s.receive(ctx, tmp, d, size, r); err != nil {
		return err
	}
	_, err = s.publish(tmp, d, func() (bool, error) {
		err := s.verify(ctx, d)
		if errors.Is(err, ErrDigestMismatch) || errors.Is(err, unix.EIO) || errors.Is(err, unix.ENOENT) {
			return false, nil // damaged, or removed meanwhile
		}
		return err == nil, err
	})
	return err
}

// receive writes what r yields to tmp and checks it.
func (s *Store) receive(ctx context.Context, tmp *tempFile, d format.Digest, size int64, r io.Reader) error {
	buf := s.stream.get()
	defer s.stream.put(buf)
	h := sha256.New()
	var total int64
	for {
		n, rerr := fill(ctx, r, buf[:])
		total += int64(n)
		if size >= 0 && total > size {
			return fmt.Errorf("the source yields more than the %d bytes that were announced: %w", size, ErrDigestMismatch)
		}
		h.Write(buf[:n])
		if err := writeAll(tmp.fd, buf[:n]); err != nil {
			return err
		}
		if rerr == io.EOF { //nolint:errorlint // an error that wraps io.EOF is a failure, not the end
			break
		}
		if rerr != nil {
			return fmt.Errorf("read its source after %d bytes: %w", total, rerr)
		}
	}
	if size >= 0 && total != size {
		return fmt.Errorf("the source yields %d bytes, %d were announced: %w", total, size, ErrDigestMismatch)
	}
	if got := format.Digest(h.Sum(nil)); got != d {
		return fmt.Errorf("the source yields %s in %d bytes: %w", got, total, ErrDigestMismatch)
	}
	return nil
}

// fill reads until buf is full or r returns an error. Unlike io.ReadFull it returns r's own
// error, so that a source that ends with io.ErrUnexpectedEOF is told from one that ends.
func fill(ctx context.Context, r io.Reader, buf []byte) (int, error) {
	const mostEmptyReads = 100
	n, empty := 0, 0
	for n < len(buf) {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		m, err := r.Read(buf[n:])
		n += m
		if err != nil {
			return n, err
		}
		if m > 0 {
			empty = 0
		} else if empty++; empty == mostEmptyReads {
			return n, io.ErrNoProgress
		}
	}
	return n, nil
}

// Remove deletes the blob d, good or bad, so that it can be put again. Readers that have
// it open are not disturbed. It fails with ErrNotFound where there is none, and with
// ErrReadOnly for LayoutPrivate.
func (s *Store) Remove(d format.Digest) error {
	err := s.beginWrite()
	if err == nil {
		defer s.end()
		err = retry(func() error { return unix.Unlinkat(s.blobs, d.Hex(), 0) })
		if errors.Is(err, unix.EISDIR) {
			err = retry(func() error { return unix.Unlinkat(s.blobs, d.Hex(), unix.AT_REMOVEDIR) })
		}
		if errors.Is(err, unix.ENOENT) {
			err = ErrNotFound
		}
	}
	if err != nil {
		return fmt.Errorf("remove blob %s from layout %s: %w", d, s.dir, explain(err))
	}
	return nil
}

// RemoveCorrupt reads the blob d and removes it if it is not what d names, so that it can be put
// again. It reports whether it was so. Where somebody removed or replaced what was read in the
// meantime, it was not, and what is there now stays. It fails with ErrNotFound, and with
// ErrReadOnly for LayoutPrivate.
func (s *Store) RemoveCorrupt(ctx context.Context, d format.Digest) (corrupt bool, err error) {
	if err := s.beginWrite(); err != nil {
		return false, fmt.Errorf("remove blob %s from layout %s: %w", d, s.dir, err)
	}
	defer s.end()
	fd, size, err := s.openFile(d)
	if errors.Is(err, ErrDigestMismatch) { // no regular file
		return true, s.Remove(d)
	}
	if err != nil {
		return false, s.readError(d, err)
	}
	defer unix.Close(fd)
	err = s.hashFile(ctx, fd, size, d, nil)
	if bad := errors.Is(err, ErrDigestMismatch) || errors.Is(err, unix.EIO) && s.sealed(d); !bad {
		if err != nil {
			err = s.readError(d, err)
		}
		return false, err
	}
	// To read a large blob takes long enough for a pull to put a good one there.
	var read, there unix.Stat_t
	err = retry(func() error { return unix.Fstat(fd, &read) })
	if err == nil {
		err = retry(func() error { return unix.Fstatat(s.blobs, d.Hex(), &there, unix.AT_SYMLINK_NOFOLLOW) })
	}
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, s.readError(d, err)
	case read.Ino != there.Ino:
		return false, nil
	}
	return true, s.Remove(d)
}
