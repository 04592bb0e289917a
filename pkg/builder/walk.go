package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// openFile is a regular file on its way from the walker to the cutter.
type openFile struct {
	f     *os.File // owned by whoever holds the openFile
	path  string   // for messages
	size  int64    // at the time of opening, at least 1
	inode *format.Inode
}

// readAhead is how much of each file the kernel is asked to read ahead of the cutter, in
// bytes; from there on it reads ahead by itself.
const readAhead = 2 << 20

// hostID tells inodes of the host apart.
type hostID struct{ dev, ino uint64 }

// walker visits directories depth-first, names in byte order, and gives numbers to
// inodes: on visiting a directory all its children get theirs, so that files of one
// directory are neighbours in the chunk stream.
type walker struct {
	ctx     context.Context
	dev     uint64 // the file system to stay on
	base    *baseTree
	tree    *tree
	nextIno uint64
	// links maps host inodes with several names to the number of the first.
	links map[hostID]uint64
	// used, in a delta, has the numbers that inodes of this layer took from the base: true
	// for an inode that is present, false for a whiteout.
	used  map[uint64]bool
	files chan<- openFile
	found func(inodes int)
}

// child is a name in a directory being visited.
type child struct {
	name string
	stat unix.Stat_t
	ino  uint64
}

// walk visits the tree below root and sends each file with content to w.files.
func (w *walker) walk(root *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		return &os.PathError{Op: "stat", Path: root.Name(), Err: err}
	}
	w.dev = st.Dev
	w.nextIno = w.base.nextIno()
	inode, err := w.inode(procPath(root), true, root.Name(), format.RootIno, &st)
	if err != nil {
		return err
	}
	return w.visit(root, inode, format.RootIno)
}

// visit lists the directory that dir is open on. baseIno is the number of the base's
// directory at the same path, 0 if it has none.
func (w *walker) visit(dir *os.File, inode *format.Inode, baseIno uint64) error {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("list directory: %w", err)
	}
	slices.Sort(names)
	base := w.base.dir(baseIno)
	inode.Entries = make([]format.DirEntry, 0, len(names))
	for _, e := range base.entries {
		if _, present := slices.BinarySearch(names, string(e.Name)); !present {
			inode.Entries = append(inode.Entries, format.DirEntry{Ino: w.whiteout(e.Ino), Name: e.Name})
		}
	}
	var dirs []child
	var dirInodes []*format.Inode
	for _, name := range names {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		c := child{name: name}
		path := filepath.Join(dir.Name(), name)
		if err := unix.Fstatat(int(dir.Fd()), name, &c.stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "stat", Path: path, Err: err}
		}
		var linked bool
		c.ino, linked = w.number(base.byName[name], &c.stat)
		inode.Entries = append(inode.Entries, format.DirEntry{Ino: c.ino, Name: []byte(name)})
		if linked {
			continue
		}
		added, err := w.add(dir, path, &c)
		if err != nil {
			return err
		}
		if added.Kind == format.KindDir {
			dirs, dirInodes = append(dirs, c), append(dirInodes, added)
		}
	}
	w.found(w.tree.present)
	for i := range dirs {
		if dirs[i].stat.Dev != w.dev {
			continue // a mount point stays empty
		}
		if err := w.descend(dir, &dirs[i], dirInodes[i], base.byName[dirs[i].name]); err != nil {
			return err
		}
	}
	return nil
}

// descend opens a subdirectory and visits it.
func (w *walker) descend(dir *os.File, c *child, inode *format.Inode, baseIno uint64) (err error) {
	path := filepath.Join(dir.Name(), c.name)
	sub, err := openChecked(dir, path, c, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sub.Close()) }()
	return w.visit(sub, inode, baseIno)
}

