package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// Errors of this package. Errors of the Source and of package format pass through.
var (
	// ErrNotExist says that there is no such inode or name.
	ErrNotExist = errors.New("no such file or directory")
	// ErrNotDir says that an inode is not a directory.
	ErrNotDir = errors.New("not a directory")
	// ErrIsDir says that a directory cannot be read as a file.
	ErrIsDir = errors.New("is a directory")
	// ErrNotFile says that an inode is not a regular file.
	ErrNotFile = errors.New("not a regular file")
	// ErrNotSymlink says that an inode is not a symlink.
	ErrNotSymlink = errors.New("not a symlink")
	// ErrNoXattr says that an inode does not have an extended attribute.
	ErrNoXattr = errors.New("no such extended attribute")
)

// Source yields the stored bytes of blobs. What it returns has been verified against one of the
// digests asked for; an error wraps what is wrong with the blob. It must be safe for
// concurrent use.
type Source interface {
	// Get returns a whole blob, or store.ErrTooLarge if it has more than limit bytes.
	Get(ctx context.Context, d format.Digest, limit int64) ([]byte, error)
	// ReadWhole reads whole blobs and sets N of each to its length, or fails with store.ErrTooLarge if one has
	// more bytes than there is room for. Content that has the fs-verity digest that a WholeRead says,
	// unless that is zero, is right, too.
	ReadWhole(ctx context.Context, reads []store.WholeRead) error
	// ReadBlobAt reads at an offset, as io.ReaderAt does.
	ReadBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error)
	// Size returns the length of a blob in bytes.
	Size(d format.Digest) (int64, error)
}

// Config says what to open.
type Config struct {
	Source Source
	// Early, if not nil, reads the metadata when an image is opened, instead of Source.Get: it may return a
	// blob before it is verified, which verify then waits for, with the error that Get would have had. The
	// index is made meanwhile, and thrown away if the blob is not what it should be. Content that has the
	// fs-verity digest d.Verity, unless that is zero, is right, too.
	Early func(ctx context.Context, d format.VerityData, limit int64) (b []byte, verify func() error, err error)
	// Root is what a tag or a registry names: an image manifest or, for images of
	// versions 1 and 2, the rootfs blob.
	Root format.Descriptor
	// Cache keeps decoded content; nil means one of the image's own, of DefaultCacheBytes.
	Cache *Cache
	// Limits bound the metadata. Errors are format.ErrTooManyInodes and format.ErrTooMuchMemory.
	Limits Limits
}

// Image is an opened image.
type Image struct {
	src      Source
	root     format.Descriptor
	verity   verity.Digest
	version  format.Version
	manifest *format.Manifest // nil for versions 1 and 2, and once the image is open
	rootfs   *format.Rootfs   // nil once the image is open
	index    *index
	cache    *Cache
	number   uint64 // in the cache
	tables   *seekTables
	decoders sync.Pool     // of idle *zstd.Decoder
	stored   sync.Pool     // of *[storedMax]byte, to read compressed blobs into
	lastLoad atomic.Uint64 // the unit that was loaded last, packed
	warnings []string
	limits   Limits
	// decoding is what is left for decoded metadata, metadata how many bytes its blobs have.
	decoding format.Limits
	metadata int64
}

// Open reads and validates the metadata of an image and makes its index. Content is not
// looked at. ctx is for opening only.
func Open(ctx context.Context, cfg Config) (*Image, error) {
	if cfg.Source == nil {
		return nil, fmt.Errorf("open image: no source")
	}
	if cfg.Cache == nil {
		cfg.Cache = NewCache(DefaultCacheBytes)
	}
	im := &Image{src: cfg.Source, root: cfg.Root, cache: cfg.Cache, number: cfg.Cache.join(), tables: newSeekTables(), limits: cfg.Limits}
	im.decoding = format.Limits{Inodes: cfg.Limits.Inodes, Memory: cfg.Limits.Memory / 4}
	early := cfg.Early
	if early == nil {
		early = im.getVerified
	}
	if err := im.open(ctx, early); err != nil {
		return nil, fmt.Errorf("open image %s: %w", cfg.Root.Digest, err)
	}
	return im, nil
}

