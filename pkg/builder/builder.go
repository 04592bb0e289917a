package builder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// Errors of this package, wrapped with the path or the tag at hand.
var (
	// ErrConfig says that a Config is not usable.
	ErrConfig = errors.New("invalid build configuration")
	// ErrChanged says that a file changed while it was read, so that no consistent image of it exists.
	ErrChanged = errors.New("file changed during the build: stop its writer, or build from a snapshot")
	// ErrOldVersion says that a base image has a version that is only read.
	ErrOldVersion = errors.New("images of versions 1 and 2 are read only: extract and rebuild")
)

// Store is where blobs and tags go: an OCI image layout. Its methods are called from
// several goroutines.
type Store interface {
	// Put stores data under the digest d, which is its SHA-256.
	Put(data []byte, d format.Digest) error
	// Get returns a whole blob, verified, of limit bytes at most.
	Get(ctx context.Context, d format.Digest, limit int64) ([]byte, error)
	// Size returns the length of a blob in bytes, without reading it. It fails where there is none.
	Size(d format.Digest) (int64, error)
	// Resolve returns what a tag names.
	Resolve(tag string) (format.Descriptor, error)
	// Tag makes all blobs durable, then lets tag name d.
	Tag(tag string, d format.Descriptor) error
}

// Config says what to build.
type Config struct {
	// Dir is the root of the tree. Mounts below it are not entered: their mount points
	// become empty directories.
	Dir string
	// Tree, instead of Dir, is what ReadTar or ReadImage returned. It stays the caller's.
	Tree *Tree
	// Upper, instead of Dir, is the upper directory of an overlay mount whose lower directory is
	// the base image. Only what it has is read: the rest of the tree is the base's. The overlay
	// may be mounted, but nothing must change meanwhile.
	Upper string
	// UpperDir, if not nil, is that directory, where its path does not lead to it. It stays the
	// caller's.
	UpperDir *os.File
	// UpperXattrs says which attributes in Upper are the overlay's.
	UpperXattrs UpperXattrs
	// Store receives the blobs and the tag.
	Store Store
	// Tag names the image. An existing tag is moved.
	Tag string
	// Base is the tag of the image to build a delta on; empty for none.
	Base string
	// BaseManifest, instead of Base, is the digest of that image's manifest. Store needs to
	// have the manifest and the rootfs blob, no chunks.
	BaseManifest format.Digest
	// Compress stores chunks as seekable zstd where that is smaller.
	Compress bool
	// Level is how hard to compress; its zero value is CompressionFastest.
	Level CompressionLevel
	// Chunker is how to cut; its zero value is canonical.
	Chunker chunk.Algorithm
	// Minimal says what is left out.
	Minimal Minimal
	// Record, if not "", is a file with what an earlier build of Dir knew, which is replaced when this
	// one is done. Files that did not change since, by their inode number, size, mtime and ctime,
	// are not opened, and their chunks not hashed, compressed or stored again, as long as Store
	// has them. The image is the same. A record that is not there or cannot be used, because
	// it is of a build that cut, compressed or left out otherwise, costs time only.
	//
	// A program that goes on to change a file through a mapping that it had before the earlier
	// build changes it without its ctime telling, until the kernel has written the page to disk.
	Record string
	// Workers is the number of goroutines that hash and compress; 0 means one per CPU.
	// It does not change the result.
	Workers int
	// Progress, if not nil, is called from one goroutine after every chunk.
	Progress func(Progress)

	// now, if not zero, is when the build begins, as far as the record is concerned.
	now time.Time
}

// Progress counts what was done so far.
type Progress struct {
	Inodes int   // inodes found
	Bytes  int64 // bytes of file content cut, hashed and stored
}

// Result describes a finished image. For a build from an overlay's upper directory Inodes,
// Bytes and Chunks are those of the new layer, which is all that was read.
type Result struct {
	// Manifest is the image's entry in the layout's index. Its digest is the image's OCI digest.
	Manifest format.Descriptor
	// Verity is the fs-verity digest of the manifest, which PuzzleFS tools print and take.
	Verity verity.Digest
	Inodes int   // inodes in the tree, hard links counted once
	Bytes  int64 // bytes of file content
	Chunks int   // chunks, repeated ones counted each time
	// StoredBytes is the size of the distinct blobs that the manifest names, in bytes.
	StoredBytes int64
	// Warnings are sentences for the user about what went wrong beside the image.
	Warnings []string
}

