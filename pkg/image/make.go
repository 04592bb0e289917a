package image

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// maker makes the arrays of an index. Inodes are added in the order of their numbers.
type maker struct {
	x       *index
	names   strings.Builder
	targets strings.Builder
	blobs   blobTable
	shared  sharedTable
}

// newMaker returns one with room for so many of each. More can be added.
func newMaker(inodes, chunks, blobs int) *maker {
	m := &maker{x: &index{nodes: make([]node, 0, inodes), chunks: make([]extent, 0, chunks), blobs: make([]blob, 0, blobs)}}
	m.blobs.seed = maphash.MakeSeed()
	m.blobs.grow(m.x, blobs)
	m.shared.numbers = make(map[string]uint32)
	return m
}

// addEntry adds an entry to the directory that is being listed.
func (m *maker) addEntry(name []byte, n uint32) {
	m.x.entries = append(m.x.entries, entry{name: uint32(m.names.Len()), node: n})
	m.names.Write(name)
}

// fill sets what a node has of its inode alone.
func (m *maker) fill(n *node, inode *format.Inode) error {
	n.perm, n.kind, n.shared = inode.Perm, inode.Kind, m.share(inode)
	switch inode.Kind {
	case format.KindFile:
		n.first = uint32(len(m.x.chunks))
		n.size = m.addChunks(inode.Chunks)
		n.count = uint32(len(m.x.chunks)) - n.first
		if m.x.stats.Bytes += n.size; m.x.stats.Bytes > math.MaxInt64 {
			return fmt.Errorf("all files together are larger than 2^63-1 bytes: %w", format.ErrTooLarge)
		}
	case format.KindSymlink:
		n.first, n.size = uint32(m.targets.Len()), uint64(len(inode.Symlink))
		m.targets.Write(inode.Symlink)
	case format.KindChr, format.KindBlk:
		n.size = inode.Major<<32 | inode.Minor
	case format.KindDir, format.KindUnknown, format.KindFifo, format.KindSocket, format.KindWhiteout:
		// nothing more to keep
	}
	return nil
}

// addChunks adds the byte ranges of a file and returns its size. Ranges without bytes are
// left out.
func (m *maker) addChunks(chunks []format.FileChunk) uint64 {
	var size uint64
	for i := range chunks {
		c := &chunks[i]
		if c.Len == 0 {
			continue
		}
		n := m.blobs.number(m.x, &c.Blob)
		m.x.blobs[n].extent = max(m.x.blobs[n].extent, c.Blob.Offset+c.Len)
		size += c.Len
		m.x.chunks = append(m.x.chunks, extent{end: size, off: c.Blob.Offset, blob: n})
	}
	return size
}

// finish returns the index, with what follows from the arrays.
func (m *maker) finish(numbers numbers) (*index, error) {
	x := m.x
	if max(m.names.Len(), m.targets.Len()) > math.MaxUint32 {
		return nil, fmt.Errorf("names of %d bytes and symlinks of %d: %w", m.names.Len(), m.targets.Len(), format.ErrTooLarge)
	}
	x.numbers = numbers
	x.stats.Inodes = uint64(len(x.nodes))
	x.stats.Entries = uint64(len(x.entries))
	x.stats.Blobs = len(x.blobs)
	x.stats.MaxIno = x.ino(uint32(len(x.nodes) - 1))
	x.entries = fit(append(x.entries, entry{name: uint32(m.names.Len())}))
	x.nodes, x.chunks, x.blobs, x.shared = fit(x.nodes), fit(x.chunks), fit(x.blobs), fit(x.shared)
	x.names, x.targets = fitString(&m.names), fitString(&m.targets)
	return x, nil
}

// fit returns a list that keeps little more memory than it needs: how much room was made for it is up to
// what a hostile image has and does not use.
func fit[T any](list []T) []T {
	if cap(list)-len(list) > len(list)/4 {
		return append(make([]T, 0, len(list)), list...)
	}
	return list
}

// fitString is fit for a text.
func fitString(b *strings.Builder) string {
	if b.Cap()-b.Len() > b.Len()/4 {
		return strings.Clone(b.String())
	}
	return b.String()
}

