// Package extract writes the tree of an image to a directory: content, modes with their
// set-id bits, owners, extended attributes, hard links, symlinks, fifos, sockets, devices.
//
// Images are hostile. Names cannot leave a directory, because package format refuses
// those that could; everything is created, never opened, below directory descriptors that
// this package made itself, so that no symlink is ever followed.
package extract

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// Errors of this package, wrapped with the path at hand.
var (
	// ErrNotEmpty says that the target has content already.
	ErrNotEmpty = errors.New("directory is not empty: extract into a new or an empty one")
	// ErrPrivilege says that something can be restored by root only.
	ErrPrivilege = errors.New("only root may restore this: run as root")
)

// Config says what to extract.
type Config struct {
	Image *image.Image
	// Dir is the target, which is made if it does not exist and must be empty if it does.
	// Its owner, mode and attributes become those of the image's root.
	Dir string
	// Workers is the number of files written at the same time; 0 means one per CPU.
	Workers int
	// Progress, if not nil, is called with the bytes written so far, from several goroutines.
	Progress func(bytes int64)
}

// Extract writes the tree. Owners are restored as root only, as tar does. When it fails,
// what it wrote is removed again.
func Extract(ctx context.Context, cfg Config) error {
	if cfg.Workers == 0 {
		cfg.Workers = runtime.GOMAXPROCS(0)
	}
	if err := extract(ctx, &cfg); err != nil {
		return fmt.Errorf("extract to %s: %w", cfg.Dir, err)
	}
	return nil
}

func extract(ctx context.Context, cfg *Config) (err error) {
	made, err := prepare(cfg.Dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, remove(cfg.Dir, made))
		}
	}()
	root, err := openDir(unix.AT_FDCWD, cfg.Dir, cfg.Dir)
	if err != nil {
		return err
	}
	// The root stays open until all hard links are made, whoever else lets go of it.
	defer func() { err = errors.Join(err, root.Close()) }()
	attr, err := cfg.Image.Attr(format.RootIno)
	if err != nil {
		return err
	}
	// A descriptor of its own for the tree, which closes it when it is complete.
	top, err := openDir(int(root.Fd()), ".", cfg.Dir)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	x := &extractor{
		ctx: ctx, cfg: cfg, root: root, isRoot: os.Geteuid() == 0,
		jobs:  make(chan job, 64),
		links: make(map[uint64]string),
	}
	g.Go(func() error {
		defer close(x.jobs)
		return x.tree(&directory{f: top, attr: attr})
	})
	for range cfg.Workers {
		g.Go(x.write)
	}
	return g.Wait()
}

// prepare makes the target or sees that it is empty. It reports whether it was made.
func prepare(dir string) (made bool, err error) {
	err = os.Mkdir(dir, 0o700)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, os.ErrExist) {
		return false, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	switch _, err := f.Readdirnames(1); {
	case errors.Is(err, io.EOF):
		return false, nil
	case err != nil:
		return false, err
	}
	return false, ErrNotEmpty
}