// getVerified is what Config.Early may be.
func (im *Image) getVerified(ctx context.Context, d format.VerityData, limit int64) ([]byte, func() error, error) {
	b, err := im.get(ctx, d, limit)
	return b, func() error { return nil }, err
}

// open reads the metadata by early and makes the index.
func (im *Image) open(ctx context.Context, early earlyGet) error {
	var c checks
	err := im.openUnverified(ctx, &c, early)
	// Where a blob is not what it should be, whatever was made of it is wrong for that reason.
	if wrong := c.wait(); wrong != nil {
		return wrong
	}
	// The index has copies of what it needs: an image is open for a long time, and the
	// manifest is as large as the index.
	im.manifest, im.rootfs = nil, nil
	return err
}

// openUnverified makes the index of metadata of which the checks are under way.
func (im *Image) openUnverified(ctx context.Context, c *checks, early earlyGet) error {
	digest, b, err := im.getRootfs(ctx, c.collect(early))
	if err != nil {
		return err
	}
	im.index, im.warnings, err = im.makeIndex(ctx, c, digest, b)
	return err
}

// earlyGet is the type of Config.Early.
type earlyGet = func(ctx context.Context, d format.VerityData, limit int64) ([]byte, func() error, error)

// checks are those of blobs that were read, in the order in which they were.
type checks []func() error

// collect returns a function that reads a blob and adds its check.
func (c *checks) collect(early earlyGet) getFunc {
	return func(ctx context.Context, d format.VerityData, limit int64) ([]byte, error) {
		b, verify, err := early(ctx, d, limit)
		if err == nil {
			*c = append(*c, verify)
		}
		return b, err
	}
}

// wait waits for all checks and returns the first one's error that failed: the other blobs were read because of
// what that one said. The checks are done then, and there are none any more.
func (c *checks) wait() error {
	var wrong error
	for _, verify := range slices.Backward(*c) {
		if err := verify(); err != nil {
			wrong = err
		}
	}
	*c = nil
	return wrong
}

// makeIndex makes the index of a rootfs message. Only the usual image is looked at before the checks are done.
func (im *Image) makeIndex(ctx context.Context, c *checks, rootfs format.Digest, b []byte) (*index, []string, error) {
	if x, ok := newDirectIndex(b, &im.decoding); ok {
		im.version = format.Version3
		return x, nil, nil
	}
	if err := c.wait(); err != nil {
		return nil, nil, err
	}
	if err := im.decodeRootfs(rootfs, b); err != nil {
		return nil, nil, err
	}
	layers, err := im.layers(ctx)
	if err != nil {
		return nil, nil, err
	}
	x, warnings, err := newIndex(layers)
	if err != nil {
		return nil, nil, fmt.Errorf("rootfs %s: %w", rootfs, err)
	}
	x.sealed = im.rootfs.Verity
	for _, l := range layers {
		x.stats.LayerInodes += uint64(len(l))
	}
	return x, warnings, nil
}

// layers returns the inode vectors, topmost first, wherever the version keeps them.
func (im *Image) layers(ctx context.Context) ([]format.InodeVector, error) {
	if im.version == format.Version3 {
		return im.rootfs.Layers, nil
	}
	var layers []format.InodeVector
	// The bound is on the sum: a message can name the same blob any number of times.
	left := int64(format.MaxRootfsSize)
	for _, ref := range im.rootfs.Metadatas {
		if ref.Offset != 0 || ref.Compressed {
			return nil, fmt.Errorf("metadata blob %s is compressed or a part of a blob: %w", ref.Digest, format.ErrCorrupt)
		}
		b, err := im.getMetadata(ctx, im.get, format.VerityData{Digest: ref.Digest}, left)
		if errors.Is(err, store.ErrTooLarge) {
			return nil, fmt.Errorf("metadata blobs of more than %d bytes together: %w: %w", format.MaxRootfsSize, err, format.ErrTooLarge)
		}
		if err != nil {
			return nil, err
		}
		left -= int64(len(b))
		v, err := im.decoding.DecodeInodeVector(b, im.version)
		if err != nil {
			return nil, fmt.Errorf("metadata blob %s: %w", ref.Digest, err)
		}
		layers = append(layers, v)
	}
	return layers, nil
}