// blobTable knows the numbers of the blobs so far, in the order in which files refer to them. A blob that is
// referred to as compressed and as raw is two. It is a hash table of numbers alone: the digests are in the index.
type blobTable struct {
	seed  maphash.Seed // a hostile image must not know which digests collide
	slots []uint32     // number+1, or 0; a power of two, at most half of them used
	last  uint32       // the one that was asked for last: many small files share a blob
}

// number returns the number of a blob, which is added if it is not there.
func (t *blobTable) number(x *index, ref *format.BlobRef) uint32 {
	same := func(n uint32) bool {
		return x.blobs[n].digest == ref.Digest && x.blobs[n].compressed == ref.Compressed
	}
	if len(x.blobs) > 0 && same(t.last) {
		return t.last
	}
	i := t.slot(&ref.Digest)
	for ; t.slots[i] != 0; i = (i + 1) % uint64(len(t.slots)) {
		if n := t.slots[i] - 1; same(n) {
			t.last = n
			return n
		}
	}
	t.last = uint32(len(x.blobs))
	x.blobs = append(x.blobs, blob{digest: ref.Digest, compressed: ref.Compressed})
	t.slots[i] = t.last + 1
	if 2*len(x.blobs) > len(t.slots) {
		t.grow(x, 2*len(x.blobs))
	}
	return t.last
}

// slot returns where to begin to look for a digest.
func (t *blobTable) slot(d *format.Digest) uint64 {
	return maphash.Bytes(t.seed, d[:]) % uint64(len(t.slots))
}

// grow makes room for n blobs.
func (t *blobTable) grow(x *index, n int) {
	size := 64
	for size < 2*n {
		size *= 2
	}
	t.slots = make([]uint32, size)
	for n := range x.blobs {
		i := t.slot(&x.blobs[n].digest)
		for t.slots[i] != 0 {
			i = (i + 1) % uint64(len(t.slots))
		}
		t.slots[i] = uint32(n) + 1
	}
}

// sharedTable knows what inodes have in common so far.
type sharedTable struct {
	numbers   map[string]uint32
	key, last []byte // last is the key of number, which was asked for last
	number    uint32
}

// ownerBytes is how long the key of an inode is that has no extended attributes.
const ownerBytes = 8

// share adds the owner and the extended attributes of an inode, once for all that have the same.
func (m *maker) share(inode *format.Inode) uint32 {
	t := &m.shared
	if len(t.last) == ownerBytes && len(inode.Xattrs) == 0 {
		if last := &m.x.shared[t.number]; last.uid == inode.UID && last.gid == inode.GID {
			return t.number
		}
	}
	t.key = binary.LittleEndian.AppendUint32(t.key[:0], inode.UID)
	t.key = binary.LittleEndian.AppendUint32(t.key, inode.GID)
	for i := range inode.Xattrs {
		for _, b := range [][]byte{inode.Xattrs[i].Key, inode.Xattrs[i].Val} {
			t.key = append(binary.AppendUvarint(t.key, uint64(len(b))), b...)
		}
	}
	if bytes.Equal(t.key, t.last) {
		return t.number
	}
	n, ok := t.numbers[string(t.key)]
	if !ok {
		n = uint32(len(m.x.shared))
		t.numbers[string(t.key)] = n
		m.x.shared = append(m.x.shared, shared{xattrs: m.cloneXattrs(inode.Xattrs), uid: inode.UID, gid: inode.GID})
	}
	t.key, t.last, t.number = t.last, t.key, n
	return n
}

// cloneXattrs returns a copy, sorted by name.
func (m *maker) cloneXattrs(xattrs []format.Xattr) []format.Xattr {
	if len(xattrs) == 0 {
		return nil
	}
	m.x.hasXattrs = true
	sorted := make([]format.Xattr, len(xattrs))
	for i, x := range xattrs {
		sorted[i] = format.Xattr{Key: slices.Clone(x.Key), Val: slices.Clone(x.Val)}
	}
	slices.SortStableFunc(sorted, func(a, b format.Xattr) int { return cmp.Compare(string(a.Key), string(b.Key)) })
	return sorted
}