func (c *Config) validate() error {
	switch {
	case c.Dir == "" && c.Tree == nil && c.Upper == "":
		return fmt.Errorf("no directory to build from: %w", ErrConfig)
	case c.Dir != "" && c.Tree != nil || c.Upper != "" && (c.Dir != "" || c.Tree != nil):
		return fmt.Errorf("more than one of a directory, a tree and an upper directory: %w", ErrConfig)
	case c.Upper != "" && c.Base == "" && c.BaseManifest.IsZero():
		return fmt.Errorf("an upper directory without a base image: %w", ErrConfig)
	case c.Base != "" && !c.BaseManifest.IsZero():
		return fmt.Errorf("two base images: %w", ErrConfig)
	case c.Store == nil:
		return fmt.Errorf("no store to build into: %w", ErrConfig)
	case c.Tag == "":
		return fmt.Errorf("no tag: %w", ErrConfig)
	case c.Workers < 0:
		return fmt.Errorf("%d workers: %w", c.Workers, ErrConfig)
	case !c.Level.valid():
		return fmt.Errorf("unknown compression level %v: %w", c.Level, ErrConfig)
	}
	return nil
}

// Build makes an image of a tree and tags it. It returns when all of it is durable.
// When it fails, or ctx is done, the tag is as it was and no goroutine or open file is left.
func Build(ctx context.Context, cfg Config) (*Result, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("build image: %w", err)
	}
	from := cfg.Dir + cfg.Upper
	if cfg.Tree != nil {
		from = cfg.Tree.name
	}
	r, err := build(ctx, &cfg)
	if err != nil {
		return nil, fmt.Errorf("build %s from %s: %w", cfg.Tag, from, err)
	}
	return r, nil
}

func build(ctx context.Context, cfg *Config) (*Result, error) {
	if cfg.Workers == 0 {
		cfg.Workers = runtime.GOMAXPROCS(0)
	}
	// The config blob is written first, so that a layout that takes no blobs says so at once.
	config := []byte(format.EmptyConfig)
	if err := cfg.Store.Put(config, format.DigestOf(config)); err != nil {
		return nil, err
	}
	base, err := baseOf(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("read base image: %w", err)
	}
	if cfg.Upper != "" {
		return buildUpper(ctx, cfg, base)
	}
	if cfg.Tree != nil {
		return buildFrom(ctx, cfg, base, cfg.Tree.open(), nil)
	}
	root, err := openRoot(cfg.Dir, cfg.Dir)
	if err != nil {
		return nil, err
	}
	root.ahead = startLookAhead(cfg.Workers)
	m, err := cfg.remember(root)
	if err != nil {
		return nil, errors.Join(err, root.close())
	}
	return buildFrom(ctx, cfg, base, root, m)
}

// buildFrom makes an image of the tree below root, which it closes.
func buildFrom(ctx context.Context, cfg *Config, base *baseTree, root directory, m *memory) (*Result, error) {
	tree, err := runPipeline(ctx, cfg, base, m, func(w *walker) error { return w.walk(cfg.Minimal.minimize(root)) })
	if err = errors.Join(err, root.close()); err != nil {
		return nil, err
	}
	r, err := finish(cfg, base, tree)
	if err != nil {
		return nil, err
	}
	// Not before the blobs are durable. The image is there without it.
	if err := m.save(); err != nil {
		r.Warnings = append(r.Warnings, err.Error()+": the next build reads all files again")
	}
	return r, nil
}

