package builder

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// readAhead is how much of each file the kernel is asked to read ahead of the cutter, in
// bytes; from there on it reads ahead by itself.
const readAhead = 2 << 20

// hostDir is a directory of this host.
type hostDir struct {
	f   *os.File
	dev uint64 // the file system to stay on
}

var _ directory = (*hostDir)(nil)

// openRoot opens the directory to build from, at a path. The root itself may be a symlink. dir
// is what to call it.
func openRoot(path, dir string) (*hostDir, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	f := os.NewFile(uintptr(fd), dir)
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, errors.Join(&os.PathError{Op: "stat", Path: dir, Err: err}, f.Close())
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, errors.Join(fmt.Errorf("%s is not a directory", dir), f.Close())
	}
	return &hostDir{f: f, dev: st.Dev}, nil
}

func (d *hostDir) path() string { return d.f.Name() }
func (d *hostDir) close() error { return d.f.Close() }

func (d *hostDir) self() (attr, details, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.f.Fd()), &st); err != nil {
		return attr{}, details{}, &os.PathError{Op: "stat", Path: d.path(), Err: err}
	}
	a, err := d.attr(&st, d.path())
	if err != nil {
		return attr{}, details{}, err
	}
	xattrs, err := readXattrs(procPath(d.f), true)
	if err != nil {
		return attr{}, details{}, fmt.Errorf("read extended attributes of %s: %w", d.path(), err)
	}
	return a, details{xattrs: xattrs}, nil
}

func (d *hostDir) names() ([]string, error) {
	names, err := d.f.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list directory: %w", err)
	}
	slices.Sort(names)
	return names, nil
}

func (d *hostDir) stat(name string) (attr, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(d.f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return attr{}, &os.PathError{Op: "stat", Path: filepath.Join(d.path(), name), Err: err}
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
	f, err := d.openChecked(name, a, 0)
	if err != nil {
		return nil, err
	}
	// The cutter comes to this file when those before it are read: the disk can begin now.
	// It is a hint, so its failure does not matter.
	_ = unix.Fadvise(int(f.Fd()), 0, min(a.size, readAhead), unix.FADV_WILLNEED)
	return f, nil
}

func (d *hostDir) enter(name string, a *attr) (directory, error) {
	f, err := d.openChecked(name, a, unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	return &hostDir{f: f, dev: d.dev}, nil
}

// openChecked opens a child without following a symlink or waiting for a fifo, and makes
// sure that it is what was looked at before. It updates the size, which is the one of the
// open file from now on.
func (d *hostDir) openChecked(name string, a *attr, flags int) (*os.File, error) {
	path := filepath.Join(d.path(), name)
	fd, err := unix.Openat(int(d.f.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(&os.PathError{Op: "stat", Path: path, Err: err}, f.Close())
	}
	now, err := d.attr(&st, name)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if now.id != a.id || now.kind != a.kind {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, ErrChanged), f.Close())
	}
	a.size = now.size
	return f, nil
}

func (d *hostDir) details(name string, a *attr, file io.ReadCloser) (details, error) {
	// A path that leads to the file however deep the tree is.
	access, follow := procPath(d.f)+"/"+name, false
	if f, ok := file.(*os.File); ok {
		access, follow = procPath(f), true
	}
	var det details
	var err error
	if a.kind == format.KindSymlink {
		if det.target, err = readlink(access); err != nil {
			return details{}, &os.PathError{Op: "readlink", Path: filepath.Join(d.path(), name), Err: err}
		}
	}
	if det.xattrs, err = readXattrs(access, follow); err != nil {
		return details{}, fmt.Errorf("read extended attributes of %s: %w", filepath.Join(d.path(), name), err)
	}
	return det, nil
}
