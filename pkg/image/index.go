package image

import (
	"iter"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// node is an inode in the index.
type node struct {
	// size is the content of a file or the length of a symlink's target in bytes, major<<32|minor of a device,
	// and the node of the directory above of a directory.
	size   uint64
	first  uint32 // index of the first entry or chunk; offset in targets
	count  uint32 // number of entries or chunks
	nlink  uint32
	shared uint32 // index into shared
	perm   uint16
	kind   format.Kind
}

// entry is a name in a directory. It ends where that of the next entry begins.
type entry struct {
	name uint32 // offset in names
	node uint32
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

// shared is what many inodes have in common.
type shared struct {
	xattrs   []format.Xattr // sorted by name
	uid, gid uint32
}

// index is the decoded metadata. It is not changed after it is made.
type index struct {
	nodes   []node
	numbers numbers
	entries []entry // and one behind the last, which says where its name ends
	names   string
	targets string
	chunks  []extent
	blobs   []blob
	shared  []shared
	sealed  []format.VerityData // of the stored blobs, sorted by digest

	hasXattrs bool
	stats     Stats
}

// find returns the node of an inode number.
func (x *index) find(ino uint64) (uint32, bool) { return x.numbers.find(ino) }

// ino returns the number of a node.
func (x *index) ino(n uint32) uint64 { return x.numbers.ino(n) }

// name returns the name of an entry.
func (x *index) name(i uint32) string { return x.names[x.entries[i].name:x.entries[i+1].name] }

func (x *index) xattrs(n uint32) []format.Xattr { return x.shared[x.nodes[n].shared].xattrs }

func (x *index) target(n uint32) string {
	d := &x.nodes[n]
	return x.targets[d.first : uint64(d.first)+d.size]
}

func (x *index) attr(n uint32) Attr {
	d := &x.nodes[n]
	s := &x.shared[d.shared]
	a := Attr{Ino: x.ino(n), Kind: d.kind, Perm: d.perm, UID: s.uid, GID: s.gid, Nlink: d.nlink}
	switch d.kind {
	case format.KindDir:
	case format.KindChr, format.KindBlk:
		a.Major, a.Minor = uint32(d.size>>32), uint32(d.size)
	default:
		a.Size = d.size
	}
	return a
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
