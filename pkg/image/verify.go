package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// ErrVerity says that a blob's fs-verity digest is not the one that the image gives.
var ErrVerity = errors.New("fs-verity digest does not match")

// Problem is something wrong with an image.
type Problem struct {
	// Where names the blob, and a file that needs it.
	Where string
	// Err says what is wrong.
	Err error
}

// String returns one line.
func (p Problem) String() string { return p.Where + ": " + p.Err.Error() }

// Report is what Verify found out.
type Report struct {
	Blobs int   // data blobs that were checked
	Bytes int64 // stored bytes of those
	// Warnings are oddities that do not make the image unusable.
	Warnings []string
	// Problems is empty if every byte of the image is right.
	Problems []Problem
}

// Verify checks all of an opened image: the config and the rootfs descriptor, and of each
// data blob that a file needs, or that is there though the manifest only lists it, the
// SHA-256 digest, the fs-verity digest, and that it has the content that files refer to.
//
// Blobs that only shadowed inodes of lower layers need may be missing. An fs-verity digest
// that belongs to the compressed form of a chunk that is stored raw, a known defect of the
// reference's compressed images, is a warning, since the SHA-256 digest still holds.
//
// progress, if not nil, is called with the stored bytes checked so far. The error is only
// ctx's; everything else is in the report.
func (im *Image) Verify(ctx context.Context, progress func(bytes int64)) (*Report, error) {
	v := &verifier{
		im: im, meta: &Image{src: im.src, root: im.root}, progress: progress,
		expected: make(map[format.Digest]verity.Digest), wrong: make(map[uint32]error),
	}
	v.report.Warnings = append(v.report.Warnings, im.warnings...)
	if err := v.metadata(ctx); err != nil {
		// What Open read is there no more, and says what everything else has to be.
		v.problem("metadata of "+im.root.Digest.String(), err)
		return &v.report, ctx.Err()
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for id := range im.index.blobs {
		g.Go(func() error { return v.blob(gctx, uint32(id)) })
	}
	for _, d := range v.unreached() {
		g.Go(func() error { return v.unreachedBlob(gctx, d) })
	}
	err := g.Wait()
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("verify image %s: %w", im.root.Digest, err)
	}
	if v.raw > 0 {
		v.report.Warnings = append(v.report.Warnings, fmt.Sprintf("%d chunks that are stored raw have the fs-verity digest of their compressed form, as the reference writes it; the kernel's fs-verity cannot be used with this image: rebuild it", v.raw))
	}
	paths := im.index.filesOf(slices.Collect(maps.Keys(v.wrong)))
	for id, err := range v.wrong {
		v.problem(fmt.Sprintf("blob %s of %s", im.index.blobs[id].digest, paths[id]), err)
	}
	slices.SortFunc(v.report.Problems, func(a, b Problem) int { return strings.Compare(a.Where, b.Where) })
	return &v.report, nil
}

// verifier is one run of Verify.
type verifier struct {
	im       *Image
	meta     *Image // has the manifest and the rootfs, which im does not keep
	progress func(int64)
	expected map[format.Digest]verity.Digest
	rawSums  map[format.Digest]bool // blobs of which the reference writes a wrong fs-verity digest

	mu     sync.Mutex // guards what follows
	report Report
	raw    int              // chunks with the reference's wrong fs-verity digest
	wrong  map[uint32]error // what is wrong with blobs that files need, by number
}

func (v *verifier) problem(where string, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Problems = append(v.report.Problems, Problem{where, err})
}

func (v *verifier) count(stored int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Blobs++
	v.report.Bytes += stored
	if v.progress != nil {
		v.progress(v.report.Bytes)
	}
}

// metadata reads the metadata again and checks what Open did not: the descriptors and the
// metadata blobs' digests. It fails if the metadata cannot be read.
func (v *verifier) metadata(ctx context.Context) error {
	rootfs, err := v.meta.readRootfs(ctx)
	if err != nil {
		return err
	}
	for _, d := range v.meta.rootfs.Verity {
		v.expected[d.Digest] = d.Verity
	}
	for _, ref := range v.meta.rootfs.Metadatas {
		_, got, err := v.stored(ctx, ref.Digest)
		if err == nil {
			err = v.checkVerity(ref.Digest, got)
		}
		if err != nil {
			v.problem("metadata blob "+ref.Digest.String(), err)
		}
	}
	v.rawSums = rawChunks(v.meta.manifest, v.im.index)
	if v.meta.manifest == nil {
		return nil
	}
	config := v.meta.manifest.Config
	if _, err := v.im.src.Get(ctx, config.Digest, format.MaxManifestSize); err != nil {
		v.problem("config blob "+config.Digest.String(), err)
	}
	if err := v.rootfs(ctx, rootfs); err != nil {
		v.problem("rootfs blob "+rootfs.String(), err)
	}
	return nil
}

// rootfs checks the rootfs blob against its descriptor.
func (v *verifier) rootfs(ctx context.Context, d format.Digest) error {
	desc, err := v.meta.manifest.Rootfs()
	if err != nil {
		return err
	}
	want, err := format.RootfsVerity(desc)
	if err != nil {
		return err
	}
	_, got, err := v.stored(ctx, d)
	if err == nil && got != want {
		err = fmt.Errorf("it is %s, the manifest says %s: %w", got, verity.Digest(want), ErrVerity)
	}
	return err
}

