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
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// Errors of this package, wrapped with the path at hand.
var (
	// ErrConfig says that a Config is not usable.
	ErrConfig = errors.New("invalid extraction")
	// ErrNotEmpty says that the target has content already.
	ErrNotEmpty = errors.New("directory is not empty: extract into a new or an empty one")
	// ErrPrivilege says that something can be restored by root only.
	ErrPrivilege = errors.New("only root may restore this: run as root")
	// ErrDevice says that Linux has no device of a number, which would become another.
	ErrDevice = errors.New("no such device number: Linux has major numbers up to 4095 and minor ones up to 1048575")
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
	switch {
	case cfg.Image == nil:
		return fmt.Errorf("extract to %s: no image: %w", cfg.Dir, ErrConfig)
	case cfg.Dir == "":
		return fmt.Errorf("extract image %s: no directory: %w", cfg.Image.Digest(), ErrConfig)
	case cfg.Workers < 0:
		return fmt.Errorf("extract to %s: %d workers: %w", cfg.Dir, cfg.Workers, ErrConfig)
	case cfg.Workers == 0:
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
	target := place{name: cfg.Dir}
	root, err := openDir(unix.AT_FDCWD, cfg.Dir, target)
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
	top, err := openDir(int(root.Fd()), ".", target)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	x := &extractor{
		ctx: ctx, cfg: cfg, root: root, isRoot: os.Geteuid() == 0,
		jobs:  make(chan job, 64),
		links: make(map[uint64]place),
	}
	g.Go(func() error {
		defer close(x.jobs)
		return x.tree(&directory{place: target, f: top, attr: attr})
	})
	for range cfg.Workers {
		g.Go(x.write)
	}
	err = g.Wait()
	// What the workers left when one of them failed.
	for j := range x.jobs {
		err = errors.Join(err, j.f.Close(), x.release(j.parent, false))
	}
	return err
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
	if os.Geteuid() != 0 {
		// Who is not root cannot empty directories that are finished and read only.
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && (path != dir || made) {
				err = os.Chmod(path, 0o700) //nolint:gosec // a directory
			}
			return err
		})
	}
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
	links   map[uint64]place // the first name of an inode with several
	written atomic.Int64
}

// directory is a directory being filled. It gets its attributes, which may take the right
// to write away, when nothing is left to be done in it.
type directory struct {
	place
	f     *os.File // its name is not the path
	attr  image.Attr
	users atomic.Int32 // the tree's goroutine, subdirectories and files at work
}

