package image

import (
	"cmp"
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// node is an inode in the index.
type node struct {
	size   uint64 // content of a file; major<<32|minor of a device
	first  uint32 // index of the first entry or chunk
	count  uint32 // number of entries or chunks
	uid    uint32
	gid    uint32
	nlink  uint32
	parent uint32 // node of the directory above; for directories only
	extra  uint32 // index into extras; 0 is the empty one
	perm   uint16
	kind   format.Kind
}

// entry is a name in a directory.
type entry struct {
	name    uint32 // offset in names
	node    uint32
	nameLen uint8
}

// extent is a byte range of a file: the bytes up to end that the range before does not have.
type extent struct {
	end  uint64 // offset in the file
	off  uint64 // offset in the blob's uncompressed content
	blob uint32
}

// blob is a blob that files refer to.
type blob struct {
	digest     format.Digest
	extent     uint64 // how many bytes of uncompressed content it must have
	compressed bool
}

// extra is what few inodes have.
type extra struct {
	xattrs  []format.Xattr
	symlink string
}

// index is the decoded metadata. It is not changed after it is made.
type index struct {
	nodes   []node
	inos    []uint64 // sorted; inos[i] is the number of nodes[i]
	dense   []uint32 // ino -> node+1, where numbers are dense; nil otherwise
	entries []entry
	names   string
	chunks  []extent
	blobs   []blob
	extras  []extra

	hasXattrs bool
	stats     Stats
}

// find returns the node of an inode number.
func (x *index) find(ino uint64) (uint32, bool) {
	if x.dense != nil {
		if ino >= uint64(len(x.dense)) || x.dense[ino] == 0 {
			return 0, false
		}
		return x.dense[ino] - 1, true
	}
	i, ok := slices.BinarySearch(x.inos, ino)
	return uint32(i), ok
}

func (x *index) name(e *entry) string { return x.names[e.name : e.name+uint32(e.nameLen)] }

func (x *index) extra(n uint32) *extra { return &x.extras[x.nodes[n].extra] }

func (x *index) attr(n uint32) Attr {
	d := &x.nodes[n]
	a := Attr{Ino: x.inos[n], Kind: d.kind, Perm: d.perm, UID: d.uid, GID: d.gid, Nlink: d.nlink}
	switch d.kind {
	case format.KindChr, format.KindBlk:
		a.Major, a.Minor = uint32(d.size>>32), uint32(d.size)
	default:
		a.Size = d.size
	}
	return a
}

// indexer makes an index. Its nodes are numbered like merged until compact.
type indexer struct {
	merged   []*format.Inode // sorted by number; whiteouts are nil
	inos     []uint64
	names    strings.Builder
	lists    [][]entry // of the directories, by node
	nlink    []uint32  // 0: no name leads here
	parent   []uint32
	warnings []string
}

func newIndex(layers []format.InodeVector) (*index, []string, error) {
	b := new(indexer)
	if err := b.merge(layers); err != nil {
		return nil, nil, err
	}
	if err := b.link(); err != nil {
		return nil, nil, err
	}
	x, err := b.compact()
	return x, b.warnings, err
}

// link walks the tree from the root, makes the lists of the directories, counts links and
// makes sure that the directories are a tree.
func (b *indexer) link() error {
	b.lists = make([][]entry, len(b.merged))
	b.nlink = make([]uint32, len(b.merged))
	b.parent = make([]uint32, len(b.merged))
	root, ok := slices.BinarySearch(b.inos, format.RootIno)
	if !ok || b.merged[root] == nil || b.merged[root].Kind != format.KindDir {
		return fmt.Errorf("inode %d is not a directory: %w", format.RootIno, format.ErrCorrupt)
	}
	b.nlink[root] = 2
	b.parent[root] = uint32(root)
	for queue := []uint32{uint32(root)}; len(queue) > 0; {
		dir := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		list, err := b.list(dir)
		if err != nil {
			return fmt.Errorf("directory %d: %w", b.inos[dir], err)
		}
		for _, e := range list {
			if b.merged[e.node].Kind != format.KindDir {
				b.nlink[e.node]++
				continue
			}
			if b.nlink[e.node] != 0 {
				return fmt.Errorf("directory %d has several names: %w", b.inos[e.node], format.ErrCorrupt)
			}
			b.nlink[e.node] = 2
			b.nlink[dir]++
			b.parent[e.node] = dir
			queue = append(queue, e.node)
		}
		b.lists[dir] = list
	}
	return nil
}

// list returns the sorted entries of a directory without those that point at whiteouts.
func (b *indexer) list(dir uint32) ([]entry, error) {
	sorted := slices.SortedFunc(slices.Values(b.merged[dir].Entries), func(x, y format.DirEntry) int { return slices.Compare(x.Name, y.Name) })
	list := make([]entry, 0, len(sorted))
	for i, e := range sorted {
		if i > 0 && slices.Equal(e.Name, sorted[i-1].Name) {
			return nil, fmt.Errorf("two entries are named %q: %w", e.Name, format.ErrCorrupt)
		}
		n, ok := slices.BinarySearch(b.inos, e.Ino)
		if !ok {
			return nil, fmt.Errorf("%q points at inode %d, which no layer has: %w", e.Name, e.Ino, format.ErrCorrupt)
		}
		target := b.merged[n]
		if target == nil {
			continue
		}
		if target.Kind == format.KindUnknown {
			return nil, fmt.Errorf("%q is of no known kind: %w", e.Name, format.ErrCorrupt)
		}
		list = append(list, entry{name: uint32(b.names.Len()), node: uint32(n), nameLen: uint8(len(e.Name))})
		b.names.Write(e.Name)
	}
	return list, nil
}

// compact numbers the reachable inodes and makes the arrays.
func (b *indexer) compact() (*index, error) {
	x := &index{names: strings.Clone(b.names.String()), extras: make([]extra, 1)}
	renumbered := make([]uint32, len(b.merged))
	for i := range b.merged {
		if b.nlink[i] > 0 {
			renumbered[i] = uint32(len(x.inos))
			x.inos = append(x.inos, b.inos[i])
		}
	}
	x.nodes = make([]node, 0, len(x.inos))
	blobs := make(map[blobKey]uint32)
	extras := make(map[string]uint32)
	for i, inode := range b.merged {
		if b.nlink[i] == 0 {
			continue
		}
		n := node{
			uid: inode.UID, gid: inode.GID, nlink: b.nlink[i], parent: renumbered[b.parent[i]],
			perm: inode.Perm, kind: inode.Kind, extra: x.addExtra(inode, extras),
		}
		switch inode.Kind {
		case format.KindDir:
			n.first, n.count = uint32(len(x.entries)), uint32(len(b.lists[i]))
			for _, e := range b.lists[i] {
				e.node = renumbered[e.node]
				x.entries = append(x.entries, e)
			}
			n.nlink = max(n.nlink, 2)
		case format.KindFile:
			n.first = uint32(len(x.chunks))
			n.size = x.addChunks(inode, blobs)
			n.count = uint32(len(x.chunks)) - n.first
			x.stats.Bytes += n.size
			if x.stats.Bytes > math.MaxInt64 {
				return nil, fmt.Errorf("all files together are larger than 2^63-1 bytes: %w", format.ErrTooLarge)
			}
		case format.KindSymlink:
			n.size = uint64(len(inode.Symlink))
		case format.KindChr, format.KindBlk:
			n.size = inode.Major<<32 | inode.Minor
		case format.KindUnknown, format.KindFifo, format.KindSocket, format.KindWhiteout:
			// nothing more to keep
		}
		x.nodes = append(x.nodes, n)
	}
	x.finish()
	return x, nil
}

// finish computes what follows from the arrays.
func (x *index) finish() {
	x.entries, x.chunks = slices.Clip(x.entries), slices.Clip(x.chunks)
	x.stats.Inodes = uint64(len(x.nodes))
	x.stats.Entries = uint64(len(x.entries))
	x.stats.Blobs = len(x.blobs)
	x.stats.MaxIno = x.inos[len(x.inos)-1]
	if x.stats.MaxIno < 2*uint64(len(x.inos))+1024 {
		x.dense = make([]uint32, x.stats.MaxIno+1)
		for i, ino := range x.inos {
			x.dense[ino] = uint32(i) + 1
		}
	}
}

// blobKey tells blobs apart. A blob that is referred to as compressed and as raw is two.
type blobKey struct {
	digest     format.Digest
	compressed bool
}

// addChunks adds the byte ranges of a file and returns its size. Ranges without bytes are
// left out.
func (x *index) addChunks(inode *format.Inode, blobs map[blobKey]uint32) uint64 {
	var size uint64
	for i := range inode.Chunks {
		c := &inode.Chunks[i]
		if c.Len == 0 {
			continue
		}
		key := blobKey{c.Blob.Digest, c.Blob.Compressed}
		n, ok := blobs[key]
		if !ok {
			n = uint32(len(x.blobs))
			blobs[key] = n
			x.blobs = append(x.blobs, blob{digest: c.Blob.Digest, compressed: c.Blob.Compressed})
		}
		x.blobs[n].extent = max(x.blobs[n].extent, c.Blob.Offset+c.Len)
		size += c.Len
		x.chunks = append(x.chunks, extent{end: size, off: c.Blob.Offset, blob: n})
	}
	return size
}

// addExtra adds what an inode has beyond the node, once for all that have the same.
func (x *index) addExtra(inode *format.Inode, extras map[string]uint32) uint32 {
	if len(inode.Xattrs) == 0 && inode.Kind != format.KindSymlink {
		return 0
	}
	var key strings.Builder
	if inode.Kind == format.KindSymlink {
		fmt.Fprintf(&key, "%d:%s", len(inode.Symlink), inode.Symlink)
	}
	for _, a := range inode.Xattrs {
		fmt.Fprintf(&key, "|%d:%s%d:%s", len(a.Key), a.Key, len(a.Val), a.Val)
	}
	if n, ok := extras[key.String()]; ok {
		return n
	}
	e := extra{}
	if inode.Kind == format.KindSymlink {
		e.symlink = string(inode.Symlink)
	}
	for _, a := range inode.Xattrs {
		e.xattrs = append(e.xattrs, format.Xattr{Key: slices.Clone(a.Key), Val: slices.Clone(a.Val)})
		x.hasXattrs = true
	}
	slices.SortStableFunc(e.xattrs, func(a, b format.Xattr) int { return cmp.Compare(string(a.Key), string(b.Key)) })
	n := uint32(len(x.extras))
	extras[key.String()] = n
	x.extras = append(x.extras, e)
	return n
}

// pathNames yields the names of a path separated by slashes, without empty ones and ".".
func pathNames(path string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for name := range strings.SplitSeq(path, "/") {
			if name != "" && name != "." && !yield(name) {
				return
			}
		}
	}
}
