package image

import (
	"bytes"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// direct makes the index of an image as builders make them straight from the rootfs message: of one layer,
// in which each directory stands before what it lists and lists it in order, and everything has a name.
// That takes a third of the time of decoding the message, merging the layers and walking the tree. Like
// the decoder that it uses it never fails: of any other image it says that it is not for it, and
// what is wrong with it, if anything, is up to newIndex to say. That both agree is fuzzed.
type direct struct {
	*maker
	numbers numbers
}

// namesPerInode is for how many bytes of names room is made for each inode.
const namesPerInode = 16

// newDirectIndex makes the index of a rootfs message. ok is false for one that direct is not for; the
// limits are then as they were.
func newDirectIndex(b []byte, limits *format.Limits) (x *index, ok bool) {
	before := *limits
	if scan, usual := limits.Scan(b); usual {
		x, ok = direct{}.index(scan)
	}
	if !ok {
		*limits = before
		return nil, false
	}
	return x, true
}

func (d direct) index(scan *format.Scan) (*index, bool) {
	n := scan.Len()
	if n == 0 {
		return nil, false
	}
	// Whether they really grow is seen when they are decoded.
	var ok bool
	if d.numbers, ok = newNumbers(n, scan.Ino); !ok {
		return nil, false
	}
	// Files begin in the middle of a blob or end there: there is a range for each file and for each blob.
	d.maker = newMaker(n, n+scan.Blobs(), scan.Blobs())
	d.x.nodes = d.x.nodes[:n]
	d.x.entries = make([]entry, 0, n+1)
	d.names.Grow(namesPerInode * n)
	for i := range uint32(n) {
		inode := scan.Next()
		if inode == nil || !d.add(i, inode) {
			return nil, false
		}
	}
	sealed, ok := scan.End()
	if !ok {
		return nil, false
	}
	d.x.sealed = sealed
	for i := range d.x.nodes {
		if d.x.nodes[i].nlink == 0 {
			return nil, false // nothing leads there
		}
	}
	d.x.stats.LayerInodes = uint64(n)
	x, err := d.finish(d.numbers)
	return x, err == nil
}

// add adds an inode. Its node has what directories before it said: in nlink how many names lead there, and
// in size the directory that has the last of them.
func (d direct) add(i uint32, inode *format.Inode) bool {
	n := &d.x.nodes[i]
	switch inode.Kind {
	case format.KindUnknown, format.KindWhiteout:
		return false
	case format.KindDir:
		return d.addDir(i, n, inode)
	case format.KindFifo, format.KindChr, format.KindBlk, format.KindFile, format.KindSymlink, format.KindSocket:
		if i == 0 {
			return false
		}
	}
	n.size = 0
	return d.fill(n, inode) == nil
}

// addDir adds a directory. Only the root has no name; the others have one, in a directory before them, so
// that they are a tree.
func (d direct) addDir(i uint32, n *node, inode *format.Inode) bool {
	if i == 0 {
		if inode.Ino != format.RootIno {
			return false
		}
	} else {
		if n.nlink != 1 {
			return false
		}
		d.x.nodes[n.size].nlink++
	}
	n.nlink = 2
	n.first, n.count = uint32(len(d.x.entries)), uint32(len(inode.Entries))
	for k := range inode.Entries {
		e := &inode.Entries[k]
		if k > 0 && bytes.Compare(inode.Entries[k-1].Name, e.Name) >= 0 {
			return false
		}
		target, ok := d.numbers.find(e.Ino)
		if !ok {
			return false
		}
		t := &d.x.nodes[target]
		if target > i {
			t.size = uint64(i)
		} else if t.kind == format.KindDir || target == i {
			return false
		}
		t.nlink++
		d.addEntry(e.Name, target)
	}
	return d.fill(n, inode) == nil
}