// job is a file to be filled.
type job struct {
	place
	f    *os.File // its name is not the path
	attr image.Attr
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
		for _, l := range stack {
			err = errors.Join(err, x.release(l.dir, err == nil))
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

func (x *extractor) subdirectory(at place, attr image.Attr) (*directory, error) {
	parent := int(at.parent.f.Fd())
	if err := unix.Mkdirat(parent, at.name, 0o700); err != nil {
		return nil, at.error("mkdir", err)
	}
	f, err := openDir(parent, at.name, at)
	if err != nil {
		return nil, err
	}
	at.parent.users.Add(1)
	return &directory{place: at, f: f, attr: attr}, nil
}

// release says that one user of a directory is done. The last one gives the directory its
// attributes, if the extraction is to go on, and releases the directory above.
func (x *extractor) release(d *directory, finish bool) error {
	var err error
	for d != nil && d.users.Add(-1) == 0 {
		if finish && err == nil {
			err = x.attributes(int(d.f.Fd()), d.place, d.attr)
		}
		err = errors.Join(err, d.f.Close())
		d = d.parent
	}
	return err
}

// entry makes a name that is no directory.
func (x *extractor) entry(at place, attr image.Attr) error {
	fd, name := int(at.parent.f.Fd()), at.name
	if attr.Nlink > 1 {
		if first, ok := x.links[attr.Ino]; ok {
			return x.link(first, at)
		}
		x.links[attr.Ino] = at
	}
	if attr.Kind == format.KindFile {
		return x.file(at, attr)
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
		err = makeDevice(fd, name, unix.S_IFCHR, attr)
	case format.KindBlk:
		err = makeDevice(fd, name, unix.S_IFBLK, attr)
	default:
		err = fmt.Errorf("%s: %w", attr.Kind, format.ErrCorrupt)
	}
	if err != nil {
		return at.error("make "+attr.Kind.String(), x.privilege(err))
	}
	// An O_PATH descriptor takes ownership and mode without opening a device or following
	// a symlink.
	pathFD, err := unix.Openat(fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return at.error("open", err)
	}
	err = x.attributes(pathFD, at, attr)
	if attr.Kind == format.KindSymlink && err == nil {
		// /proc leads to where a symlink points, not to the symlink itself; its name in the
		// directory does.
		err = x.xattrs(unix.Lsetxattr, fmt.Sprintf("/proc/self/fd/%d/%s", fd, name), at, attr)
	}
	return errors.Join(err, unix.Close(pathFD))
}

// makeDevice makes a device. Of a larger number the kernel would take some bits only.
func makeDevice(fd int, name string, kind uint32, attr image.Attr) error {
	if attr.Major > 1<<12-1 || attr.Minor > 1<<20-1 {
		return fmt.Errorf("%d:%d: %w", attr.Major, attr.Minor, ErrDevice)
	}
	return unix.Mknodat(fd, name, kind|0o600, int(unix.Mkdev(attr.Major, attr.Minor)))
}

// link makes a further name of an inode. Directories that are complete have the owners that
// the image gives, who may replace what is in them: that no symlink is followed on the way to
// the first name has to be said.
func (x *extractor) link(first, at place) error {
	fd, err := unix.Openat2(int(x.root.Fd()), first.below(), &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err == nil {
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), int(at.parent.f.Fd()), at.name, unix.AT_SYMLINK_FOLLOW)
		err = errors.Join(err, unix.Close(fd))
	}
	if err != nil {
		return &os.LinkError{Op: "link", Old: first.String(), New: at.String(), Err: err}
	}
	return nil
}

// file makes a regular file and hands it to the workers.
func (x *extractor) file(at place, attr image.Attr) error {
	fd, err := unix.Openat(int(at.parent.f.Fd()), at.name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return at.error("create", err)
	}
	at.parent.users.Add(1)
	j := job{at, os.NewFile(uintptr(fd), at.name), attr}
	select {
	case x.jobs <- j:
		return nil
	case <-x.ctx.Done():
		return errors.Join(x.ctx.Err(), j.f.Close(), x.release(at.parent, false))
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
			err = x.attributes(int(j.f.Fd()), j.place, j.attr)
		}
		if err := errors.Join(err, j.f.Close(), x.release(j.parent, err == nil)); err != nil {
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
				return j.error("write", err)
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
			return fmt.Errorf("%s: %w", j.place, err)
		}
	}
}

// attributes sets owner, extended attributes and mode, in this order: a change of owner
// clears set-id bits and capabilities, and a mode may forbid to set attributes.
func (x *extractor) attributes(fd int, at place, attr image.Attr) error {
	if x.isRoot {
		if err := unix.Fchownat(fd, "", int(attr.UID), int(attr.GID), unix.AT_EMPTY_PATH); err != nil {
			return at.error("chown", err)
		}
	}
	if attr.Kind == format.KindSymlink {
		return nil // it has no mode of its own
	}
	access := fmt.Sprintf("/proc/self/fd/%d", fd)
	if err := x.xattrs(unix.Setxattr, access, at, attr); err != nil {
		return err
	}
	if err := unix.Chmod(access, uint32(attr.Perm)); err != nil {
		return at.error("chmod", err)
	}
	return nil
}

// xattrs sets the extended attributes of what access leads to.
func (x *extractor) xattrs(set func(string, string, []byte, int) error, access string, at place, attr image.Attr) error {
	xattrs, err := x.cfg.Image.Xattrs(attr.Ino)
	if err != nil {
		return err
	}
	for _, a := range xattrs {
		if err := set(access, string(a.Key), a.Val, 0); err != nil {
			return at.error("set "+string(a.Key), x.privilege(err))
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
