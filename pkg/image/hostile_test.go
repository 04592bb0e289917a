package image_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	seekable "github.com/SaveTheRbtz/zstd-seekable-format-go/pkg"
	"github.com/klauspost/compress/zstd"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// What is quadratic in the size of the metadata would not end in the time of a test.

// Layers without inodes cost a word each, so that there can be many.
func TestManyLayers(t *testing.T) {
	const n = 200_000
	top := dir(1)
	layers := make([]format.InodeVector, n, n+1)
	for i := range 30_000 {
		ino := uint64(i + 2)
		top.Entries = append(top.Entries, format.DirEntry{Ino: ino, Name: fmt.Append(nil, i)})
		layers[n-1-i] = format.InodeVector{file(ino)}
	}
	below := dir(1, entries("below", 2)...)
	layers[1] = append(format.InodeVector{below}, layers[1]...)
	top.LookBelow = true
	layers[0] = format.InodeVector{top}
	m := newMemory()
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: m.imageOf(t, layers...)})
	if err != nil {
		t.Fatal(err)
	}
	if got := im.Stats().Entries; got != 30_001 {
		t.Errorf("%d names, want 30001", got)
	}
}

// deep returns a chain of directories, each with a long name, and a file at its end.
func deep(n int, chunks ...format.FileChunk) format.InodeVector {
	name := bytes.Repeat([]byte{'d'}, format.MaxNameLen)
	var layer format.InodeVector
	for i := range n {
		layer = append(layer, dir(uint64(i+1), format.DirEntry{Ino: uint64(i + 2), Name: name}))
	}
	return append(layer, file(uint64(n+1), chunks...))
}

// All paths of a deep tree together are too large for the memory; one is not.
func TestDeepTree(t *testing.T) {
	const n = 6000
	m := newMemory()
	missing := format.DigestOf([]byte("not there"))
	layer := deep(n, format.FileChunk{Blob: format.BlobRef{Digest: missing}, Len: 1})
	layer[n].Xattrs = []format.Xattr{{Key: []byte("user.x"), Val: nil}}
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: m.imageOf(t, layer)})
	if err != nil {
		t.Fatal(err)
	}
	count, longest := 0, 0
	if err := im.Walk(func(path string, _ image.Attr) error {
		count++
		longest = max(longest, len(path))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if want := n*(format.MaxNameLen+1) - 1; count != n+1 || longest != want {
		t.Errorf("%d paths of up to %d bytes, want %d of %d", count, longest, n+1, want)
	}
	if !im.HasXattrPrefix("user.") || im.HasXattrPrefix("system.") {
		t.Error("HasXattrPrefix is wrong")
	}
	report, err := im.Verify(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Problems) != 1 || !strings.Contains(report.Problems[0].Where, " of …/ddd") || len(report.Problems[0].Where) > 8192 {
		t.Errorf("%d problems, want one with the end of the path", len(report.Problems))
	}
}

// Every problem names a file, of an image with many files and many problems.
func TestVerifyManyProblems(t *testing.T) {
	const n = 50_000
	m := newMemory()
	top := dir(1)
	layer := format.InodeVector{{}}
	for i := range n {
		ino := uint64(i + 2)
		top.Entries = append(top.Entries, format.DirEntry{Ino: ino, Name: fmt.Append(nil, "f", i)})
		layer = append(layer, file(ino, format.FileChunk{Blob: format.BlobRef{Digest: format.DigestOf(top.Entries[i].Name)}, Len: 1}))
	}
	layer[0] = top
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: m.imageOf(t, layer)})
	if err != nil {
		t.Fatal(err)
	}
	report, err := im.Verify(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Problems) != n {
		t.Fatalf("%d problems, want %d", len(report.Problems), n)
	}
	for _, p := range report.Problems {
		d, name, _ := strings.Cut(p.Where, " of /")
		if d != "blob "+format.DigestOf([]byte(name)).String() {
			t.Fatalf("%s is not of %s", d, name)
		}
	}
}

