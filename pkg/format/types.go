package format

import "fmt"

// RootIno is the inode number of the root directory.
const RootIno = 1

// Version is the manifestVersion of a rootfs message.
type Version uint64

// The versions in the wild. Version3 is the one that is written.
const (
	Version1 Version = 1 // git revisions of 2023-03 to 2023-08
	Version2 Version = 2 // crate 0.1.0
	Version3 Version = 3 // crate 0.2.0 and later
)

// Kind is the type of an inode, the discriminant of the union Inode.mode.
type Kind uint8

// The kinds, in the order of the schema's union.
const (
	KindUnknown Kind = iota
	KindFifo
	KindChr
	KindDir
	KindBlk
	KindFile
	KindSymlink
	KindSocket
	KindWhiteout
	numKinds
)

// String returns the name that messages use.
func (k Kind) String() string {
	names := [numKinds]string{"unknown", "fifo", "character device", "directory", "block device", "file", "symlink", "socket", "whiteout"}
	if k < numKinds {
		return names[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Rootfs is a decoded rootfs message.
type Rootfs struct {
	Version Version
	// Layers holds the inode vectors of a version 3 message, topmost first.
	Layers []InodeVector
	// Metadatas names the inode vector blobs of a version 1 or 2 message, topmost first.
	// Each is decoded with DecodeInodeVector.
	Metadatas []BlobRef
	// Verity is sorted by digest, without duplicates.
	Verity []VerityData
}

// InodeVector is one layer: inodes sorted by number. Numbers are unique except in
// images where the reference wrote duplicates (docs/format.md, "Deltas").
type InodeVector []Inode

// Inode is one inode of a layer. Which fields are used depends on Kind.
type Inode struct {
	Ino  uint64
	Kind Kind
	// Perm is mode & 07777.
	Perm     uint16
	UID, GID uint32
	// LookBelow says that a directory's list is to be merged with the next layer's.
	LookBelow bool
	// Major and Minor are the device numbers of KindChr and KindBlk.
	Major, Minor uint64
	// Entries is the list of a KindDir, as written: names of deleted entries
	// stay listed and point at a KindWhiteout inode.
	Entries []DirEntry
	// Chunks is the content of a KindFile. The file's size is the sum of the lengths.
	Chunks []FileChunk
	Xattrs []Xattr
	// Symlink is the target of a KindSymlink; nil where the message has none.
	Symlink []byte
}

// DirEntry is a name in a directory. Name is 1 to 255 bytes without '/' and NUL,
// not "." or "..".
type DirEntry struct {
	Ino  uint64
	Name []byte
}

// FileChunk is a byte range of a blob's uncompressed content.
type FileChunk struct {
	Blob BlobRef
	// Len is in bytes, at least 1 in images that the reference writes.
	Len uint64
}

// BlobRef names a blob and an offset in its uncompressed content.
type BlobRef struct {
	Digest     Digest
	Offset     uint64
	Compressed bool
}

// Xattr is an extended attribute with its full name ("user.comment").
type Xattr struct {
	Key, Val []byte
}

// VerityData says which fs-verity digest (SHA-256, 4 KiB blocks, no salt) the stored
// bytes of a blob have.
type VerityData struct {
	Digest Digest
	Verity [32]byte
}

// Size returns the length of a file in bytes.
func (i *Inode) Size() uint64 {
	var n uint64
	for k := range i.Chunks {
		n += i.Chunks[k].Len
	}
	return n
}

// Find returns the inode of a number, or nil. In a layer with several inodes of that
// number it returns the one that the reference's reader finds, which is why the search
// is written out here: which of equals a binary search meets depends on its arithmetic.
func (v InodeVector) Find(ino uint64) *Inode {
	left, right := 0, len(v)-1
	for left <= right {
		mid := left + (right-left)/2
		switch {
		case v[mid].Ino == ino:
			return &v[mid]
		case v[mid].Ino < ino:
			left = mid + 1
		default:
			right = mid - 1
		}
	}
	return nil
}
