package extract

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// entry makes a name that is no directory.
func (x *extractor) entry(at place, attr image.Attr) error {
	var first *firstName
	if attr.Nlink > 1 {
		if first, ok := x.links[attr.Ino]; ok {
			return x.link(first, at)
		}
		first = &firstName{place: at}
		x.links[attr.Ino] = first
	}
	if attr.Kind == format.KindFile {
		return x.file(at, attr, first)
	}
	old, err := x.look(at)
	if err != nil {
		return err
	}
	id, err := x.special(at, attr, old)
	if first != nil {
		first.id = id
	}
	if old != nil {
		err = errors.Join(err, old.close())
	}
	return err
}

// special makes a name that is neither a directory nor a file, unless the one that is there is
// right to the last attribute, and returns its inode.
func (x *extractor) special(at place, attr image.Attr, old *existing) (identity, error) {
	if old == nil {
		return x.make(at, at.name, attr)
	}
	right, err := x.same(old, at, attr)
	if err != nil {
		return identity{}, err
	}
	if right {
		return old.identity(), nil
	}
	temp := newTempName()
	id, err := x.make(at, temp, attr)
	if err == nil {
		err = x.at(StepTempNamed)
	}
	return id, x.swap(at, temp, old, err)
}

// same reports whether a name that is neither a directory nor a file leads to what it should.
func (x *extractor) same(old *existing, at place, attr image.Attr) (bool, error) {
	kinds := map[format.Kind]uint16{
		format.KindSymlink: unix.S_IFLNK, format.KindFifo: unix.S_IFIFO, format.KindSocket: unix.S_IFSOCK,
		format.KindChr: unix.S_IFCHR, format.KindBlk: unix.S_IFBLK,
	}
	if old.kind() != kinds[attr.Kind] || uint64(old.st.Nlink) != x.names(old, attr) {
		return false, nil
	}
	switch attr.Kind {
	case format.KindSymlink:
		want, err := x.cfg.Image.Readlink(attr.Ino)
		if err != nil {
			return false, err
		}
		buf := make([]byte, len(want)+1)
		n, err := unix.Readlinkat(old.fd, "", buf)
		if err != nil {
			return false, at.error("readlink", err)
		}
		if string(buf[:n]) != want {
			return false, nil
		}
	case format.KindChr, format.KindBlk:
		if old.st.Rdev_major != attr.Major || old.st.Rdev_minor != attr.Minor {
			return false, nil
		}
	default:
	}
	return x.hasAttributes(old, at, attr)
}

// names returns how many names an inode that is there should have: those that the survey found
// which the image gives to one inode, too.
func (x *extractor) names(old *existing, attr image.Attr) uint64 {
	if attr.Nlink == 1 {
		return 1
	}
	return x.found[sharing{old.identity(), attr.Ino}]
}

// make makes an inode that is neither a directory nor a file under a name in at's directory,
// with its attributes. When it fails the name may be there.
func (x *extractor) make(at place, name string, attr image.Attr) (identity, error) {
	fd := int(at.parent.f.Fd())
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
		return identity{}, at.error("make "+attr.Kind.String(), x.privilege(err))
	}
	if err := x.at(StepEntryMade); err != nil {
		return identity{}, err
	}
	// An O_PATH descriptor takes ownership and mode without opening a device or following
	// a symlink.
	pathFD, err := unix.Openat(fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return identity{}, at.error("open", err)
	}
	err = x.attributes(pathFD, at, attr, false)
	if attr.Kind == format.KindSymlink && err == nil {
		// /proc leads to where a symlink points, not to the symlink itself; its name in the
		// directory does.
		err = x.setXattrs(unix.Lsetxattr, procPath(fd)+"/"+name, at, attr)
	}
	var id identity
	if err == nil && attr.Nlink > 1 {
		id, err = identify(pathFD)
	}
	return id, errors.Join(err, unix.Close(pathFD))
}