func TestVerifyIsInterrupted(t *testing.T) {
	m := newMemory()
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: m.imageOf(t, format.InodeVector{dir(1)})})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := im.Verify(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
}

// Metadata that became wrong since the image was opened is one problem.
func TestVerifyChangedMetadata(t *testing.T) {
	m := newMemory()
	root := m.imageOf(t, format.InodeVector{dir(1, entries("f", 2)...), file(2, format.FileChunk{Blob: format.BlobRef{Digest: m.put([]byte("x"))}, Len: 1})})
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	m.blobs[root.Digest][5] ^= 1
	report, err := im.Verify(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Problems) != 1 || !errors.Is(report.Problems[0].Err, store.ErrDigestMismatch) {
		t.Errorf("problems %v, want one of the manifest", report.Problems)
	}
}

// A rootfs of version 2 names its layers, and may name one as often as it likes.
func TestLayersAreBoundedTogether(t *testing.T) {
	s := openStore(t, store.Config{Dir: testtree.Golden(t, "images", "v2-0.1.0")})
	root, err := s.Resolve("small")
	if err != nil {
		t.Fatal(err)
	}
	src := &limits{Source: s}
	if _, err := image.Open(t.Context(), image.Config{Source: src, Root: root}); err != nil {
		t.Fatal(err)
	}
	if len(src.asked) != 2 || src.asked[1] != format.MaxRootfsSize {
		t.Fatalf("limits %d, want those of the rootfs and of a layer", src.asked)
	}
	src = &limits{Source: s, asked: nil, full: 1}
	_, err = image.Open(t.Context(), image.Config{Source: src, Root: root})
	if !errors.Is(err, format.ErrTooLarge) {
		t.Errorf("%v, want ErrTooLarge", err)
	}
	root, err = s.Resolve("changed")
	if err != nil {
		t.Fatal(err)
	}
	src = &limits{Source: s}
	if _, err := image.Open(t.Context(), image.Config{Source: src, Root: root}); err != nil {
		t.Fatal(err)
	}
	for i := 2; i < len(src.asked); i++ {
		if src.asked[i] >= src.asked[i-1] {
			t.Errorf("limits %d do not become less", src.asked)
		}
	}
}

// limits is a Source that remembers which limits it was asked for. From blob full on, if
// that is not 0, every blob is too large.
type limits struct {
	image.Source
	asked []int64
	full  int
}

func (l *limits) Get(ctx context.Context, d format.Digest, limit int64) ([]byte, error) {
	l.asked = append(l.asked, limit)
	if l.full > 0 && len(l.asked) > l.full {
		return nil, store.ErrTooLarge
	}
	return l.Source.Get(ctx, d, limit)
}

