package builder

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"slices"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// openFile is a regular file on its way from the walker to the cutter.
type openFile struct {
	f     io.ReadCloser // owned by whoever holds the openFile
	dir   directory     // for messages
	name  string        // as well
	size  int64         // at the time of opening, at least 1
	inode *format.Inode
	state fileState // when it was looked at
}

// path returns the file's own, for messages.
func (f *openFile) path() string { return filepath.Join(f.dir.path(), f.name) }

// walker visits directories depth-first, names in byte order, and gives numbers to
// inodes: on visiting a directory all its children get theirs, so that files of one
// directory are neighbours in the chunk stream.
type walker struct {
	ctx     context.Context
	base    *baseTree
	tree    *tree
	nextIno uint64
	// links maps files with several names to the number of the first.
	links map[fileID]uint64
	// used, in a delta, has the numbers that inodes of this layer took from the base: true
	// for an inode that is present, false for a whiteout.
	used  map[uint64]bool
	files chan<- openFile
	found func(inodes int)
	// again, if not nil, gets the files with content instead, which are not opened. rel is the
	// directory being visited then, relative to the root.
	again *again
	rel   string
}

// child is a name in a directory being visited.
type child struct {
	name string
	attr
	ino uint64
}

// walk visits the tree below root and sends each file with content to w.files.
func (w *walker) walk(root directory) error {
	w.nextIno = w.base.nextIno()
	a, det, err := root.self()
	if err != nil {
		return err
	}
	return w.visit(root, w.tree.add(newInode(format.RootIno, &a, det)), format.RootIno)
}

// visit lists a directory. baseIno is the number of the base's directory at the same path, 0
// if it has none.
func (w *walker) visit(dir directory, inode *format.Inode, baseIno uint64) error {
	names, err := dir.names()
	if err != nil {
		return err
	}
	base := w.base.dir(baseIno)
	inode.Entries = make([]format.DirEntry, 0, len(names))
	for _, e := range base.entries {
		if _, present := slices.BinarySearch(names, string(e.Name)); !present {
			inode.Entries = append(inode.Entries, format.DirEntry{Ino: w.whiteout(e.Ino), Name: e.Name})
		}
	}
	var dirs []child
	var dirInodes []*format.Inode
	var c child // one for all names: it is handed through interfaces, which puts it on the heap
	for _, name := range names {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		c = child{name: name}
		if c.attr, err = dir.stat(name); err != nil {
			return err
		}
		var linked bool
		c.ino, linked = w.number(base.byName[name], &c.attr)
		inode.Entries = append(inode.Entries, format.DirEntry{Ino: c.ino, Name: []byte(name)})
		if linked {
			continue
		}
		added, err := w.add(dir, &c)
		if err != nil {
			return err
		}
		if added.Kind == format.KindDir {
			dirs, dirInodes = append(dirs, c), append(dirInodes, added)
		}
	}
	w.found(w.tree.present)
	dir.soon(dirs)
	for i := range dirs {
		if dirs[i].mount {
			continue
		}
		if err := w.descend(dir, &dirs[i], dirInodes[i], base.byName[dirs[i].name]); err != nil {
			return err
		}
	}
	return nil
}

// descend opens a subdirectory and visits it.
func (w *walker) descend(dir directory, c *child, inode *format.Inode, baseIno uint64) (err error) {
	sub, err := dir.enter(c.name, &c.attr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sub.close()) }()
	if w.again != nil {
		defer func(rel string) { w.rel = rel }(w.rel)
		w.rel += "/" + c.name
	}
	return w.visit(sub, inode, baseIno)
}

// number returns the number for a path that the base gives the number baseIno (0: none),
// and whether the path is a further link to an inode that has been added.
func (w *walker) number(baseIno uint64, a *attr) (ino uint64, linked bool) {
	if baseIno != 0 && w.base.find(baseIno) == nil {
		baseIno = 0 // whited out: the path is new
	}
	ino = baseIno
	if ino == 0 {
		// A number is taken for a further link too, though it stays unused.
		ino = w.next()
	}
	if a.kind != format.KindDir && a.links > 1 {
		if first, ok := w.links[a.id]; ok {
			return first, true
		}
		ino = w.claim(ino, baseIno)
		w.links[a.id] = ino
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
func (w *walker) add(dir directory, c *child) (*format.Inode, error) {
	if w.again != nil && c.kind == format.KindFile && c.size > 0 {
		return w.addAgain(dir, c)
	}
	var f io.ReadCloser
	if c.kind == format.KindFile && c.size > 0 {
		var err error
		if f, err = dir.open(c.name, &c.attr); err != nil {
			return nil, err
		}
	}
	det, err := dir.details(c.name, &c.attr, f)
	if err != nil {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
		return nil, err
	}
	inode := w.tree.add(newInode(c.ino, &c.attr, det))
	if f == nil {
		return inode, nil
	}
	if c.size == 0 {
		return inode, f.Close()
	}
	return inode, w.send(openFile{f: f, dir: dir, name: c.name, size: c.size, inode: inode, state: c.state})
}

// addAgain is add for a file with content that may be as it was.
func (w *walker) addAgain(dir directory, c *child) (*format.Inode, error) {
	var det details
	if !w.again.isPlain(c.state) {
		var err error
		if det, err = dir.details(c.name, &c.attr, nil); err != nil {
			return nil, err
		}
	}
	inode := w.tree.add(newInode(c.ino, &c.attr, det))
	w.again.add(w.rel, c.name, c.state, inode)
	return inode, nil
}

// send hands an open file to the cutter.
func (w *walker) send(f openFile) error {
	select {
	case w.files <- f:
		return nil
	case <-w.ctx.Done():
		return errors.Join(w.ctx.Err(), f.f.Close())
	}
}

// newInode returns an inode with all that is known of a file.
func newInode(ino uint64, a *attr, det details) format.Inode {
	return format.Inode{
		Ino: ino, Kind: a.kind, Perm: a.perm, UID: a.uid, GID: a.gid,
		Major: uint64(a.major), Minor: uint64(a.minor), Symlink: det.target, Xattrs: det.xattrs,
	}
}