// remove takes back what a failed extraction wrote.
func remove(dir string, made bool) error {
	if made {
		return os.RemoveAll(dir)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, e := range entries {
		err = errors.Join(err, root.RemoveAll(e.Name()))
	}
	return err
}

// extractor is one extraction. The tree is made by one goroutine; files are filled by
// several.
type extractor struct {
	ctx     context.Context
	cfg     *Config
	root    *os.File
	isRoot  bool
	jobs    chan job
	links   map[uint64]string // path of the first name of an inode with several
	written atomic.Int64
}

// directory is a directory being filled. It gets its attributes, which may take the right
// to write away, when nothing is left to be done in it.
type directory struct {
	f      *os.File
	attr   image.Attr
	parent *directory
	users  atomic.Int32 // the tree's goroutine, subdirectories and files at work
}

// job is a file to be filled.
type job struct {
	f    *os.File
	attr image.Attr
	dir  *directory
}

// tree makes all names. An explicit stack, as the image decides how deep it gets.
func (x *extractor) tree(root *directory) (err error) {
	type level struct {
		dir  *directory
		list image.Dir
		next int
		path string
	}
	var stack []level
	push := func(d *directory, path string) error {
		list, err := x.cfg.Image.OpenDir(d.attr.Ino)
		if err != nil {
			return errors.Join(err, d.f.Close())
		}
		d.users.Add(1)
		stack = append(stack, level{d, list, 0, path})
		return nil
	}
	defer func() {
		for _, l := range stack {
			err = errors.Join(err, x.release(l.dir, err == nil))
		}
	}()
	if err := push(root, ""); err != nil {
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
		path := top.path + name
		if attr.Kind != format.KindDir {
			if err := x.entry(top.dir, name, path, attr); err != nil {
				return err
			}
			continue
		}
		sub, err := x.subdirectory(top.dir, name, attr)
		if err != nil {
			return err
		}
		if err := push(sub, path+"/"); err != nil {
			return err
		}
	}
	return nil
}

func (x *extractor) subdirectory(parent *directory, name string, attr image.Attr) (*directory, error) {
	path := parent.f.Name() + "/" + name
	if err := unix.Mkdirat(int(parent.f.Fd()), name, 0o700); err != nil {
		return nil, &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	f, err := openDir(int(parent.f.Fd()), name, path)
	if err != nil {
		return nil, err
	}
	parent.users.Add(1)
	return &directory{f: f, attr: attr, parent: parent}, nil
}

// release says that one user of a directory is done. The last one gives the directory its
// attributes, if the extraction is to go on, and releases the directory above.
func (x *extractor) release(d *directory, finish bool) error {
	var err error
	for d != nil && d.users.Add(-1) == 0 {
		if finish && err == nil {
			err = x.attributes(int(d.f.Fd()), d.f.Name(), d.attr)
		}
		err = errors.Join(err, d.f.Close())
		d = d.parent
	}
	return err
}

// entry makes a name that is no directory.
func (x *extractor) entry(dir *directory, name, path string, attr image.Attr) error {
	fd := int(dir.f.Fd())
	full := dir.f.Name() + "/" + name
	if attr.Nlink > 1 {
		if first, ok := x.links[attr.Ino]; ok {
			if err := unix.Linkat(int(x.root.Fd()), first, fd, name, 0); err != nil {
				return &os.LinkError{Op: "link", Old: first, New: full, Err: err}
			}
			return nil
		}
		x.links[attr.Ino] = path
	}
	if attr.Kind == format.KindFile {
		return x.file(dir, name, full, attr)
	}
	var err error
	switch attr.Kind {
	case format.KindSymlink:
		var target string
		if target, err = x.cfg.Image.Readlink(attr.Ino); err == nil {
			err = unix.Symlinkat(target, fd, name)
		}
	case format.KindFifo:
		err = unix.Mknodat(fd, name, unix.S_IFIFO|0o600, 0)
	case format.KindSocket:
		err = unix.Mknodat(fd, name, unix.S_IFSOCK|0o600, 0)
	case format.KindChr:
		err = unix.Mknodat(fd, name, unix.S_IFCHR|0o600, int(unix.Mkdev(attr.Major, attr.Minor)))
	case format.KindBlk:
		err = unix.Mknodat(fd, name, unix.S_IFBLK|0o600, int(unix.Mkdev(attr.Major, attr.Minor)))
	default:
		err = fmt.Errorf("%s: %w", attr.Kind, format.ErrCorrupt)
	}
	if err != nil {
		return &os.PathError{Op: "make " + attr.Kind.String(), Path: full, Err: x.privilege(err)}
	}
	// An O_PATH descriptor takes ownership and mode without opening a device or following
	// a symlink.
	pathFD, err := unix.Openat(fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: full, Err: err}
	}
	err = x.attributes(pathFD, full, attr)
	if attr.Kind == format.KindSymlink && err == nil {
		// /proc leads to where a symlink points, not to the symlink itself; its name in the
		// directory does.
		err = x.xattrs(unix.Lsetxattr, fmt.Sprintf("/proc/self/fd/%d/%s", fd, name), full, attr)
	}
	return errors.Join(err, unix.Close(pathFD))
}

// file makes a regular file and hands it to the workers.
func (x *extractor) file(dir *directory, name, full string, attr image.Attr) error {
	fd, err := unix.Openat(int(dir.f.Fd()), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: full, Err: err}
	}
	dir.users.Add(1)
	j := job{os.NewFile(uintptr(fd), full), attr, dir}
	select {
	case x.jobs <- j:
		return nil
	case <-x.ctx.Done():
		return errors.Join(x.ctx.Err(), j.f.Close(), x.release(dir, false))
	}
}

