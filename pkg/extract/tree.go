package extract

import (
	"context"
	"errors"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// extractor is one extraction. The tree is made by one goroutine; files are filled by
// several.
type extractor struct {
	ctx    context.Context
	cfg    *Config
	root   *os.File
	isRoot bool
	jobs   chan job
	// links has the first name of each inode with several. The tree's goroutine's.
	links map[uint64]*firstName
	// found counts the names in the target that an inode of the image has in common with one
	// that is there. Only read while files are written.
	found map[sharing]uint64
	// noTemp is set once the file system turned out to have no files without names.
	noTemp atomic.Bool

	progress                               atomic.Int64
	files, bytes, reusedFiles, reusedBytes atomic.Int64
}

func (x *extractor) report() Report {
	return Report{Files: x.files.Load(), Bytes: x.bytes.Load(), ReusedFiles: x.reusedFiles.Load(), ReusedBytes: x.reusedBytes.Load()}
}

// directory is a directory being filled. It gets its attributes, which may take the right
// to write away, when nothing is left to be done in it.
type directory struct {
	place
	f     *os.File // its name is not the path
	attr  image.Attr
	users atomic.Int32 // the tree's goroutine, subdirectories and files at work
	// wasThere says that the directory may have attributes that the image does not give it.
	wasThere bool
	// before is what the directory had before it was taken; nil if nothing was changed.
	before *access
}

// firstName is the name to which further names of an inode are linked.
type firstName struct {
	place
	// done is closed when the inode is complete; nil if it is from the start.
	done chan struct{}
	// id is the inode; it may be read when done is closed.
	id identity
}

// tree makes all names. An explicit stack, as the image decides how deep it gets.
func (x *extractor) tree(root *directory) (err error) {
	type level struct {
		dir  *directory
		list image.Dir
		next int
	}
	var stack []level
	push := func(d *directory) error {
		list, err := x.cfg.Image.OpenDir(d.attr.Ino)
		if err != nil {
			return errors.Join(err, d.f.Close())
		}
		d.users.Add(1)
		stack = append(stack, level{d, list, 0})
		return nil
	}
	defer func() {
		for len(stack) > 0 {
			err = errors.Join(err, x.release(stack[len(stack)-1].dir, err == nil))
			stack = stack[:len(stack)-1]
		}
	}()
	if err := push(root); err != nil {
		return err
	}
	for len(stack) > 0 {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		top := &stack[len(stack)-1]
		if top.next == top.list.Len() {
			dir := top.dir
			stack = stack[:len(stack)-1]
			if err := x.release(dir, true); err != nil {
				return err
			}
			continue
		}
		name, attr := top.list.Entry(top.next)
		top.next++
		at := place{top.dir, name}
		if attr.Kind != format.KindDir {
			if err := x.entry(at, attr); err != nil {
				return err
			}
			continue
		}
		sub, err := x.subdirectory(at, attr)
		if err != nil {
			return err
		}
		if err := push(sub); err != nil {
			return err
		}
	}
	return nil
}

// subdirectory makes a directory, or takes the one that is there.
func (x *extractor) subdirectory(at place, attr image.Attr) (*directory, error) {
	d := &directory{place: at, attr: attr}
	parent := int(at.parent.f.Fd())
	old, err := x.look(at)
	if err != nil {
		return nil, err
	}
	if old != nil && old.kind() != unix.S_IFDIR {
		if err := unix.Unlinkat(parent, at.name, 0); err != nil {
			return nil, errors.Join(at.error("remove", old.explain(err)), old.close())
		}
		if err := errors.Join(old.close(), x.at(StepCleared)); err != nil {
			return nil, err
		}
		old = nil
	}
	if old != nil {
		err := errors.Join(x.take(d, old.fd), old.close())
		if err != nil {
			return nil, err
		}
	} else {
		if err := unix.Mkdirat(parent, at.name, 0o700); err != nil {
			return nil, at.error("mkdir", err)
		}
		if d.f, err = openDir(parent, at.name, at); err != nil {
			return nil, err
		}
		if err := x.at(StepDirMade); err != nil {
			return nil, errors.Join(err, d.f.Close())
		}
	}
	at.parent.users.Add(1)
	return d, nil
}

// release says that one user of a directory is done. The last one gives the directory its
// attributes, if the extraction is to go on, or else those that it had, and releases the
// directory above.
func (x *extractor) release(d *directory, finish bool) error {
	var err error
	for d != nil && d.users.Add(-1) == 0 {
		finish = finish && err == nil
		if finish {
			err = x.attributes(int(d.f.Fd()), d.place, d.attr, d.wasThere)
		}
		if finish && err == nil {
			err = x.at(StepDirFinished)
		} else if x.cfg.Force {
			err = errors.Join(err, d.restore())
		}
		err = errors.Join(err, d.f.Close())
		d = d.parent
	}
	return err
}

// openDir opens a directory without following a symlink at its end.
func openDir(parent int, name string, at place) (*os.File, error) {
	flags := unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	if parent != unix.AT_FDCWD {
		flags |= unix.O_NOFOLLOW
	}
	fd, err := unix.Openat(parent, name, flags, 0)
	if err != nil {
		return nil, at.error("open", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
