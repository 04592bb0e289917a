package image

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	v := &verifier{im: im, progress: progress, expected: make(map[format.Digest]verity.Digest)}
	v.report.Warnings = append(v.report.Warnings, im.warnings...)
	for _, d := range im.rootfs.Verity {
		v.expected[d.Digest] = d.Verity
	}
	v.metadata(ctx)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for id := range im.index.blobs {
		g.Go(func() error { return v.blob(ctx, uint32(id)) })
	}
	for _, d := range v.unreached() {
		g.Go(func() error { return v.unreachedBlob(ctx, d) })
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("verify image %s: %w", im.root.Digest, err)
	}
	if v.raw > 0 {
		v.report.Warnings = append(v.report.Warnings, fmt.Sprintf("%d chunks that are stored raw have the fs-verity digest of their compressed form, as the reference writes it; the kernel's fs-verity cannot be used with this image: rebuild it", v.raw))
	}
	slices.SortFunc(v.report.Problems, func(a, b Problem) int { return strings.Compare(a.Where, b.Where) })
	return &v.report, nil
}

// verifier is one run of Verify.
type verifier struct {
	im       *Image
	progress func(int64)
	expected map[format.Digest]verity.Digest

	mu     sync.Mutex // guards report and raw
	report Report
	raw    int // chunks with the reference's wrong fs-verity digest
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

// metadata checks what Open did not: the descriptors and the metadata blobs' digests.
func (v *verifier) metadata(ctx context.Context) {
	for _, ref := range v.im.rootfs.Metadatas {
		b, err := v.im.src.Get(ctx, ref.Digest, format.MaxRootfsSize)
		if err == nil {
			err = v.checkVerity(ref.Digest, verity.Sum(b))
		}
		if err != nil {
			v.problem("metadata blob "+ref.Digest.String(), err)
		}
	}
	if v.im.manifest == nil {
		return
	}
	config := v.im.manifest.Config
	if _, err := v.im.src.Get(ctx, config.Digest, format.MaxManifestSize); err != nil {
		v.problem("config blob "+config.Digest.String(), err)
	}
	desc, err := v.im.manifest.Rootfs()
	if err != nil {
		v.problem("manifest", err)
		return
	}
	where := "rootfs blob " + desc.Digest.String()
	want, err := format.RootfsVerity(desc)
	if err != nil {
		v.problem(where, err)
		return
	}
	b, err := v.im.src.Get(ctx, desc.Digest, format.MaxRootfsSize)
	switch {
	case err != nil:
		v.problem(where, err)
	case verity.Sum(b) != want:
		v.problem(where, fmt.Errorf("it is %s, the manifest says %s: %w", verity.Sum(b), verity.Digest(want), ErrVerity))
	}
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
		v.problem(fmt.Sprintf("blob %s of %s", b.digest, v.im.fileOf(id)), err)
	}
	return nil
}

// isRawChunk reports whether b is stored raw in an image that was built to compress.
// Images of versions 1 and 2 do not say how they were built.
func (v *verifier) isRawChunk(b *blob) bool {
	if b.compressed {
		return false
	}
	if _, listed := v.expected[b.digest]; !listed {
		return false
	}
	return v.im.manifest == nil || slices.ContainsFunc(v.im.manifest.Layers, func(l format.Descriptor) bool {
		return l.MediaType == format.MediaTypeChunkZstd && l.Digest == b.digest
	})
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
	if v.im.manifest == nil {
		return nil
	}
	needed := make(map[format.Digest]bool)
	for i := range v.im.index.blobs {
		needed[v.im.index.blobs[i].digest] = true
	}
	var rest []format.Digest
	for _, l := range v.im.manifest.Blobs() {
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

// fileOf returns the path of the first file that needs a blob. It walks the image, and is
// for messages only.
func (im *Image) fileOf(id uint32) string {
	found := errors.New("found")
	where := "no file"
	err := im.Walk(func(path string, a Attr) error {
		n, ok := im.index.find(a.Ino)
		if !ok || a.Kind != format.KindFile {
			return nil
		}
		d := &im.index.nodes[n]
		for _, c := range im.index.chunks[d.first : d.first+d.count] {
			if c.blob == id {
				where = "/" + path
				return found
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, found) {
		return err.Error()
	}
	return where
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
