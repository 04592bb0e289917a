package format

import (
	"fmt"
	"iter"
)

// EncodeRootfs encodes a version 3 rootfs message, byte for byte as the reference's
// encoder does for the same value. r.Version and r.Metadatas are not looked at. The
// lists must be sorted as [Rootfs] and [InodeVector] say.
//
// It fails with ErrCorrupt where DecodeRootfs would refuse an inode, and with ErrTooLarge
// where the message would exceed MaxRootfsSize.
func EncodeRootfs(r *Rootfs) ([]byte, error) {
	return EncodePieces(r.pieces(), r.Verity)
}

// pieces returns the layers, in a piece each.
func (r *Rootfs) pieces() []Pieces {
	layers := make([]Pieces, len(r.Layers))
	for i, layer := range r.Layers {
		layers[i] = Pieces{layer}
	}
	return layers
}

// Pieces are a layer whose inodes are not in one list: those of each list follow those of the one before.
type Pieces []InodeVector

// Len returns how many inodes there are.
func (p Pieces) Len() int {
	n := 0
	for _, v := range p {
		n += len(v)
	}
	return n
}

// All yields the inodes, counted from 0.
func (p Pieces) All() iter.Seq2[int, *Inode] {
	return func(yield func(int, *Inode) bool) {
		before := 0
		for _, v := range p {
			for i := range v {
				if !yield(before+i, &v[i]) {
					return
				}
			}
			before += len(v)
		}
	}
}

// EncodePieces is EncodeRootfs for who does not have the layers in one list each.
func EncodePieces(layers []Pieces, verity []VerityData) ([]byte, error) {
	b, err := newMessage(wordsOf(layers, verity)).rootfs(layers, verity)
	if err != nil {
		return nil, fmt.Errorf("encode rootfs: %w", err)
	}
	return b, nil
}

// The order in which objects are allocated, here and below, decides where they lie, and
// so is part of the format (docs/format.md, "Segment layout").
func (m *message) rootfs(pieces []Pieces, sums []VerityData) ([]byte, error) {
	root, err := m.structAt(m.rootPointer(), structSize{data: 1, pointers: 2})
	if err != nil {
		return nil, err
	}
	m.putUint64(root, 0, uint64(Version3))
	layers, err := m.listAt(root.pointer(0), len(pieces), structSize{pointers: 1})
	if err != nil {
		return nil, err
	}
	for i, layer := range pieces {
		if err := m.inodeVector(layers.at(i), layer); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
	}
	verity, err := m.listAt(root.pointer(1), len(sums), structSize{pointers: 2})
	if err != nil {
		return nil, err
	}
	for i := range sums {
		if err := m.dataAt(verity.at(i).pointer(0), sums[i].Digest[:]); err != nil {
			return nil, err
		}
		if err := m.dataAt(verity.at(i).pointer(1), sums[i].Verity[:]); err != nil {
			return nil, err
		}
	}
	b := m.bytes()
	if len(b) > MaxRootfsSize {
		return nil, fmt.Errorf("%d bytes, at most %d are written: %w", len(b), MaxRootfsSize, ErrTooLarge)
	}
	return b, nil
}

// wordsOf returns about how many words a message takes, rarely too few.
func wordsOf(layers []Pieces, verity []VerityData) int {
	n := 8 + 11*len(verity)
	for _, layer := range layers {
		n += 2
		for _, inode := range layer.All() {
			n += inode.words()
		}
	}
	// What does not fit into the segment of its pointer has a landing pad, and leaves room behind.
	return min(n+n/8, MaxRootfsSize/wordSize)
}

// words returns about how many words the inode takes in a message.
func (i *Inode) words() int {
	of := func(b []byte) int { return (len(b) + wordSize - 1) / wordSize }
	n := 5 + 2 + 3 + 9*len(i.Chunks) + 2*len(i.Entries)
	for k := range i.Entries {
		n += of(i.Entries[k].Name)
	}
	if len(i.Xattrs) > 0 || i.Symlink != nil {
		n += 3 + 2*len(i.Xattrs) + of(i.Symlink)
		for k := range i.Xattrs {
			n += of(i.Xattrs[k].Key) + of(i.Xattrs[k].Val)
		}
	}
	return n
}

