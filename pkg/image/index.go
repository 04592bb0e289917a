package image

import (
	"bytes"
	"cmp"
	"encoding/binary"
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
func (x *index) find(ino uint64) (uint32, bool) { return findIno(x.inos, x.dense, ino) }

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
	dense    []uint32 // see index
	names    []byte
	entries  []entry  // of all directories, each in one piece
	first    []uint32 // by node, where the entries of a directory begin
	count    []uint32 // by node, how many there are
	nlink    []uint32 // 0: no name leads here
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
	b.dense = denseOf(b.inos)
	numbers := make([]uint32, 4*len(b.merged))
	for _, to := range []*[]uint32{&b.nlink, &b.parent, &b.first, &b.count} {
		*to, numbers = numbers[:len(b.merged)], numbers[len(b.merged):]
	}
	b.entries = make([]entry, 0, len(b.merged))
	root, ok := findIno(b.inos, b.dense, format.RootIno)
	if !ok || b.merged[root] == nil || b.merged[root].Kind != format.KindDir {
		return fmt.Errorf("inode %d is not a directory: %w", format.RootIno, format.ErrCorrupt)
	}
	b.nlink[root] = 2
	b.parent[root] = root
	for queue := []uint32{root}; len(queue) > 0; {
		dir := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		b.first[dir] = uint32(len(b.entries))
		if err := b.list(dir); err != nil {
			return fmt.Errorf("directory %d: %w", b.inos[dir], err)
		}
		list := b.entries[b.first[dir]:]
		b.count[dir] = uint32(len(list))
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
	}
	return nil
}

// list adds the entries of a directory, sorted, without those that point at whiteouts.
func (b *indexer) list(dir uint32) error {
	sorted := b.merged[dir].Entries
	byName := func(x, y format.DirEntry) int { return bytes.Compare(x.Name, y.Name) }
	if !slices.IsSortedFunc(sorted, byName) {
		sorted = slices.SortedFunc(slices.Values(sorted), byName)
	}
	for i, e := range sorted {
		if i > 0 && bytes.Equal(e.Name, sorted[i-1].Name) {
			return fmt.Errorf("two entries are named %q: %w", e.Name, format.ErrCorrupt)
		}
		n, ok := findIno(b.inos, b.dense, e.Ino)
		if !ok {
			return fmt.Errorf("%q points at inode %d, which no layer has: %w", e.Name, e.Ino, format.ErrCorrupt)
		}
		target := b.merged[n]
		if target == nil {
			continue
		}
		if target.Kind == format.KindUnknown {
			return fmt.Errorf("%q is of no known kind: %w", e.Name, format.ErrCorrupt)
		}
		b.entries = append(b.entries, entry{name: uint32(len(b.names)), node: n, nameLen: uint8(len(e.Name))})
		b.names = append(b.names, e.Name...)
	}
	return nil
}

// compact numbers the reachable inodes and makes the arrays.
func (b *indexer) compact() (*index, error) {
	x := &index{names: string(b.names), entries: fit(b.entries), extras: make([]extra, 1)}
	renumbered := make([]uint32, len(b.merged))
	reachable, chunks := 0, 0
	for i, inode := range b.merged {
		if b.nlink[i] > 0 {
			renumbered[i] = uint32(reachable)
			reachable++
			chunks += len(inode.Chunks)
		}
	}
	x.inos = make([]uint64, 0, reachable)
	x.nodes = make([]node, 0, reachable)
	x.chunks = make([]extent, 0, chunks)
	for i := range x.entries {
		x.entries[i].node = renumbered[x.entries[i].node]
	}
	known := &blobNumbers{m: make(map[blobKey]uint32)}
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
			n.first, n.count = b.first[i], b.count[i]
			n.nlink = max(n.nlink, 2)
		case format.KindFile:
			n.first = uint32(len(x.chunks))
			n.size = x.addChunks(inode, known)
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
		x.inos = append(x.inos, b.inos[i])
		x.nodes = append(x.nodes, n)
	}
	x.finish(b)
	return x, nil
}