// checkVerity compares a blob's fs-verity digest with the image's list.
func (v *verifier) checkVerity(d format.Digest, got verity.Digest) error {
	want, ok := v.expected[d]
	switch {
	case !ok:
		return fmt.Errorf("the image has no fs-verity digest for it: %w", ErrVerity)
	case want != got:
		return fmt.Errorf("it is %s, the image says %s: %w", got, want, ErrVerity)
	}
	return nil
}

// blob checks a blob that files need.
func (v *verifier) blob(ctx context.Context, id uint32) error {
	b := &v.im.index.blobs[id]
	stored, got, err := v.stored(ctx, b.digest)
	if err == nil {
		v.count(stored)
		if err = v.checkVerity(b.digest, got); err != nil && v.isRawChunk(b) {
			v.mu.Lock()
			v.raw++
			v.mu.Unlock()
			err = nil
		}
	}
	for start := uint64(0); start < b.extent && err == nil; start += unitSize {
		_, err = v.im.loadUnit(ctx, b, start)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		v.mu.Lock()
		v.wrong[id] = err
		v.mu.Unlock()
	}
	return nil
}

// isRawChunk reports whether b is stored raw in an image that was built to compress.
func (v *verifier) isRawChunk(b *blob) bool {
	_, listed := v.expected[b.digest]
	return listed && !b.compressed && v.rawSums[b.digest]
}

// stored reads a blob once and returns its length and fs-verity digest.
func (v *verifier) stored(ctx context.Context, d format.Digest) (int64, verity.Digest, error) {
	size, err := v.im.src.Size(d)
	if err != nil {
		return 0, verity.Digest{}, err
	}
	r := io.NewSectionReader(sourceReader{ctx, v.im.src, d}, 0, size)
	sum, err := verity.SumReader(r)
	return size, sum, err
}

// unreached returns the blobs of the manifest that no file needs.
func (v *verifier) unreached() []format.Digest {
	if v.meta.manifest == nil {
		return nil
	}
	needed := make(map[format.Digest]bool)
	for i := range v.im.index.blobs {
		needed[v.im.index.blobs[i].digest] = true
	}
	var rest []format.Digest
	for _, l := range v.meta.manifest.Blobs() {
		if (l.MediaType == format.MediaTypeChunk || l.MediaType == format.MediaTypeChunkZstd) && !needed[l.Digest] {
			rest = append(rest, l.Digest)
		}
	}
	return rest
}

// unreachedBlob checks a blob that may be missing, but must not be wrong.
func (v *verifier) unreachedBlob(ctx context.Context, d format.Digest) error {
	if _, err := v.im.src.Size(d); err != nil {
		return nil //nolint:nilerr // not there, and not needed
	}
	stored, _, err := v.stored(ctx, d)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		v.problem("blob "+d.String()+", which no file needs", err)
		return nil
	}
	v.count(stored)
	return nil
}

// maxShown bounds a path in a message, in bytes.
const maxShown = 4096

// filesOf returns for each of the blobs the path of a file that needs it, without its
// beginning where it is longer than maxShown. It is for messages, and looks at everything
// once however many blobs are asked for.
func (x *index) filesOf(blobs []uint32) map[uint32]string {
	paths := make(map[uint32]string, len(blobs))
	if len(blobs) == 0 {
		return paths
	}
	const none = math.MaxUint32
	fileOf := make(map[uint32]uint32, len(blobs)) // blob -> node
	for _, id := range blobs {
		fileOf[id] = none
	}
	for n := range x.nodes {
		d := &x.nodes[n]
		if d.kind != format.KindFile {
			continue
		}
		for _, c := range x.chunks[d.first : d.first+d.count] {
			if node, wanted := fileOf[c.blob]; wanted && node == none {
				fileOf[c.blob] = uint32(n)
			}
		}
	}
	names := make([]uint32, len(x.nodes)) // node -> an entry that leads to it
	parents := make([]uint32, len(x.nodes))
	for n := range x.nodes {
		d := &x.nodes[n]
		if d.kind != format.KindDir {
			continue
		}
		for i := d.first; i < d.first+d.count; i++ {
			names[x.entries[i].node], parents[x.entries[i].node] = i, uint32(n)
		}
	}
	for id, n := range fileOf {
		path := ""
		for ; x.ino(n) != format.RootIno && len(path) <= maxShown; n = parents[n] {
			path = "/" + x.name(names[n]) + path
		}
		if x.ino(n) != format.RootIno {
			path = "…" + path
		}
		paths[id] = path
	}
	return paths
}

// sourceReader reads a blob's stored bytes.
type sourceReader struct {
	ctx context.Context
	src Source
	d   format.Digest
}

// ReadAt implements io.ReaderAt.
func (r sourceReader) ReadAt(p []byte, off int64) (int, error) {
	return r.src.ReadBlobAt(r.ctx, r.d, p, off)
}
