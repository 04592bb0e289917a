package builder

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// readAhead is how much of each file the kernel is asked to read ahead of the cutter, in
// bytes; from there on it reads ahead by itself.
const readAhead = 2 << 20

// hostDir is a directory of this host.
type hostDir struct {
	fd   int
	name string // its path
	dev  uint64 // the file system to stay on
	listing
	// ahead, if not nil, looks at what is below before the walker comes. The root owns it.
	ahead *lookAhead
	root  bool
}

var _ directory = (*hostDir)(nil)

// openRoot opens the directory to build from, at a path. The root itself may be a symlink. dir
// is what to call it.
func openRoot(path, dir string) (*hostDir, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(&os.PathError{Op: "stat", Path: dir, Err: err}, unix.Close(fd))
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, errors.Join(fmt.Errorf("%s is not a directory", dir), unix.Close(fd))
	}
	return &hostDir{fd: fd, name: dir, dev: st.Dev, root: true}, nil
}

func (d *hostDir) path() string { return d.name }

func (d *hostDir) close() error {
	err := d.forget()
	if d.root {
		d.ahead.stop()
	}
	if closeErr := unix.Close(d.fd); closeErr != nil {
		err = errors.Join(err, &os.PathError{Op: "close", Path: d.name, Err: closeErr})
	}
	return err
}

func (d *hostDir) self() (attr, details, error) {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return attr{}, details{}, &os.PathError{Op: "stat", Path: d.path(), Err: err}
	}
	a, err := d.attr(&st, d.path())
	if err != nil {
		return attr{}, details{}, err
	}
	xattrs, err := readXattrs(openXattrs(d.fd))
	if err != nil {
		return attr{}, details{}, fmt.Errorf("read extended attributes of %s: %w", d.path(), err)
	}
	return a, details{xattrs: xattrs}, nil
}

// look is stat, now.
func (d *hostDir) look(name string) (attr, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return attr{}, &os.PathError{Op: "stat", Path: filepath.Join(d.name, name), Err: err}
	}
	return d.attr(&st, name)
}

// attr translates what stat says of a name.
func (d *hostDir) attr(st *unix.Stat_t, name string) (attr, error) {
	a := attr{
		perm: uint16(st.Mode & 0o7777), uid: st.Uid, gid: st.Gid, size: st.Size,
		id: fileID{st.Dev, st.Ino}, links: uint64(st.Nlink), //nolint:unconvert // narrower on other architectures
		state: stateOf(st),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		a.kind = format.KindFile
	case unix.S_IFDIR:
		a.kind = format.KindDir
		a.mount = st.Dev != d.dev
	case unix.S_IFLNK:
		a.kind = format.KindSymlink
	case unix.S_IFCHR:
		a.kind = format.KindChr
	case unix.S_IFBLK:
		a.kind = format.KindBlk
	case unix.S_IFIFO:
		a.kind = format.KindFifo
	case unix.S_IFSOCK:
		a.kind = format.KindSocket
	default:
		return attr{}, fmt.Errorf("%s has the unknown type %#o", filepath.Join(d.path(), name), st.Mode&unix.S_IFMT)
	}
	if a.kind == format.KindChr || a.kind == format.KindBlk {
		a.major, a.minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	return a, nil
}

func (d *hostDir) open(name string, a *attr) (io.ReadCloser, error) {
	fd, now, err := d.openChecked(name, a, unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	// The cutter comes to this file when those before it are read: the disk can begin now.
	// It is a hint, so its failure does not matter.
	_ = unix.Fadvise(fd, 0, min(a.size, readAhead), unix.FADV_WILLNEED)
	return &hostFile{fd: fd, dir: d, name: name, state: now.state}, nil
}

// enterNow is enter without what was done ahead.
func (d *hostDir) enterNow(name string, a *attr) (*hostDir, error) {
	fd, _, err := d.openChecked(name, a, unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	return &hostDir{fd: fd, name: filepath.Join(d.name, name), dev: d.dev, ahead: d.ahead}, nil
}

// openChecked opens a child without following a symlink or waiting for a fifo, and makes
// sure that it is what was looked at before. It updates the size, which is the one of the
// open file from now on.
func (d *hostDir) openChecked(name string, a *attr, flags int) (fd int, now attr, err error) {
	fd, err = openAt(d.fd, name, unix.O_RDONLY|flags)
	if err != nil {
		return -1, now, &os.PathError{Op: "open", Path: filepath.Join(d.name, name), Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, now, errors.Join(&os.PathError{Op: "stat", Path: filepath.Join(d.name, name), Err: err}, unix.Close(fd))
	}
	now, err = d.attr(&st, name)
	if err != nil {
		return -1, now, errors.Join(err, unix.Close(fd))
	}
	if now.id != a.id || now.kind != a.kind {
		return -1, now, errors.Join(fmt.Errorf("open %s: %w", filepath.Join(d.name, name), ErrChanged), unix.Close(fd))
	}
	a.size = now.size
	return fd, now, nil
}

// openAt opens what a name in a directory is, if that is no symlink.
func openAt(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

func (d *hostDir) details(name string, a *attr, file io.ReadCloser) (details, error) {
	// A path that leads to the file however deep the tree is.
	path := procPath(d.fd) + "/" + name
	of := namedXattrs(path)
	if f, ok := file.(*hostFile); ok {
		of = openXattrs(f.fd)
	}
	var det details
	var err error
	if a.kind == format.KindSymlink {
		if det.target, err = readlink(path); err != nil {
			return details{}, &os.PathError{Op: "readlink", Path: filepath.Join(d.name, name), Err: err}
		}
	}
	if det.xattrs, err = readXattrs(of); err != nil {
		return details{}, fmt.Errorf("read extended attributes of %s: %w", filepath.Join(d.name, name), err)
	}
	return det, nil
}

// hostFile is a regular file of this host that is open. An [os.File] would take system calls of its own, which
// for a small file are as many as those needed.
type hostFile struct {
	fd    int
	dir   *hostDir  // for messages
	name  string    // as well
	state fileState // when it was opened
}

// Read implements io.Reader.
func (f *hostFile) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(f.fd, p)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, &os.PathError{Op: "read", Path: filepath.Join(f.dir.name, f.name), Err: err}
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// Close implements io.Closer. The file must not be used any more.
func (f *hostFile) Close() error {
	if err := unix.Close(f.fd); err != nil {
		return &os.PathError{Op: "close", Path: filepath.Join(f.dir.name, f.name), Err: err}
	}
	return nil
}