// finish computes what follows from the arrays.
func (x *index) finish(b *indexer) {
	x.chunks = fit(x.chunks)
	x.stats.Inodes = uint64(len(x.nodes))
	x.stats.Entries = uint64(len(x.entries))
	x.stats.Blobs = len(x.blobs)
	x.stats.MaxIno = x.inos[len(x.inos)-1]
	if len(x.inos) == len(b.inos) {
		x.dense = b.dense // nothing was left out
	} else {
		x.dense = denseOf(x.inos)
	}
}

// fit returns a list that keeps little more memory than it needs: how much room was made for it is up to
// what a hostile image has and does not use.
func fit[T any](list []T) []T {
	if cap(list)-len(list) > len(list)/4 {
		return append(make([]T, 0, len(list)), list...)
	}
	return list
}

// denseOf returns a table that finds sorted inode numbers, or nil if it would have more holes than numbers.
func denseOf(inos []uint64) []uint32 {
	if len(inos) == 0 || inos[len(inos)-1] >= 2*uint64(len(inos))+1024 {
		return nil
	}
	dense := make([]uint32, inos[len(inos)-1]+1)
	for i, ino := range inos {
		dense[ino] = uint32(i) + 1
	}
	return dense
}

// findIno returns where a number stands in a sorted list, for which there may be a table.
func findIno(inos []uint64, dense []uint32, ino uint64) (uint32, bool) {
	if dense != nil {
		if ino >= uint64(len(dense)) || dense[ino] == 0 {
			return 0, false
		}
		return dense[ino] - 1, true
	}
	i, ok := slices.BinarySearch(inos, ino)
	return uint32(i), ok
}

// blobKey tells blobs apart. A blob that is referred to as compressed and as raw is two.
type blobKey struct {
	digest     format.Digest
	compressed bool
}

// blobNumbers knows the numbers of the blobs so far.
type blobNumbers struct {
	m map[blobKey]uint32
	// last is the one that was asked for last: many small files share a blob.
	last   blobKey
	number uint32
}

// addChunks adds the byte ranges of a file and returns its size. Ranges without bytes are
// left out.
func (x *index) addChunks(inode *format.Inode, known *blobNumbers) uint64 {
	var size uint64
	for i := range inode.Chunks {
		c := &inode.Chunks[i]
		if c.Len == 0 {
			continue
		}
		n := x.addBlob(blobKey{c.Blob.Digest, c.Blob.Compressed}, known)
		x.blobs[n].extent = max(x.blobs[n].extent, c.Blob.Offset+c.Len)
		size += c.Len
		x.chunks = append(x.chunks, extent{end: size, off: c.Blob.Offset, blob: n})
	}
	return size
}

// addBlob returns the number of a blob.
func (x *index) addBlob(key blobKey, known *blobNumbers) uint32 {
	if len(x.blobs) > 0 && key == known.last {
		return known.number
	}
	n, ok := known.m[key]
	if !ok {
		n = uint32(len(x.blobs))
		known.m[key] = n
		x.blobs = append(x.blobs, blob{digest: key.digest, compressed: key.compressed})
	}
	known.last, known.number = key, n
	return n
}

// addExtra adds what an inode has beyond the node, once for all that have the same.
func (x *index) addExtra(inode *format.Inode, extras map[string]uint32) uint32 {
	if len(inode.Xattrs) == 0 && inode.Kind != format.KindSymlink {
		return 0
	}
	var key []byte
	add := func(b []byte) { key = append(binary.AppendUvarint(key, uint64(len(b))), b...) }
	if inode.Kind == format.KindSymlink {
		add(inode.Symlink)
	} else {
		add(nil) // no target is empty
	}
	for _, a := range inode.Xattrs {
		add(a.Key)
		add(a.Val)
	}
	if n, ok := extras[string(key)]; ok {
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
	extras[string(key)] = n
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