// number returns the number for a path that the base gives the number baseIno (0: none),
// and whether the path is a further link to an inode that has been added.
func (w *walker) number(baseIno uint64, st *unix.Stat_t) (ino uint64, linked bool) {
	if baseIno != 0 && w.base.find(baseIno) == nil {
		baseIno = 0 // whited out: the path is new
	}
	ino = baseIno
	if ino == 0 {
		// A number is taken for a further link too, though it stays unused.
		ino = w.next()
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if !isDir && st.Nlink > 1 {
		id := hostID{st.Dev, st.Ino}
		if first, ok := w.links[id]; ok {
			return first, true
		}
		ino = w.claim(ino, baseIno)
		w.links[id] = ino
		return ino, false
	}
	return w.claim(ino, baseIno), false
}

// claim marks a number of the base as used. Two paths that were links to one inode in the
// base, and are not any more, must not share the number: the second gets a new one.
func (w *walker) claim(ino, baseIno uint64) uint64 {
	if baseIno == 0 || w.used == nil {
		return ino
	}
	if _, taken := w.used[ino]; taken {
		return w.next()
	}
	w.used[ino] = true
	return ino
}

// whiteout adds a whiteout for an entry that is gone and returns its number: the entry's
// own, unless an inode that is still present has it.
func (w *walker) whiteout(ino uint64) uint64 {
	if w.used[ino] {
		ino = w.next()
	} else {
		w.used[ino] = false
	}
	w.tree.add(format.Inode{Ino: ino, Kind: format.KindWhiteout, Perm: 0o644})
	return ino
}

func (w *walker) next() uint64 {
	ino := w.nextIno
	w.nextIno++
	return ino
}

// add adds a child of dir to the tree, and sends it to the cutter if it has content.
func (w *walker) add(dir *os.File, path string, c *child) (*format.Inode, error) {
	if c.stat.Mode&unix.S_IFMT != unix.S_IFREG || c.stat.Size == 0 {
		return w.inode(procPath(dir)+"/"+c.name, false, path, c.ino, &c.stat)
	}
	f, err := openChecked(dir, path, c, 0)
	if err != nil {
		return nil, err
	}
	inode, err := w.inode(procPath(f), true, path, c.ino, &c.stat)
	if err != nil || c.stat.Size == 0 {
		return inode, errors.Join(err, f.Close())
	}
	// The cutter comes to this file when those before it are read: the disk can begin now.
	// It is a hint, so its failure does not matter.
	_ = unix.Fadvise(int(f.Fd()), 0, min(c.stat.Size, readAhead), unix.FADV_WILLNEED)
	select {
	case w.files <- openFile{f: f, path: path, size: c.stat.Size, inode: inode}:
		return inode, nil
	case <-w.ctx.Done():
		return nil, errors.Join(w.ctx.Err(), f.Close())
	}
}

// openChecked opens a child without following a symlink or waiting for a fifo, and makes
// sure that it is what was looked at before. It updates the size, which is the one of the
// open file from now on.
func openChecked(dir *os.File, path string, c *child, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), c.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(&os.PathError{Op: "stat", Path: path, Err: err}, f.Close())
	}
	if st.Dev != c.stat.Dev || st.Ino != c.stat.Ino || st.Mode&unix.S_IFMT != c.stat.Mode&unix.S_IFMT {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, ErrChanged), f.Close())
	}
	c.stat.Size = st.Size
	return f, nil
}

// inode adds an inode with all that stat and the extended attributes say. access is a
// path that leads to it however deep the tree is; follow says whether its last component,
// a link in /proc to something open, is to be followed.
func (w *walker) inode(access string, follow bool, path string, ino uint64, st *unix.Stat_t) (*format.Inode, error) {
	i := format.Inode{Ino: ino, Perm: uint16(st.Mode & 0o7777), UID: st.Uid, GID: st.Gid}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		i.Kind = format.KindFile
	case unix.S_IFDIR:
		i.Kind = format.KindDir
	case unix.S_IFLNK:
		i.Kind = format.KindSymlink
		target, err := readlink(access)
		if err != nil {
			return nil, &os.PathError{Op: "readlink", Path: path, Err: err}
		}
		i.Symlink = target
	case unix.S_IFCHR:
		i.Kind = format.KindChr
	case unix.S_IFBLK:
		i.Kind = format.KindBlk
	case unix.S_IFIFO:
		i.Kind = format.KindFifo
	case unix.S_IFSOCK:
		i.Kind = format.KindSocket
	default:
		return nil, fmt.Errorf("%s has the unknown type %#o", path, st.Mode&unix.S_IFMT)
	}
	if i.Kind == format.KindChr || i.Kind == format.KindBlk {
		i.Major, i.Minor = uint64(unix.Major(st.Rdev)), uint64(unix.Minor(st.Rdev))
	}
	var err error
	if i.Xattrs, err = readXattrs(access, follow); err != nil {
		return nil, fmt.Errorf("read extended attributes of %s: %w", path, err)
	}
	return w.tree.add(i), nil
}
