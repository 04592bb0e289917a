package store

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// System calls relative to a directory descriptor. The os package would do, but costs a
// system call or two more for each file, and builders make hundreds of thousands of files.

// retry repeats a system call that a signal interrupted: the Go runtime sends signals to
// itself, and network file systems let them through.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// openat opens name relative to the directory dir. The descriptor is closed on exec.
func openat(dir int, name string, flags int, mode uint32) (fd int, err error) {
	err = retry(func() error {
		fd, err = unix.Openat(dir, name, flags|unix.O_CLOEXEC, mode)
		return err
	})
	return fd, err
}

// openRegular opens name for reading if it is a regular file. A symlink is not followed, a
// fifo not waited for. Anything else that stands there gives errIrregular.
func openRegular(dir int, name string) (fd int, size int64, err error) {
	fd, err = openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case err == nil:
	case errors.Is(err, unix.ELOOP):
		return -1, 0, errIrregular{"a symbolic link"}
	case errors.Is(err, unix.ENXIO):
		return -1, 0, errIrregular{"a socket or device"}
	default:
		return -1, 0, err
	}
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(fd, &st) }); err != nil {
		_ = unix.Close(fd)
		return -1, 0, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return fd, st.Size, nil
	case unix.S_IFDIR:
		err = errIrregular{"a directory"}
	default:
		err = errIrregular{"a fifo or device"}
	}
	_ = unix.Close(fd)
	return -1, 0, err
}

// errIrregular says what was found where a regular file was wanted.
type errIrregular struct{ kind string }

func (e errIrregular) Error() string { return "it is " + e.kind + ", not a regular file" }

// writeAll writes all of b at the descriptor's position.
func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return io.ErrShortWrite
		}
		b = b[n:]
	}
	return nil
}

// preadFull reads len(b) bytes at off, fewer only where the file ends.
func preadFull(fd int, b []byte, off int64) (int, error) {
	n := 0
	for n < len(b) {
		m, err := unix.Pread(fd, b[n:], off+int64(n))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return n, err
		case m == 0:
			return n, nil
		}
		n += m
	}
	return n, nil
}

// readSmall reads the regular file name of at most limit bytes.
func readSmall(dir int, name string, limit int64) ([]byte, error) {
	fd, size, err := openRegular(dir, name)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if size > limit {
		return nil, fmt.Errorf("%d bytes, at most %d are read: %w", size, limit, ErrTooLarge)
	}
	b := make([]byte, size)
	n, err := preadFull(fd, b, 0)
	return b[:n], err
}

// openDirAgain opens the directory of a descriptor once more, with a position of its own.
func openDirAgain(dir int, name string) (*os.File, error) {
	fd, err := openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// bufferPool lends buffers of type T. The garbage collector empties it.
type bufferPool[T any] struct{ pool sync.Pool }

func (p *bufferPool[T]) get() *T {
	if b, ok := p.pool.Get().(*T); ok {
		return b
	}
	return new(T)
}

func (p *bufferPool[T]) put(b *T) { p.pool.Put(b) }

// startWriteback asks the kernel to begin writing a file to the disk, without waiting, so
// that the disk works while the next blobs are computed and Sync finds little left to do.
// It is a hint: what goes wrong is reported by Sync.
func startWriteback(fd int) { _ = unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE) }