// makeDevice makes a device. Of a larger number the kernel would take some bits only.
func makeDevice(fd int, name string, kind uint32, attr image.Attr) error {
	if attr.Major > 1<<12-1 || attr.Minor > 1<<20-1 {
		return fmt.Errorf("%d:%d: %w", attr.Major, attr.Minor, ErrDevice)
	}
	return unix.Mknodat(fd, name, kind|0o600, int(unix.Mkdev(attr.Major, attr.Minor)))
}

// link makes a further name of an inode, as soon as the inode is complete.
func (x *extractor) link(first *firstName, at place) error {
	if first.done != nil {
		select {
		case <-first.done:
		case <-x.ctx.Done():
			return x.ctx.Err()
		}
	}
	old, err := x.look(at)
	if err != nil {
		return err
	}
	if old == nil {
		return x.linkTo(first, at, at.name)
	}
	if old.identity() == first.id {
		return old.close()
	}
	temp := newTempName()
	err = x.linkTo(first, at, temp)
	if err == nil {
		err = x.at(StepTempNamed)
	}
	return errors.Join(x.swap(at, temp, old, err), old.close())
}

// linkTo gives an inode the name in at's directory. Directories that are complete have the owners
// that the image gives, who may replace what is in them: the inode has to be the one that was
// extracted, and that no symlink is followed on the way to it has to be said.
func (x *extractor) linkTo(first *firstName, at place, name string) error {
	fd, err := openBelow(int(x.root.Fd()), first.below())
	if err == nil {
		var id identity
		if id, err = identify(fd); err == nil && id != first.id {
			err = ErrChanged
		}
		if err == nil {
			err = unix.Linkat(unix.AT_FDCWD, procPath(fd), int(at.parent.f.Fd()), name, unix.AT_SYMLINK_FOLLOW)
		}
		err = errors.Join(err, unix.Close(fd))
	}
	if errors.Is(err, unix.ENOENT) {
		err = fmt.Errorf("%w (%w)", ErrChanged, err)
	}
	if err != nil {
		return &os.LinkError{Op: "link", Old: first.String(), New: at.String(), Err: err}
	}
	return x.at(StepLinked)
}

// openSearching opens a path below dir for who is not root, through directories of their own that
// are complete and may not be searched any more.
func openSearching(dir int, path string, how *unix.OpenHow) (int, error) {
	at := dir
	for name := range strings.SplitSeq(path, "/") {
		fd, err := openIn(at, name, how)
		if at != dir {
			err = errors.Join(err, unix.Close(at))
		}
		if err != nil {
			return -1, err
		}
		at = fd
	}
	return at, nil
}

// openIn opens a name in a directory, which may be searched for as long as that takes.
func openIn(dir int, name string, how *unix.OpenHow) (fd int, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return -1, err
	}
	if mode := st.Mode & 0o7777; mode&0o100 == 0 {
		if err := unix.Chmod(procPath(dir), mode|0o100); err != nil {
			return -1, err
		}
		defer func() { err = errors.Join(err, unix.Chmod(procPath(dir), mode)) }()
	}
	return unix.Openat2(dir, name, how)
}

// openBelow returns an O_PATH descriptor of what a path leads to, which may be longer than the
// kernel takes at once. Symlinks are not followed.
func openBelow(root int, path string) (int, error) {
	how := &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	dir := root
	for {
		piece, rest := path, ""
		if len(path) >= unix.PathMax {
			// Names are shorter than this: there is a slash.
			end := strings.LastIndexByte(path[:unix.PathMax-1], '/')
			piece, rest = path[:end], path[end+1:]
		}
		fd, err := unix.Openat2(dir, piece, how)
		if errors.Is(err, unix.EACCES) && os.Geteuid() != 0 {
			fd, err = openSearching(dir, piece, how)
		}
		if dir != root {
			err = errors.Join(err, unix.Close(dir))
		}
		if err != nil || rest == "" {
			return fd, err
		}
		dir, path = fd, rest
	}
}