func (m *message) inodeVector(vector object, inodes Pieces) error {
	list, err := m.listAt(vector.pointer(0), inodes.Len(), structSize{data: 3, pointers: 2})
	if err != nil {
		return err
	}
	for i, inode := range inodes.All() {
		err := inode.validate()
		if err == nil {
			err = m.inode(list.at(i), inode)
		}
		if err != nil {
			return fmt.Errorf("inode %d: %w", inode.Ino, err)
		}
	}
	return nil
}

// inode writes the three words and two pointers of struct Inode:
//
//	word 0  ino
//	word 1  union tag (16 bits), permissions (16), uid (32)
//	word 2  gid (32)
//	pointer 0  the body of the mode, pointer 1  the additional data
func (m *message) inode(o object, i *Inode) error {
	m.putUint64(o, 0, i.Ino)
	m.putUint64(o, 1, uint64(i.Kind)|uint64(i.Perm)<<16|uint64(i.UID)<<32)
	m.putUint64(o, 2, uint64(i.GID))
	var err error
	switch i.Kind {
	case KindChr, KindBlk:
		err = m.device(o.pointer(0), i)
	case KindDir:
		err = m.directory(o.pointer(0), i)
	case KindFile:
		err = m.file(o.pointer(0), i)
	case KindUnknown, KindFifo, KindSymlink, KindSocket, KindWhiteout:
		// nothing but the tag
	default:
		err = fmt.Errorf("%s: %w", i.Kind, ErrCorrupt)
	}
	if err != nil {
		return err
	}
	if len(i.Xattrs) == 0 && i.Symlink == nil {
		return nil
	}
	return m.additional(o.pointer(1), i)
}

func (m *message) device(p pointer, i *Inode) error {
	o, err := m.structAt(p, structSize{data: 2})
	if err != nil {
		return err
	}
	m.putUint64(o, 0, i.Major)
	m.putUint64(o, 1, i.Minor)
	return nil
}

func (m *message) directory(p pointer, i *Inode) error {
	o, err := m.structAt(p, structSize{data: 1, pointers: 1})
	if err != nil {
		return err
	}
	if i.LookBelow {
		m.putUint64(o, 0, 1)
	}
	entries, err := m.listAt(o.pointer(0), len(i.Entries), structSize{data: 1, pointers: 1})
	if err != nil {
		return err
	}
	for k := range i.Entries {
		m.putUint64(entries.at(k), 0, i.Entries[k].Ino)
		if err := m.dataAt(entries.at(k).pointer(0), i.Entries[k].Name); err != nil {
			return err
		}
	}
	return nil
}

func (m *message) file(p pointer, i *Inode) error {
	chunks, err := m.listAt(p, len(i.Chunks), structSize{data: 1, pointers: 1})
	if err != nil {
		return err
	}
	for k := range i.Chunks {
		c := &i.Chunks[k]
		m.putUint64(chunks.at(k), 0, c.Len)
		ref, err := m.structAt(chunks.at(k).pointer(0), structSize{data: 2, pointers: 1})
		if err != nil {
			return err
		}
		if err := m.dataAt(ref.pointer(0), c.Blob.Digest[:]); err != nil {
			return err
		}
		m.putUint64(ref, 0, c.Blob.Offset)
		if c.Blob.Compressed {
			m.putUint64(ref, 1, 1)
		}
	}
	return nil
}

func (m *message) additional(p pointer, i *Inode) error {
	o, err := m.structAt(p, structSize{pointers: 2})
	if err != nil {
		return err
	}
	xattrs, err := m.listAt(o.pointer(0), len(i.Xattrs), structSize{pointers: 2})
	if err != nil {
		return err
	}
	for k := range i.Xattrs {
		// The reference sets the value before the key.
		if err := m.dataAt(xattrs.at(k).pointer(1), i.Xattrs[k].Val); err != nil {
			return err
		}
		if err := m.dataAt(xattrs.at(k).pointer(0), i.Xattrs[k].Key); err != nil {
			return err
		}
	}
	if i.Symlink == nil {
		return nil
	}
	return m.dataAt(o.pointer(1), i.Symlink)
}
