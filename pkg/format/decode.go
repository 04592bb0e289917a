package format

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"unsafe"

	"capnproto.org/go/capnp/v3"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format/internal/wirev1"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format/internal/wirev2"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format/internal/wirev3"
)

// DecodeRootfs decodes and validates a rootfs message of any version. The names, targets
// and attributes in the result alias b, which must not change while they are in use.
// Memory is bounded by a small multiple of len(b), whatever b says.
//
// It fails with ErrCorrupt, ErrUnsupportedVersion or, beyond MaxRootfsSize, ErrTooLarge.
func DecodeRootfs(b []byte) (*Rootfs, error) { return new(Limits).DecodeRootfs(b) }

// Limits bound what is decoded, beyond what the package bounds by itself. All messages that
// are decoded with the same Limits count together. They are for one goroutine.
type Limits struct {
	// Inodes is how many inodes there may be in all layers, 0 for any number.
	Inodes uint64
	// Memory is about how many bytes the decoded values may take, 0 for any number.
	Memory uint64

	inodes, memory uint64 // so far
}

// DecodeRootfs is the function of that name. It fails with ErrTooManyInodes or ErrTooMuchMemory
// before it takes the memory.
func (l *Limits) DecodeRootfs(b []byte) (*Rootfs, error) {
	before := *l
	if r, ok := quickRootfs(b, l); ok {
		return r, nil
	}
	*l = before
	return l.decodeRootfs(b)
}

// decodeRootfs is DecodeRootfs for messages of any form.
func (l *Limits) decodeRootfs(b []byte) (*Rootfs, error) {
	d, root, err := newDecoder(b, l)
	if err != nil {
		return nil, fmt.Errorf("decode rootfs: %w", err)
	}
	// The version stands at the same place in all schemas.
	r := &Rootfs{Version: Version(wirev3.Rootfs(root).ManifestVersion())}
	switch r.Version {
	case Version1, Version2:
		err = d.rootfsV2(wirev2.Rootfs(root), r)
	case Version3:
		err = d.rootfsV3(wirev3.Rootfs(root), r)
	default:
		return nil, fmt.Errorf("decode rootfs: manifestVersion %d; versions 1, 2 and 3 are known: %w", r.Version, ErrUnsupportedVersion)
	}
	if err != nil {
		return nil, fmt.Errorf("decode rootfs: %w", err)
	}
	return r, nil
}

// DecodeInodeVector decodes and validates a metadata blob that a version 1 or 2 rootfs
// names. The result aliases b, as that of DecodeRootfs does.
func DecodeInodeVector(b []byte, v Version) (InodeVector, error) {
	return new(Limits).DecodeInodeVector(b, v)
}

// DecodeInodeVector is the function of that name, with errors as those of Limits.DecodeRootfs.
func (l *Limits) DecodeInodeVector(b []byte, v Version) (InodeVector, error) {
	d, root, err := newDecoder(b, l)
	if err != nil {
		return nil, fmt.Errorf("decode inode vector: %w", err)
	}
	d.version = v
	var inodes InodeVector
	switch v {
	case Version1:
		// The lists differ in the type of their elements only, and that only in how a
		// file's chunk list is reached, which d.chunkList knows.
		l, err := wirev1.InodeVector(root).Inodes()
		if err != nil {
			return nil, fmt.Errorf("decode inode vector: %w", corrupt("list of inodes", err))
		}
		inodes, err = d.inodes(wirev3.Inode_List(l))
		if err != nil {
			return nil, fmt.Errorf("decode inode vector: %w", err)
		}
	case Version2:
		l, err := wirev3.InodeVector(root).Inodes()
		if err != nil {
			return nil, fmt.Errorf("decode inode vector: %w", corrupt("list of inodes", err))
		}
		inodes, err = d.inodes(l)
		if err != nil {
			return nil, fmt.Errorf("decode inode vector: %w", err)
		}
	default:
		return nil, fmt.Errorf("decode inode vector: version %d has none: %w", v, ErrUnsupportedVersion)
	}
	return inodes, nil
}

// decoder turns one message into plain values.
type decoder struct {
	version Version
	// budget is how many list elements may still be allocated. An honest element takes at
	// least a word of the message, but a pointer costs a liar nothing, so that without it a
	// small message could claim lists of any length.
	budget int
	limits *Limits
	// spareEntries and spareChunks are room for lists: most have a few elements, and there are as many as
	// inodes.
	spareEntries []DirEntry
	spareChunks  []FileChunk
}

