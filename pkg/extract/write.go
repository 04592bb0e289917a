package extract

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// job is a file to be filled.
type job struct {
	place
	f     *os.File // nil: it is not there yet, or something is; its name is not the path
	attr  image.Attr
	first *firstName // nil for files with one name
}

// bufferSize is how much of a file is read at once, in bytes.
const bufferSize = 256 << 10

// file hands a regular file to the workers. In directories of its own the extraction makes it
// at once; where something may be there a worker looks.
func (x *extractor) file(at place, attr image.Attr, first *firstName) error {
	j := job{place: at, attr: attr, first: first}
	if x.cfg.Force {
		if first != nil {
			first.done = make(chan struct{})
		}
	} else {
		fd, err := unix.Openat(int(at.parent.f.Fd()), at.name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return at.error("create", err)
		}
		j.f = os.NewFile(uintptr(fd), at.name)
		if first != nil {
			if first.id, err = identify(fd); err != nil {
				return errors.Join(at.error("create", err), j.f.Close())
			}
		}
	}
	at.parent.users.Add(1)
	select {
	case x.jobs <- j:
		return nil
	case <-x.ctx.Done():
		err := x.ctx.Err()
		if j.f != nil {
			err = errors.Join(err, j.f.Close())
		}
		return errors.Join(err, x.release(at.parent, false))
	}
}

// work is a worker.
func (x *extractor) work() error {
	buf := make([]byte, bufferSize)
	for j := range x.jobs {
		err := x.ctx.Err()
		switch {
		case err != nil:
		case j.f == nil:
			err = x.restoreFile(j, buf)
		default:
			if err = x.content(j, j.f, buf); err == nil {
				err = x.attributes(int(j.f.Fd()), j.place, j.attr, false)
			}
		}
		if j.f != nil {
			err = errors.Join(err, j.f.Close())
		}
		if err == nil {
			x.files.Add(1)
			x.bytes.Add(int64(j.attr.Size))
		}
		if err := errors.Join(err, x.release(j.parent, err == nil)); err != nil {
			return err
		}
	}
	return nil
}

// content writes a file's content.
func (x *extractor) content(j job, f *os.File, buf []byte) error {
	return x.read(j, buf, func(b []byte, _ int64) (bool, error) {
		if _, err := f.Write(b); err != nil {
			return false, j.error("write", err)
		}
		return true, nil
	})
}

