package format

import (
	"bytes"
	"encoding/binary"
	"math"
)

// quick decodes messages of version 3 that look as writers make them: structs and lists with the
// sizes of the schema, and no more far pointers than segments demand. It reads the words itself, which
// takes a third of the time that the capnp library takes, whose accessors are made for more. It never
// fails: of any other message it says that it is not for it, and what is wrong with it, if anything,
// is up to the library to say. That both agree is fuzzed.
type quick struct {
	d        *decoder
	segments [][]byte
	// left is how many bytes may yet be read. An honest message has each read once.
	left int
}

// quickRootfs decodes a message. ok is false for one that quick is not for.
func quickRootfs(b []byte, l *Limits) (r *Rootfs, ok bool) {
	if len(b) > MaxRootfsSize || checkFraming(b) != nil {
		return nil, false
	}
	q := quick{d: &decoder{version: Version3, budget: len(b) / 8, limits: l}}
	return q.rootfs(b)
}

// rootfs decodes a message whose framing has been checked.
func (q *quick) rootfs(b []byte) (r *Rootfs, ok bool) {
	layers, verity, ok := q.root(b)
	if !ok {
		return nil, false
	}
	r = &Rootfs{Version: Version3, Layers: make([]InodeVector, layers.n)}
	for i := range r.Layers {
		if r.Layers[i], ok = q.layer(layers.at(i)); !ok {
			return nil, false
		}
	}
	r.Verity, ok = q.verities(verity)
	if !ok {
		return nil, false
	}
	return r, true
}

// root finds the lists of layers and of fs-verity digests.
func (q *quick) root(b []byte) (layers, verity structures, ok bool) {
	q.split(b)
	if len(q.segments[0]) < 8 {
		return layers, verity, false
	}
	q.left = 2*len(b) + 4096
	root, ok := q.structAt(ref{q.segments[0], 0}, 8, 2)
	if !ok || root.uint64(0) != uint64(Version3) {
		return layers, verity, false
	}
	layers, ok = q.list(root.ptr(0), 0, 1)
	if !ok || q.d.take(layers.n, sizeOfLayer) != nil {
		return layers, verity, false
	}
	verity, ok = q.list(root.ptr(1), 0, 2)
	return layers, verity, ok && q.d.take(verity.n, sizeOfVerity) == nil
}

// verities decodes the list of fs-verity digests.
func (q *quick) verities(list structures) ([]VerityData, bool) {
	verity := make([]VerityData, list.n)
	for i := range verity {
		s, v := list.at(i), &verity[i]
		if !q.digest(s.ptr(0), (*[32]byte)(&v.Digest)) || !q.digest(s.ptr(1), &v.Verity) {
			return nil, false
		}
		if i > 0 && bytes.Compare(verity[i-1].Digest[:], v.Digest[:]) >= 0 {
			return nil, false
		}
	}
	return verity, true
}

// split finds the segments.
func (q *quick) split(b []byte) {
	n := int(binary.LittleEndian.Uint32(b)) + 1
	off := (4 + 4*n + 7) / 8 * 8
	q.segments = make([][]byte, n)
	for i := range q.segments {
		size := 8 * int(binary.LittleEndian.Uint32(b[4+4*i:]))
		q.segments[i] = b[off : off+size : off+size]
		off += size
	}
}

func (q *quick) layer(s structure) (InodeVector, bool) {
	list, ok := q.inodes(s)
	if !ok {
		return nil, false
	}
	inodes := make(InodeVector, list.n)
	for i := range inodes {
		inode := &inodes[i]
		if !q.inode(list.at(i), inode) || inode.validate() != nil || i > 0 && inode.Ino < inodes[i-1].Ino {
			return nil, false
		}
	}
	return inodes, true
}

// inodes finds the list of a layer.
func (q *quick) inodes(s structure) (structures, bool) {
	list, ok := q.list(s.ptr(0), 24, 2)
	if !ok || q.d.take(list.n, sizeOfInode) != nil {
		return list, false
	}
	limits := q.d.limits
	limits.inodes += uint64(list.n)
	return list, limits.Inodes == 0 || limits.inodes <= limits.Inodes
}

func (q *quick) inode(s structure, out *Inode) bool {
	out.Ino = s.uint64(0)
	out.Kind = Kind(min(s.uint16(8), math.MaxUint8))
	out.Perm = s.uint16(10)
	out.UID, out.GID = s.uint32(12), s.uint32(16)
	ok := true
	switch out.Kind {
	case KindUnknown, KindFifo, KindSymlink, KindSocket, KindWhiteout:
	case KindChr, KindBlk:
		var device structure
		device, ok = q.structAt(s.ptr(0), 16, 0)
		if ok {
			out.Major, out.Minor = device.uint64(0), device.uint64(8)
		}
	case KindDir:
		var dir structure
		dir, ok = q.structAt(s.ptr(0), 8, 1)
		if ok {
			out.LookBelow = dir.b[0]&1 != 0
			ok = q.entries(dir.ptr(0), out)
		}
	case KindFile:
		ok = q.chunks(s.ptr(0), out)
	default:
		return false
	}
	return ok && (s.ptr(1).null() || q.additional(s.ptr(1), out))
}

func (q *quick) entries(at ref, out *Inode) bool {
	list, ok := q.list(at, 8, 1)
	if !ok || q.d.take(list.n, sizeOfEntry) != nil {
		return false
	}
	out.Entries = takeList(&q.d.spareEntries, list.n)
	for i := range out.Entries {
		s, e := list.at(i), &out.Entries[i]
		e.Ino = s.uint64(0)
		if e.Name, ok = q.data(s.ptr(0)); !ok {
			return false
		}
	}
	return true
}