// listBlock is for how many elements room is made at once.
const listBlock = 1024

// takeList takes a list of n elements from what there is room for.
func takeList[T any](spare *[]T, n int) []T {
	if n == 0 {
		return []T{}
	}
	if n > len(*spare) {
		if n > listBlock/4 {
			return make([]T, n)
		}
		*spare = make([]T, listBlock)
	}
	l := (*spare)[:n:n]
	*spare = (*spare)[n:]
	return l
}

// newDecoder reads the framing of a message and returns its root struct.
func newDecoder(b []byte, l *Limits) (*decoder, capnp.Struct, error) {
	if len(b) > MaxRootfsSize {
		return nil, capnp.Struct{}, fmt.Errorf("%d bytes, at most %d are read: %w", len(b), MaxRootfsSize, ErrTooLarge)
	}
	if err := checkFraming(b); err != nil {
		return nil, capnp.Struct{}, err
	}
	msg, err := capnp.Unmarshal(b)
	if err != nil {
		return nil, capnp.Struct{}, corrupt("message", err)
	}
	// Every byte is read once by an honest message; twice that leaves room for pointers
	// that are looked at more than once, and bounds what a message can claim by aliasing.
	msg.ResetReadLimit(2*uint64(len(b)) + 4096)
	root, err := msg.Root()
	if err != nil {
		return nil, capnp.Struct{}, corrupt("root pointer", err)
	}
	if !root.Struct().IsValid() {
		return nil, capnp.Struct{}, fmt.Errorf("the root is not a struct: %w", ErrCorrupt)
	}
	return &decoder{version: Version3, budget: len(b) / 8, limits: l}, root.Struct(), nil
}

// maxSegments bounds the segments of a message, as the capnp libraries do. An empty one takes
// four bytes of the message but ten times that in memory; what the reference writes doubles
// with every segment, so that twenty make up the largest message.
const maxSegments = 512

// checkFraming demands that the segment table accounts for every byte.
func checkFraming(b []byte) error {
	if len(b) < 16 || len(b)%8 != 0 {
		return fmt.Errorf("%d bytes are not a Cap'n Proto message: %w", len(b), ErrCorrupt)
	}
	segments := uint64(binary.LittleEndian.Uint32(b)) + 1
	if segments > maxSegments {
		return fmt.Errorf("%d segments, at most %d are read: %w", segments, maxSegments, ErrCorrupt)
	}
	header := (4 + 4*segments + 7) / 8 * 8
	if header > uint64(len(b)) {
		return fmt.Errorf("segment table of %d segments in %d bytes: %w", segments, len(b), ErrCorrupt)
	}
	total := header
	for i := range segments {
		total += 8 * uint64(binary.LittleEndian.Uint32(b[4+4*i:]))
	}
	if total != uint64(len(b)) {
		return fmt.Errorf("segments of %d bytes in a message of %d (truncated?): %w", total, len(b), ErrCorrupt)
	}
	return nil
}