// write is a worker.
func (x *extractor) write() error {
	buf := make([]byte, 256<<10)
	for j := range x.jobs {
		err := x.ctx.Err()
		if err == nil {
			err = x.content(j, buf)
		}
		if err == nil {
			err = x.attributes(int(j.f.Fd()), j.f.Name(), j.attr)
		}
		if err := errors.Join(err, j.f.Close(), x.release(j.dir, err == nil)); err != nil {
			// The others' files are to be closed too.
			for j := range x.jobs {
				err = errors.Join(err, j.f.Close(), x.release(j.dir, false))
			}
			return err
		}
	}
	return nil
}

func (x *extractor) content(j job, buf []byte) error {
	for off := int64(0); ; {
		n, err := x.cfg.Image.ReadAt(x.ctx, j.attr.Ino, buf, off)
		if n > 0 {
			if _, err := j.f.Write(buf[:n]); err != nil {
				return err
			}
			off += int64(n)
			if x.cfg.Progress != nil {
				x.cfg.Progress(x.written.Add(int64(n)))
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", j.f.Name(), err)
		}
	}
}

// attributes sets owner, extended attributes and mode, in this order: a change of owner
// clears set-id bits and capabilities, and a mode may forbid to set attributes.
func (x *extractor) attributes(fd int, path string, attr image.Attr) error {
	if x.isRoot {
		if err := unix.Fchownat(fd, "", int(attr.UID), int(attr.GID), unix.AT_EMPTY_PATH); err != nil {
			return &os.PathError{Op: "chown", Path: path, Err: err}
		}
	}
	if attr.Kind == format.KindSymlink {
		return nil // it has no mode of its own
	}
	access := fmt.Sprintf("/proc/self/fd/%d", fd)
	if err := x.xattrs(unix.Setxattr, access, path, attr); err != nil {
		return err
	}
	if err := unix.Chmod(access, uint32(attr.Perm)); err != nil {
		return &os.PathError{Op: "chmod", Path: path, Err: err}
	}
	return nil
}

// xattrs sets the extended attributes of what access leads to.
func (x *extractor) xattrs(set func(string, string, []byte, int) error, access, path string, attr image.Attr) error {
	xattrs, err := x.cfg.Image.Xattrs(attr.Ino)
	if err != nil {
		return err
	}
	for _, a := range xattrs {
		if err := set(access, string(a.Key), a.Val, 0); err != nil {
			return &os.PathError{Op: "set " + string(a.Key), Path: path, Err: x.privilege(err)}
		}
	}
	return nil
}

// privilege explains a refusal.
func (x *extractor) privilege(err error) error {
	if !x.isRoot && errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w (%w)", ErrPrivilege, err)
	}
	return err
}

// openDir opens a directory without following a symlink at its end.
func openDir(at int, name, path string) (*os.File, error) {
	flags := unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	if at != unix.AT_FDCWD {
		flags |= unix.O_NOFOLLOW
	}
	fd, err := unix.Openat(at, name, flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}