// finish writes the rootfs and the manifest and sets the tag.
func finish(cfg *Config, base *baseTree, t *tree) (*Result, error) {
	layer := t.layer()
	var layers []format.Pieces
	// Only the topmost layer counts: a tree that went back to how it was before the base
	// needs a layer that says so. What an upper directory says nothing new about has no inode.
	if len(base.layers) == 0 || t.count > 0 && !isLayer(base.layers[0], layer) {
		layers = append(layers, layer)
	}
	for _, below := range base.layers {
		layers = append(layers, format.Pieces{below})
	}
	rootfs, err := format.EncodePieces(layers, mergeVerity(base.verity, t.verity))
	if err != nil {
		return nil, err
	}
	// Two digests of the largest blob, and to write it: that takes as long as the rest of a build of what
	// hardly changed.
	var sum verity.Digest
	var g errgroup.Group
	g.Go(func() error {
		sum = verity.Sum(rootfs)
		return nil
	})
	desc := format.Descriptor{Digest: format.DigestOf(rootfs), Size: int64(len(rootfs))}
	if err := errors.Join(cfg.Store.Put(rootfs, desc.Digest), g.Wait()); err != nil {
		return nil, err
	}
	m := format.NewManifest(desc, sum, slices.Concat(t.kept, t.chunks))
	if note, err := cfg.Minimal.annotation(t.minimal); err != nil {
		return nil, err
	} else if note != "" {
		m.Annotations = map[string]string{AnnotationMinimal: note}
	}
	manifest, err := m.Encode()
	if err != nil {
		return nil, err
	}
	if len(manifest) > format.MaxManifestSize {
		return nil, fmt.Errorf("the manifest of %d chunks has %d bytes, at most %d can be read: use larger chunks (jotfs:4M): %w",
			len(m.Layers)-1, len(manifest), format.MaxManifestSize, format.ErrTooLarge)
	}
	result := &Result{
		Manifest: format.Descriptor{MediaType: format.MediaTypeManifest, Digest: format.DigestOf(manifest), Size: int64(len(manifest))},
		Verity:   verity.Sum(manifest),
		Inodes:   t.present, Bytes: t.bytes, Chunks: len(t.chunks),
	}
	for _, b := range m.Blobs() {
		result.StoredBytes += b.Size
	}
	if err := cfg.Store.Put(manifest, result.Manifest.Digest); err != nil {
		return nil, err
	}
	return result, cfg.Store.Tag(cfg.Tag, result.Manifest)
}

// mergeVerity returns the entries of both lists, sorted, the new ones in place of old.
func mergeVerity(base []format.VerityData, chunks map[format.Digest]verity.Digest) []format.VerityData {
	merged := make([]format.VerityData, 0, len(base)+len(chunks))
	for _, v := range base {
		if _, replaced := chunks[v.Digest]; !replaced {
			merged = append(merged, v)
		}
	}
	for d, v := range chunks {
		merged = append(merged, format.VerityData{Digest: d, Verity: v})
	}
	slices.SortFunc(merged, func(a, b format.VerityData) int { return slices.Compare(a.Digest[:], b.Digest[:]) })
	return merged
}

// tree is what the pipeline makes of a directory.
type tree struct {
	blocks  format.Pieces // never moved, so that the stages can hold pointers to inodes
	count   int
	present int   // inodes that are no whiteouts
	bytes   int64 // bytes of file content
	chunks  []format.Descriptor
	verity  map[format.Digest]verity.Digest

	// kept are the chunks of the base that the image needs, minimal the base's annotation, where
	// files of the base are files of the image.
	kept    []format.Descriptor
	minimal string
}

const inodesPerBlock = 1024

// add returns a pointer to a new inode, which stays valid.
func (t *tree) add(i format.Inode) *format.Inode {
	if t.count%inodesPerBlock == 0 {
		t.blocks = append(t.blocks, make([]format.Inode, 0, inodesPerBlock))
	}
	t.count++
	if i.Kind != format.KindWhiteout {
		t.present++
	}
	last := &t.blocks[len(t.blocks)-1]
	*last = append(*last, i)
	return &(*last)[len(*last)-1]
}

// layer returns the inodes sorted by number. Whiteouts of one number keep their order. A tree without a base
// has them in order.
func (t *tree) layer() format.Pieces {
	layer := t.blocks
	t.blocks = nil
	last, sorted := uint64(0), true
	for _, inode := range layer.All() {
		sorted = sorted && inode.Ino >= last
		last = inode.Ino
	}
	if sorted {
		return layer
	}
	all := slices.Concat(layer...)
	slices.SortStableFunc(all, func(a, b format.Inode) int { return cmp.Compare(a.Ino, b.Ino) })
	return format.Pieces{all}
}