func (q *quick) chunks(at ref, out *Inode) bool {
	list, ok := q.list(at, 8, 1)
	if !ok || q.d.take(list.n, sizeOfChunk) != nil {
		return false
	}
	out.Chunks = takeList(&q.d.spareChunks, list.n)
	for i := range out.Chunks {
		s, c := list.at(i), &out.Chunks[i]
		c.Len = s.uint64(0)
		blob, ok := q.structAt(s.ptr(0), 16, 1)
		if !ok || !q.digest(blob.ptr(0), (*[32]byte)(&c.Blob.Digest)) {
			return false
		}
		c.Blob.Offset, c.Blob.Compressed = blob.uint64(0), blob.b[8]&1 != 0
	}
	return true
}

func (q *quick) additional(at ref, out *Inode) bool {
	s, ok := q.structAt(at, 0, 2)
	if !ok {
		return false
	}
	list, ok := q.list(s.ptr(0), 0, 2)
	if !ok || q.d.take(list.n, sizeOfXattr) != nil {
		return false
	}
	if list.n > 0 {
		out.Xattrs = make([]Xattr, list.n)
	}
	for i := range out.Xattrs {
		x := list.at(i)
		if out.Xattrs[i].Key, ok = q.data(x.ptr(0)); !ok {
			return false
		}
		if out.Xattrs[i].Val, ok = q.data(x.ptr(1)); !ok {
			return false
		}
	}
	if !s.ptr(1).null() {
		out.Symlink, ok = q.data(s.ptr(1))
	}
	return ok
}

func (q *quick) digest(at ref, to *[32]byte) bool {
	b, ok := q.data(at)
	if !ok || len(b) != len(to) {
		return false
	}
	copy(to[:], b)
	return true
}

// ref is a place in a segment, of a pointer that is there.
type ref struct {
	segment []byte
	off     int
}

func (r ref) word() uint64 { return binary.LittleEndian.Uint64(r.segment[r.off:]) }
func (r ref) null() bool   { return r.word() == 0 }

// structure is a struct: its data, and its pointers behind it.
type structure struct {
	b    []byte // data
	ptrs ref    // the first pointer, if there are any
}

func (s structure) uint64(off int) uint64 { return binary.LittleEndian.Uint64(s.b[off:]) }
func (s structure) uint32(off int) uint32 { return binary.LittleEndian.Uint32(s.b[off:]) }
func (s structure) uint16(off int) uint16 { return binary.LittleEndian.Uint16(s.b[off:]) }
func (s structure) ptr(i int) ref         { return ref{s.ptrs.segment, s.ptrs.off + 8*i} }

// structures is a list of n structs.
type structures struct {
	segment    []byte
	off        int
	n          int
	data, size int // of a struct, in bytes
}

func (l structures) at(i int) structure {
	off := l.off + i*l.size
	return structure{l.segment[off : off+l.data], ref{l.segment, off + l.data}}
}

// Kinds of pointers, the lowest two bits, and of list elements.
const (
	structPointer = 0
	listPointer   = 1
	farPointer    = 2

	byteElements      = 2
	compositeElements = 7
)

// follow returns a pointer of a kind and where its target begins.
func (q *quick) follow(at ref, kind uint64) (w uint64, segment []byte, off int, ok bool) {
	w = at.word()
	if w&7 == farPointer { // to one word
		id := w >> 32
		pad := 8 * int(uint32(w)>>3)
		if id >= uint64(len(q.segments)) || pad+8 > len(q.segments[id]) {
			return 0, nil, 0, false
		}
		at = ref{q.segments[id], pad}
		w = at.word()
	}
	off = at.off + 8 + 8*(int(int32(uint32(w)))>>2)
	return w, at.segment, off, w != 0 && w&3 == kind && off >= 0
}

// spend notes that n bytes from off on are read.
func (q *quick) spend(segment []byte, off, n int) bool {
	if q.left -= n; q.left < 0 {
		return false
	}
	return off <= len(segment) && n <= len(segment)-off
}

// structAt returns a struct that has so many bytes of data and pointers at least.
func (q *quick) structAt(at ref, data, ptrs int) (structure, bool) {
	w, segment, off, ok := q.follow(at, structPointer)
	d, p := 8*int(w>>32&math.MaxUint16), int(w>>48)
	if !ok || d < data || p < ptrs || !q.spend(segment, off, d+8*p) {
		return structure{}, false
	}
	return structure{segment[off : off+d], ref{segment, off + d}}, true
}

// list returns a list of such structs.
func (q *quick) list(at ref, data, ptrs int) (structures, bool) {
	w, segment, off, ok := q.follow(at, listPointer)
	words := int(w >> 35)
	if !ok || w>>32&7 != compositeElements || !q.spend(segment, off, 8+8*words) {
		return structures{}, false
	}
	tag := binary.LittleEndian.Uint64(segment[off:])
	n, d, p := int(uint32(tag)>>2), 8*int(tag>>32&math.MaxUint16), int(tag>>48)
	if tag&3 != structPointer || n >= 1<<29 || n*(d+8*p) != 8*words || n > 0 && (d < data || p < ptrs) {
		return structures{}, false
	}
	return structures{segment: segment, off: off + 8, n: n, data: d, size: d + 8*p}, true
}

// data returns a list of bytes, of the message itself.
func (q *quick) data(at ref) ([]byte, bool) {
	w, segment, off, ok := q.follow(at, listPointer)
	n := int(w >> 35)
	if !ok || w>>32&7 != byteElements || !q.spend(segment, off, (n+7)/8*8) {
		return nil, false
	}
	return segment[off : off+n : off+n], true
}