func (d *decoder) rootfsV3(root wirev3.Rootfs, r *Rootfs) error {
	layers, err := root.Metadatas()
	if err != nil {
		return corrupt("list of layers", err)
	}
	if err := d.take(layers.Len(), sizeOfLayer); err != nil {
		return fmt.Errorf("list of layers: %w", err)
	}
	r.Layers = make([]InodeVector, layers.Len())
	for i := range r.Layers {
		inodes, err := layers.At(i).Inodes()
		if err != nil {
			return corrupt(fmt.Sprintf("layer %d", i), err)
		}
		if r.Layers[i], err = d.inodes(inodes); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	list, err := root.FsVerityData()
	if err != nil {
		return corrupt("list of fs-verity data", err)
	}
	r.Verity, err = d.verityData(list)
	return err
}

func (d *decoder) rootfsV2(root wirev2.Rootfs, r *Rootfs) error {
	refs, err := root.Metadatas()
	if err != nil {
		return corrupt("list of layers", err)
	}
	if err := d.take(refs.Len(), sizeOfRef); err != nil {
		return fmt.Errorf("list of layers: %w", err)
	}
	r.Metadatas = make([]BlobRef, refs.Len())
	for i := range r.Metadatas {
		if r.Metadatas[i], err = blobRef(refs.At(i)); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	list, err := root.FsVerityData()
	if err != nil {
		return corrupt("list of fs-verity data", err)
	}
	r.Verity, err = d.verityData(list)
	return err
}

func (d *decoder) verityData(list wirev3.VerityData_List) ([]VerityData, error) {
	if err := d.take(list.Len(), sizeOfVerity); err != nil {
		return nil, fmt.Errorf("list of fs-verity data: %w", err)
	}
	data := make([]VerityData, list.Len())
	for i := range data {
		digest, err := list.At(i).Digest()
		if err != nil {
			return nil, corrupt("digest of fs-verity data", err)
		}
		verity, err := list.At(i).Verity()
		if err != nil {
			return nil, corrupt("fs-verity digest", err)
		}
		if len(digest) != len(data[i].Digest) || len(verity) != len(data[i].Verity) {
			return nil, fmt.Errorf("fs-verity data %d: digests of %d and %d bytes, want 32: %w", i, len(digest), len(verity), ErrCorrupt)
		}
		copy(data[i].Digest[:], digest)
		copy(data[i].Verity[:], verity)
		if i > 0 && bytes.Compare(data[i-1].Digest[:], digest) >= 0 {
			return nil, fmt.Errorf("fs-verity data %d is not in the order of digests: %w", i, ErrCorrupt)
		}
	}
	return data, nil
}

func (d *decoder) inodes(list wirev3.Inode_List) (InodeVector, error) {
	if err := d.take(list.Len(), sizeOfInode); err != nil {
		return nil, fmt.Errorf("list of inodes: %w", err)
	}
	if d.limits.inodes += uint64(list.Len()); d.limits.Inodes > 0 && d.limits.inodes > d.limits.Inodes {
		return nil, fmt.Errorf("%d or more: %w", d.limits.inodes, ErrTooManyInodes)
	}
	inodes := make(InodeVector, list.Len())
	for i := range inodes {
		if err := d.inode(list.At(i), &inodes[i]); err != nil {
			return nil, fmt.Errorf("inode %d: %w", list.At(i).Ino(), err)
		}
		if err := inodes[i].validate(); err != nil {
			return nil, fmt.Errorf("inode %d: %w", inodes[i].Ino, err)
		}
		if i > 0 && inodes[i].Ino < inodes[i-1].Ino {
			return nil, fmt.Errorf("inode %d stands behind inode %d: %w", inodes[i].Ino, inodes[i-1].Ino, ErrCorrupt)
		}
	}
	return inodes, nil
}

func (d *decoder) inode(w wirev3.Inode, out *Inode) error {
	out.Ino = w.Ino()
	out.UID, out.GID, out.Perm = w.Uid(), w.Gid(), w.Permissions()
	mode := w.Mode()
	switch mode.Which() {
	case wirev3.Inode_mode_Which_unknown:
		out.Kind = KindUnknown
	case wirev3.Inode_mode_Which_fifo:
		out.Kind = KindFifo
	case wirev3.Inode_mode_Which_lnk:
		out.Kind = KindSymlink
	case wirev3.Inode_mode_Which_sock:
		out.Kind = KindSocket
	case wirev3.Inode_mode_Which_wht:
		out.Kind = KindWhiteout
	case wirev3.Inode_mode_Which_chr:
		chr, err := mode.Chr()
		if err != nil {
			return corrupt("character device", err)
		}
		out.Kind, out.Major, out.Minor = KindChr, chr.Major(), chr.Minor()
	case wirev3.Inode_mode_Which_blk:
		blk, err := mode.Blk()
		if err != nil {
			return corrupt("block device", err)
		}
		out.Kind, out.Major, out.Minor = KindBlk, blk.Major(), blk.Minor()
	case wirev3.Inode_mode_Which_dir:
		out.Kind = KindDir
		dir, err := mode.Dir()
		if err != nil {
			return corrupt("directory", err)
		}
		out.LookBelow = dir.LookBelow()
		if err := d.entries(dir, out); err != nil {
			return err
		}
	case wirev3.Inode_mode_Which_file:
		out.Kind = KindFile
		if err := d.chunks(w, out); err != nil {
			return err
		}
	default:
		return fmt.Errorf("mode %d is none of the known kinds: %w", uint16(mode.Which()), ErrCorrupt)
	}
	return d.additional(w, out)
}

func (d *decoder) entries(dir wirev3.Dir, out *Inode) error {
	list, err := dir.Entries()
	if err != nil {
		return corrupt("directory entries", err)
	}
	if err := d.take(list.Len(), sizeOfEntry); err != nil {
		return fmt.Errorf("directory entries: %w", err)
	}
	out.Entries = takeList(&d.spareEntries, list.Len())
	for i := range out.Entries {
		e := list.At(i)
		name, err := e.Name()
		if err != nil {
			return corrupt("name of a directory entry", err)
		}
		out.Entries[i] = DirEntry{Ino: e.Ino(), Name: name}
	}
	return nil
}

// chunkList returns a file's chunk list, which version 1 wraps in a struct.
func (d *decoder) chunkList(w wirev3.Inode) (wirev3.FileChunk_List, error) {
	if d.version != Version1 {
		return w.Mode().File()
	}
	file, err := wirev1.Inode(w).Mode().File()
	if err != nil {
		return wirev3.FileChunk_List{}, err
	}
	return file.Chunks()
}

func (d *decoder) chunks(w wirev3.Inode, out *Inode) error {
	list, err := d.chunkList(w)
	if err != nil {
		return corrupt("list of chunks", err)
	}
	if err := d.take(list.Len(), sizeOfChunk); err != nil {
		return fmt.Errorf("list of chunks: %w", err)
	}
	out.Chunks = takeList(&d.spareChunks, list.Len())
	for i := range out.Chunks {
		c := list.At(i)
		out.Chunks[i].Len = c.Len()
		ref, err := c.Blob()
		if err != nil {
			return corrupt(fmt.Sprintf("chunk %d", i), err)
		}
		if out.Chunks[i].Blob, err = blobRef(ref); err != nil {
			return fmt.Errorf("chunk %d: %w", i, err)
		}
	}
	return nil
}

func blobRef(w wirev3.BlobRef) (BlobRef, error) {
	r := BlobRef{Offset: w.Offset(), Compressed: w.Compressed()}
	digest, err := w.Digest()
	if err != nil {
		return r, corrupt("digest", err)
	}
	if len(digest) != len(r.Digest) {
		return r, fmt.Errorf("digest of %d bytes, want %d: %w", len(digest), len(r.Digest), ErrCorrupt)
	}
	copy(r.Digest[:], digest)
	return r, nil
}

func (d *decoder) additional(w wirev3.Inode, out *Inode) error {
	if !w.HasAdditional() {
		return nil
	}
	additional, err := w.Additional()
	if err != nil {
		return corrupt("additional data", err)
	}
	list, err := additional.Xattrs()
	if err != nil {
		return corrupt("list of extended attributes", err)
	}
	if list.Len() > 0 {
		if err := d.take(list.Len(), sizeOfXattr); err != nil {
			return fmt.Errorf("list of extended attributes: %w", err)
		}
		out.Xattrs = make([]Xattr, list.Len())
	}
	for i := range out.Xattrs {
		key, err := list.At(i).Key()
		if err != nil {
			return corrupt("name of an extended attribute", err)
		}
		val, err := list.At(i).Val()
		if err != nil {
			return corrupt("value of an extended attribute", err)
		}
		out.Xattrs[i] = Xattr{Key: key, Val: val}
	}
	if additional.HasSymlinkTarget() {
		if out.Symlink, err = additional.SymlinkTarget(); err != nil {
			return corrupt("symlink target", err)
		}
		if out.Symlink == nil {
			out.Symlink = []byte{}
		}
	}
	return nil
}

// What an element takes in memory once it is decoded, in bytes.
const (
	sizeOfLayer  = uint64(unsafe.Sizeof(InodeVector{}))
	sizeOfRef    = uint64(unsafe.Sizeof(BlobRef{}))
	sizeOfVerity = uint64(unsafe.Sizeof(VerityData{}))
	sizeOfInode  = uint64(unsafe.Sizeof(Inode{}))
	sizeOfEntry  = uint64(unsafe.Sizeof(DirEntry{}))
	sizeOfChunk  = uint64(unsafe.Sizeof(FileChunk{}))
	sizeOfXattr  = uint64(unsafe.Sizeof(Xattr{}))
)

// take pays for n list elements of that size.
func (d *decoder) take(n int, size uint64) error {
	if n > d.budget {
		return fmt.Errorf("%d elements are more than the message has room for: %w", n, ErrCorrupt)
	}
	d.budget -= n
	// A message is at most 1 GiB: this does not overflow.
	if d.limits.memory += uint64(n) * size; d.limits.Memory > 0 && d.limits.memory > d.limits.Memory {
		return fmt.Errorf("%d bytes or more: %w", d.limits.memory, ErrTooMuchMemory)
	}
	return nil
}

// corrupt wraps an error of the capnp library, whose text says what was wrong with the bytes.
func corrupt(what string, err error) error {
	return fmt.Errorf("%s: %w: %w", what, err, ErrCorrupt)
}
