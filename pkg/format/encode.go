package format

import "fmt"

// EncodeRootfs encodes a version 3 rootfs message, byte for byte as the reference's
// encoder does for the same value. r.Version and r.Metadatas are not looked at. The
// lists must be sorted as [Rootfs] and [InodeVector] say.
//
// It fails with ErrCorrupt where DecodeRootfs would refuse an inode, and with ErrTooLarge
// where the message would exceed MaxRootfsSize.
func EncodeRootfs(r *Rootfs) ([]byte, error) {
	b, err := encodeRootfs(r)
	if err != nil {
		return nil, fmt.Errorf("encode rootfs: %w", err)
	}
	return b, nil
}

// The order in which objects are allocated, here and below, decides where they lie, and
// so is part of the format (docs/format.md, "Segment layout").
func encodeRootfs(r *Rootfs) ([]byte, error) {
	m := newMessage()
	root, err := m.structAt(m.rootPointer(), structSize{data: 1, pointers: 2})
	if err != nil {
		return nil, err
	}
	m.putUint64(root, 0, uint64(Version3))
	layers, err := m.listAt(root.pointer(0), len(r.Layers), structSize{pointers: 1})
	if err != nil {
		return nil, err
	}
	for i, layer := range r.Layers {
		if err := m.inodeVector(layers.at(i), layer); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
	}
	verity, err := m.listAt(root.pointer(1), len(r.Verity), structSize{pointers: 2})
	if err != nil {
		return nil, err
	}
	for i := range r.Verity {
		if err := m.dataAt(verity.at(i).pointer(0), r.Verity[i].Digest[:]); err != nil {
			return nil, err
		}
		if err := m.dataAt(verity.at(i).pointer(1), r.Verity[i].Verity[:]); err != nil {
			return nil, err
		}
	}
	b := m.bytes()
	if len(b) > MaxRootfsSize {
		return nil, fmt.Errorf("%d bytes, at most %d are written: %w", len(b), MaxRootfsSize, ErrTooLarge)
	}
	return b, nil
}

func (m *message) inodeVector(vector object, inodes InodeVector) error {
	list, err := m.listAt(vector.pointer(0), len(inodes), structSize{data: 3, pointers: 2})
	if err != nil {
		return err
	}
	for i := range inodes {
		if err := inodes[i].validate(); err != nil {
			return fmt.Errorf("inode %d: %w", inodes[i].Ino, err)
		}
		if err := m.inode(list.at(i), &inodes[i]); err != nil {
			return fmt.Errorf("inode %d: %w", inodes[i].Ino, err)
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