// Digest returns the SHA-256 digest of the manifest, or of the rootfs blob of an image of
// versions 1 and 2: the content digest that names the image.
func (im *Image) Digest() format.Digest { return im.root.Digest }

// Verity returns the fs-verity digest of what Digest names, as the PuzzleFS tools print it.
func (im *Image) Verity() verity.Digest { return im.verity }

// Version returns the image's format version.
func (im *Image) Version() format.Version { return im.version }

// Warnings returns what is odd about the image without making it unusable, as sentences
// for a log. The caller must not change them.
func (im *Image) Warnings() []string { return im.warnings }

// Stats are the sums of an image.
type Stats struct {
	Inodes uint64 // inodes that a name leads to, the root included
	// LayerInodes counts those of all layers, whether a name leads to them or not.
	LayerInodes uint64
	Bytes       uint64 // sum of the sizes of regular files, hard links counted once
	MaxIno      uint64
	Blobs       int    // distinct blobs that files refer to
	Entries     uint64 // names, the root's not counted
}

// Stats returns the sums, from the index: it is cheap.
func (im *Image) Stats() Stats { return im.index.stats }

// Attr is what stat would say of an inode. Images store no times.
type Attr struct {
	Ino          uint64
	Kind         format.Kind
	Perm         uint16 // mode & 07777
	UID, GID     uint32
	Nlink        uint32 // names of a file; 2 plus the subdirectories of a directory
	Size         uint64 // bytes of a file's content or a symlink's target
	Major, Minor uint32 // of devices
}

// Attr returns the attributes of an inode, or ErrNotExist.
func (im *Image) Attr(ino uint64) (Attr, error) {
	n, err := im.node(ino)
	if err != nil {
		return Attr{}, err
	}
	return im.index.attr(n), nil
}

// Lookup finds a name in a directory. It fails with ErrNotExist or ErrNotDir.
func (im *Image) Lookup(dir uint64, name string) (Attr, error) {
	n, err := im.node(dir)
	if err != nil {
		return Attr{}, err
	}
	d := &im.index.nodes[n]
	if d.kind != format.KindDir {
		return Attr{}, fmt.Errorf("look up %q in inode %d: %w", name, dir, ErrNotDir)
	}
	i := d.first + uint32(sort.Search(int(d.count), func(i int) bool { return im.index.name(d.first+uint32(i)) >= name }))
	if i == d.first+d.count || im.index.name(i) != name {
		return Attr{}, ErrNotExist // on the hot path of negative lookups: no allocation
	}
	return im.index.attr(im.index.entries[i].node), nil
}

// LookupPath finds a path of names separated by slashes, from the root. Symlinks are not
// followed; empty components and "." are passed over, ".." does not exist.
func (im *Image) LookupPath(path string) (Attr, error) {
	a, err := im.Attr(format.RootIno)
	for name := range pathNames(path) {
		if err == nil {
			a, err = im.Lookup(a.Ino, name)
		}
	}
	if err != nil {
		return Attr{}, fmt.Errorf("look up %s: %w", path, err)
	}
	return a, nil
}

// Dir is a directory's list, sorted by name. It is a view of the image, cheap to copy.
type Dir struct {
	im           *Image
	first, count uint32 // of the entries
	parent       uint64
}

// OpenDir returns the list of a directory. It fails with ErrNotExist or ErrNotDir.
func (im *Image) OpenDir(ino uint64) (Dir, error) {
	n, err := im.node(ino)
	if err != nil {
		return Dir{}, err
	}
	d := &im.index.nodes[n]
	if d.kind != format.KindDir {
		return Dir{}, fmt.Errorf("list inode %d: %w", ino, ErrNotDir)
	}
	return Dir{im, d.first, d.count, im.index.ino(uint32(d.size))}, nil
}