// read calls fn with a file's content from the image, piece by piece, until fn returns false.
func (x *extractor) read(j job, buf []byte, fn func(b []byte, off int64) (bool, error)) error {
	for off := int64(0); ; {
		n, err := x.cfg.Image.ReadAt(x.ctx, j.attr.Ino, buf, off)
		if n > 0 {
			more, err := fn(buf[:n], off)
			if err != nil || !more {
				return err
			}
			off += int64(n)
			if x.cfg.Progress != nil {
				x.cfg.Progress(x.progress.Add(int64(n)))
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", j.place, err)
		}
	}
}

// restoreFile sees to it that a file is there with its content and attributes.
func (x *extractor) restoreFile(j job, buf []byte) error {
	old, err := x.look(j.place)
	if err != nil {
		return err
	}
	var id identity
	reused := false
	if old != nil {
		reused, err = x.reuse(j, old, buf)
		if reused && err == nil && j.first != nil {
			// Only now: on an overlay a file may become another when it is changed.
			id, err = identify(old.fd)
		}
	}
	if err == nil && !reused {
		id, err = x.writeFile(j, old, buf)
	}
	if old != nil {
		err = errors.Join(err, old.close())
	}
	if err != nil {
		return err
	}
	if reused {
		x.reusedFiles.Add(1)
		x.reusedBytes.Add(int64(j.attr.Size))
	}
	if j.first != nil {
		j.first.id = id
		close(j.first.done)
	}
	return nil
}

// reuse keeps the file that is there if its content is right and nobody else has a way to
// change it, and corrects its attributes.
func (x *extractor) reuse(j job, old *existing, buf []byte) (bool, error) {
	if old.kind() != unix.S_IFREG || old.st.Size != j.attr.Size || uint64(old.st.Nlink) != x.names(old, j.attr) {
		return false, nil
	}
	right, err := x.hasAttributes(old, j.place, j.attr)
	if err != nil {
		return false, err
	}
	if !right {
		// Whoever could write to it until now may have it open, and would write to a file
		// that is to be another user's, or to have privileges.
		others := old.st.Uid != uint32(os.Geteuid()) || old.perm()&0o022 != 0
		privileged, err := x.privileged(j.attr)
		if err != nil || others || privileged {
			return false, err
		}
	}
	f, err := x.openExisting(j.place, old)
	if err != nil {
		return false, err
	}
	same, err := x.compare(j, f, buf)
	err = errors.Join(err, f.Close())
	if err != nil || !same {
		return false, err
	}
	if err := x.at(StepFileReused); err != nil || right {
		return right, err
	}
	err = x.attributes(old.fd, j.place, j.attr, true)
	return true, old.explain(err)
}

// openExisting opens a file that is there for reading.
func (x *extractor) openExisting(at place, old *existing) (*os.File, error) {
	open := func() (int, error) { return unix.Open(old.path(), unix.O_RDONLY|unix.O_CLOEXEC, 0) }
	fd, err := open()
	if errors.Is(err, unix.EACCES) && old.st.Uid == uint32(os.Geteuid()) {
		// Its owner may read it for the asking.
		if err := unix.Chmod(old.path(), uint32(old.perm()|0o400)); err != nil {
			return nil, at.error("chmod", old.explain(err))
		}
		fd, err = open()
	}
	if err != nil {
		return nil, at.error("open", err)
	}
	return os.NewFile(uintptr(fd), at.name), nil
}

// compare reports whether a file has the content that it has in the image.
func (x *extractor) compare(j job, f *os.File, buf []byte) (bool, error) {
	same := true
	there := make([]byte, min(uint64(len(buf)), j.attr.Size))
	err := x.read(j, buf, func(b []byte, off int64) (bool, error) {
		n, err := f.ReadAt(there[:len(b)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return false, j.error("read", err)
		}
		if same = bytes.Equal(there[:n], b); !same {
			x.progress.Add(-off) // it is written from its beginning
		}
		return same, nil
	})
	return same, err
}

// writeFile writes a file beside its name and then gives it that, in place of what is there.
func (x *extractor) writeFile(j job, old *existing, buf []byte) (id identity, err error) {
	f, temp, err := x.newFile(j.place)
	if err != nil {
		return id, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	err = x.content(j, f, buf)
	if err == nil {
		err = x.attributes(int(f.Fd()), j.place, j.attr, false)
	}
	if err == nil && j.first != nil {
		id, err = identify(int(f.Fd()))
	}
	if err == nil {
		err = x.at(StepFileWritten)
	}
	if temp == "" && err == nil {
		name := j.name
		if old != nil {
			temp = newTempName()
			name = temp
		}
		err = unix.Linkat(unix.AT_FDCWD, procPath(int(f.Fd())), int(j.parent.f.Fd()), name, unix.AT_SYMLINK_FOLLOW)
		if err != nil {
			return id, j.error("link", err)
		}
	}
	if temp == "" {
		return id, err
	}
	if err == nil {
		err = x.at(StepTempNamed)
	}
	return id, x.swap(j.place, temp, old, err)
}

// newFile makes a file without a name in at's directory or, where the file system has none, one
// with a temporary name.
func (x *extractor) newFile(at place) (f *os.File, temp string, err error) {
	dir := int(at.parent.f.Fd())
	if !x.noTemp.Load() {
		fd := -1
		err := x.at(StepFileTemp)
		if err == nil {
			fd, err = unix.Openat(dir, ".", unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		}
		if err == nil {
			return os.NewFile(uintptr(fd), at.name), "", nil
		}
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
			return nil, "", at.error("create", err)
		}
		x.noTemp.Store(true)
	}
	temp = newTempName()
	fd, err := unix.Openat(dir, temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, "", at.error("create", err)
	}
	return os.NewFile(uintptr(fd), at.name), temp, nil
}

// tempPrefix and as many random letters are the names of what is to replace something.
const (
	tempPrefix = ".puzzlefs-extract-"
	tempRandom = 26
)

func newTempName() string { return tempPrefix + rand.Text() }

// swap puts what has a temporary name in the place of what is there. Given an error, or if it
// fails, it removes it.
func (x *extractor) swap(at place, temp string, old *existing, err error) error {
	dir := int(at.parent.f.Fd())
	if err == nil && old != nil && old.kind() == unix.S_IFDIR {
		if err = unix.Unlinkat(dir, at.name, unix.AT_REMOVEDIR); err != nil {
			err = at.error("remove", old.explain(err))
		} else {
			err = x.at(StepCleared)
		}
	}
	if err == nil {
		if err = unix.Renameat(dir, temp, dir, at.name); err == nil {
			return x.at(StepReplaced)
		}
		err = at.error("replace", old.explain(err))
	}
	if err := unix.Unlinkat(dir, temp, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return errors.Join(err, at.error("remove "+temp+" beside", err))
	}
	return err
}