// An image is opened, walked and read to its end, whatever its rootfs says, and its index is the same whichever
// way it is made. The blobs that
// the golden images name are there, so that mutations of their metadata find content.
func FuzzOpen(f *testing.F) {
	golden := newMemory()
	for _, layout := range []string{"v1-git", "v2-0.1.0", "v3-0.2.0"} {
		names, err := filepath.Glob(filepath.Join(testtree.Golden(f, "images", layout), "blobs", "sha256", "*"))
		if err != nil {
			f.Fatal(err)
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			golden.put(b)
			if _, err := format.DecodeRootfs(b); err == nil && len(b) <= 16<<10 {
				f.Add(b)
			}
		}
	}
	if len(golden.blobs) == 0 {
		f.Fatal("no seeds: testdata/images is missing")
	}
	for _, layers := range [][]format.InodeVector{
		{deep(40)},
		{{dir(1, entries("a", 2)...), whiteout(2)}, {dir(1, entries("a", 2)...), file(2)}},
	} {
		b, err := format.EncodeRootfs(&format.Rootfs{Layers: layers})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		sameIndex(t, b)
		src := fuzzed{golden, format.DigestOf(b), b}
		im, err := image.Open(t.Context(), image.Config{Source: src, Root: format.Descriptor{MediaType: format.MediaTypeRootfs, Digest: src.digest}, Cache: image.NewCache(1 << 20)})
		if err != nil {
			return
		}
		names := uint64(0)
		err = im.Walk(func(path string, a image.Attr) error {
			names++
			got, err := im.LookupPath(path)
			if err != nil || got != a {
				t.Fatalf("%q: %+v, %v, want %+v", path, got, err, a)
			}
			if _, err := im.Xattrs(a.Ino); err != nil {
				t.Fatal(err)
			}
			if _, err := im.Readlink(a.Ino); (err == nil) != (a.Kind == format.KindSymlink) {
				t.Fatalf("%q: a %s: %v", path, a.Kind, err)
			}
			if a.Kind == format.KindFile {
				readEnds(t, im, a)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if stats := im.Stats(); names != stats.Entries+1 {
			t.Fatalf("%d names were walked, the image has %d", names, stats.Entries)
		}
	})
}

// readEnds reads the beginning and the end of a file, which may claim to have exabytes.
func readEnds(t *testing.T, im *image.Image, a image.Attr) {
	t.Helper()
	p := make([]byte, 1<<20)
	for _, off := range []int64{0, max(0, int64(a.Size)-int64(len(p)/2))} {
		n, err := im.ReadAt(t.Context(), a.Ino, p, off)
		switch {
		case err == nil && n == len(p), errors.Is(err, io.EOF) && uint64(off)+uint64(n) == a.Size:
		case errors.Is(err, format.ErrCorrupt), errors.Is(err, format.ErrTooLarge), errors.Is(err, store.ErrNotFound):
		default:
			t.Fatalf("inode %d of %d bytes: read %d at %d: %v", a.Ino, a.Size, n, off, err)
		}
	}
}

// fuzzed is a Source with one blob more.
type fuzzed struct {
	image.Source
	digest format.Digest
	b      []byte
}

func (s fuzzed) Get(ctx context.Context, d format.Digest, limit int64) ([]byte, error) {
	if d == s.digest {
		return s.b, nil
	}
	return s.Source.Get(ctx, d, limit)
}

// A compressed blob's stored bytes are as hostile as the metadata.
func FuzzCompressedBlob(f *testing.F) {
	const size = 9 << 17 // more than a unit
	for _, b := range compressedSeeds(f, size) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// The long file is read through the seek table, the short one is not.
		for _, want := range []uint64{size, 1000} {
			m := newMemory()
			ref := format.FileChunk{Blob: format.BlobRef{Digest: m.put(b), Compressed: true}, Len: want}
			root := m.imageOf(t, format.InodeVector{dir(1, entries("f", 2)...), file(2, ref)})
			im, err := image.Open(t.Context(), image.Config{Source: m, Root: root})
			if err != nil {
				t.Fatal(err)
			}
			n, err := im.ReadAt(t.Context(), 2, make([]byte, want), 0)
			if err != nil && !errors.Is(err, format.ErrCorrupt) && !errors.Is(err, format.ErrTooLarge) {
				t.Fatalf("%d bytes: %v", n, err)
			}
		}
	})
}

// compressedSeeds returns size zeros as seekable zstd with frames of several sizes, and as
// one plain frame.
func compressedSeeds(f *testing.F, size int) [][]byte {
	f.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	content := make([]byte, size)
	seeds := [][]byte{enc.EncodeAll(content, nil)}
	for _, frame := range []int{128 << 10, size} {
		var b bytes.Buffer
		w, err := seekable.NewWriter(&b, enc)
		if err != nil {
			f.Fatal(err)
		}
		for off := 0; off < size; off += frame {
			if _, err := w.Write(content[off : off+frame]); err != nil {
				f.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			f.Fatal(err)
		}
		seeds = append(seeds, b.Bytes())
	}
	return seeds
}