// Len returns the number of names, without "." and "..".
func (d Dir) Len() int { return int(d.count) }

// Entry returns a name, 0 <= i < Len(), and what it leads to.
func (d Dir) Entry(i int) (name string, a Attr) {
	x, e := d.im.index, d.first+uint32(i)
	return x.name(e), x.attr(x.entries[e].node)
}

// Parent returns the number of the directory above; that of the root is its own.
func (d Dir) Parent() uint64 { return d.parent }

// Readlink returns the target of a symlink. It fails with ErrNotExist or ErrNotSymlink.
func (im *Image) Readlink(ino uint64) (string, error) {
	n, err := im.node(ino)
	if err != nil {
		return "", err
	}
	if im.index.nodes[n].kind != format.KindSymlink {
		return "", fmt.Errorf("read link of inode %d: %w", ino, ErrNotSymlink)
	}
	return im.index.target(n), nil
}

// HasXattrs reports whether any inode has an extended attribute.
func (im *Image) HasXattrs() bool { return im.index.hasXattrs }

// HasXattrPrefix reports whether any inode has an extended attribute whose full name begins
// with prefix. It looks at each distinct set of attributes once.
func (im *Image) HasXattrPrefix(prefix string) bool {
	for i := range im.index.shared {
		for _, x := range im.index.shared[i].xattrs {
			if strings.HasPrefix(string(x.Key), prefix) {
				return true
			}
		}
	}
	return false
}

// Xattr returns the value of an extended attribute by its full name. It fails with
// ErrNotExist or ErrNoXattr. The caller must not change the value.
func (im *Image) Xattr(ino uint64, name string) ([]byte, error) {
	xattrs, err := im.Xattrs(ino)
	if err != nil {
		return nil, err
	}
	i := sort.Search(len(xattrs), func(i int) bool { return string(xattrs[i].Key) >= name })
	if i == len(xattrs) || string(xattrs[i].Key) != name {
		return nil, ErrNoXattr // on the hot path of ls -l: no allocation
	}
	return xattrs[i].Val, nil
}

// Xattrs returns the extended attributes of an inode, sorted by name. It fails with
// ErrNotExist. The caller must not change them.
func (im *Image) Xattrs(ino uint64) ([]format.Xattr, error) {
	n, err := im.node(ino)
	if err != nil {
		return nil, err
	}
	return im.index.xattrs(n), nil
}

// Walk calls fn for every path, a directory before its content, names in byte order. The
// root's path is ".". It stops at the first error that fn returns, and returns it. It takes
// as long as all paths together, which is for a hostile image longer than anybody waits.
func (im *Image) Walk(fn func(path string, a Attr) error) error {
	type level struct {
		dir  Dir
		next int
		path int // length of the directory's path with its slash
	}
	a, err := im.Attr(format.RootIno)
	if err != nil {
		return err
	}
	if err := fn(".", a); err != nil {
		return err
	}
	root, err := im.OpenDir(format.RootIno)
	if err != nil {
		return err
	}
	// A stack of our own, and one path for all of it: how deep a tree is, is up to whoever
	// made the image.
	var path []byte
	for stack := []level{{dir: root}}; len(stack) > 0; {
		top := &stack[len(stack)-1]
		if top.next == top.dir.Len() {
			stack = stack[:len(stack)-1]
			continue
		}
		name, a := top.dir.Entry(top.next)
		top.next++
		path = append(path[:top.path], name...)
		if err := fn(string(path), a); err != nil {
			return err
		}
		if a.Kind == format.KindDir {
			dir, err := im.OpenDir(a.Ino)
			if err != nil {
				return err
			}
			path = append(path, '/')
			stack = append(stack, level{dir: dir, path: len(path)})
		}
	}
	return nil
}

// node returns the index of an inode's node.
func (im *Image) node(ino uint64) (uint32, error) {
	if n, ok := im.index.find(ino); ok {
		return n, nil
	}
	return 0, fmt.Errorf("inode %d: %w", ino, ErrNotExist)
}
