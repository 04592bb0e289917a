package image_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"

	"github.com/klauspost/compress/zstd"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/imagetree"
	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

func openStore(t testing.TB, cfg store.Config) *store.Store {
	t.Helper()
	s, err := store.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func openTag(t testing.TB, s *store.Store, tag string, src image.Source) *image.Image {
	t.Helper()
	root, err := s.Resolve(tag)
	if err != nil {
		t.Fatal(err)
	}
	im, err := image.Open(t.Context(), image.Config{Source: src, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// Everything that the reference ever wrote is read, and shows the tree it was made from.
func TestGoldenImages(t *testing.T) {
	for layout, version := range map[string]format.Version{"v1-git": 1, "v2-0.1.0": 2, "v3-0.2.0": 3, "v3-master": 3} {
		s := openStore(t, store.Config{Dir: testtree.Golden(t, "images", layout)})
		for _, tag := range []string{"small", "changed", "small-zstd", "segments"} {
			t.Run(layout+" "+tag, func(t *testing.T) {
				im := openTag(t, s, tag, s)
				if im.Version() != version {
					t.Errorf("version %d, want %d", im.Version(), version)
				}
				got, err := imagetree.FromImage(t.Context(), im)
				if err != nil {
					t.Fatal(err)
				}
				if diff := testtree.Diff(testtree.ReadGolden(t, strings.TrimSuffix(tag, "-zstd")), got); diff != "" {
					t.Error(diff)
				}
				report, err := im.Verify(t.Context(), nil)
				if err != nil {
					t.Fatal(err)
				}
				if len(report.Problems) != 0 {
					t.Errorf("problems: %v", report.Problems)
				}
				if len(report.Warnings) > 1 || len(report.Warnings) == 1 && tag != "small-zstd" {
					t.Errorf("warnings: %q", report.Warnings)
				}
			})
		}
	}
}

// The digests that the reference printed (testdata/README.md).
func TestVerityDigests(t *testing.T) {
	for layout, want := range map[string]string{
		"v1-git":    "8ca8e0cba572635eac0d55f35770e05a1c05061bab7772468ef052fc82c0e418",
		"v2-0.1.0":  "4c5f5f0e65371e46d0fe0844ca9b60952310cf6d34f67041e1c3b99503d40994",
		"v3-0.2.0":  "c538c09bd36d5b265077e224a31708ca5943c0c19e96e620581d624604b08b30",
		"v3-master": "c538c09bd36d5b265077e224a31708ca5943c0c19e96e620581d624604b08b30",
	} {
		s := openStore(t, store.Config{Dir: testtree.Golden(t, "images", layout)})
		if got := openTag(t, s, "small", s).Verity().String(); got != want {
			t.Errorf("%s: %s, want %s", layout, got, want)
		}
	}
}

// memory is a Source whose blobs are in memory, and can be made wrong.
type memory struct {
	mu    sync.Mutex
	blobs map[format.Digest][]byte
	gets  atomic.Int64
	hook  func(d format.Digest) error
}

func newMemory() *memory { return &memory{blobs: make(map[format.Digest][]byte)} }

func (m *memory) put(b []byte) format.Digest {
	d := format.DigestOf(b)
	m.blobs[d] = b
	return d
}

func (m *memory) Size(d format.Digest) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.blobs[d]
	if !ok {
		return 0, store.ErrNotFound
	}
	return int64(len(b)), nil
}

func (m *memory) Get(_ context.Context, d format.Digest, limit int64) ([]byte, error) {
	m.gets.Add(1)
	if m.hook != nil {
		if err := m.hook(d); err != nil {
			return nil, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.blobs[d]
	switch {
	case !ok:
		return nil, store.ErrNotFound
	case int64(len(b)) > limit:
		return nil, store.ErrTooLarge
	case format.DigestOf(b) != d:
		return nil, store.ErrDigestMismatch
	}
	return bytes.Clone(b), nil
}

func (m *memory) ReadWhole(ctx context.Context, reads []store.WholeRead) error {
	return storetest.ReadWhole(ctx, reads, m.Get)
}

func (m *memory) ReadBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error) {
	b, err := m.Get(ctx, d, 1<<40)
	if err != nil {
		return 0, err
	}
	return bytes.NewReader(b).ReadAt(p, off)
}

// imageOf stores a rootfs of the layers and returns the image's descriptor.
func (m *memory) imageOf(t testing.TB, layers ...format.InodeVector) format.Descriptor {
	t.Helper()
	b, err := format.EncodeRootfs(&format.Rootfs{Layers: layers})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := format.NewManifest(format.Descriptor{Digest: m.put(b), Size: int64(len(b))}, verity.Sum(b), nil).Encode()
	if err != nil {
		t.Fatal(err)
	}
	m.put([]byte(format.EmptyConfig))
	return format.Descriptor{MediaType: format.MediaTypeManifest, Digest: m.put(manifest)}
}

func entries(nameInos ...any) []format.DirEntry {
	var list []format.DirEntry
	for i := 0; i < len(nameInos); i += 2 {
		name, _ := nameInos[i].(string)
		ino, _ := nameInos[i+1].(int)
		list = append(list, format.DirEntry{Name: []byte(name), Ino: uint64(ino)})
	}
	return list
}

func dir(ino uint64, list ...format.DirEntry) format.Inode {
	return format.Inode{Ino: ino, Kind: format.KindDir, Perm: 0o755, Entries: list}
}

func file(ino uint64, chunks ...format.FileChunk) format.Inode {
	return format.Inode{Ino: ino, Kind: format.KindFile, Chunks: chunks}
}

func whiteout(ino uint64) format.Inode { return format.Inode{Ino: ino, Kind: format.KindWhiteout} }

// paths lists an image, a line a path, with inode numbers.
func paths(t testing.TB, im *image.Image) string {
	t.Helper()
	var list []string
	if err := im.Walk(func(path string, a image.Attr) error {
		list = append(list, path+"="+string(rune('0'+a.Ino)))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return strings.Join(list, " ")
}

func TestMergeLayers(t *testing.T) {
	lookBelow := dir(1, entries("a", 2, "new", 5)...)
	lookBelow.LookBelow = true
	tests := []struct {
		name   string
		layers []format.InodeVector // topmost first
		want   string
	}{
		{"whiteout hides", []format.InodeVector{
			{dir(1, entries("a", 2, "b", 3)...), whiteout(2), file(3)},
			{dir(1, entries("a", 2)...), file(2)},
		}, ".=1 b=3"},
		{"whiteout below, back above", []format.InodeVector{
			{dir(1, entries("a", 3)...), file(3)},
			{dir(1, entries("a", 2)...), whiteout(2)},
			{dir(1, entries("a", 2)...), file(2)},
		}, ".=1 a=3"},
		{"inode of the lower layer", []format.InodeVector{
			{dir(1, entries("a", 2)...)},
			{dir(1, entries("a", 2, "gone", 4)...), file(2), file(4)},
		}, ".=1 a=2"},
		{"look below", []format.InodeVector{
			{lookBelow, whiteout(3), file(5)},
			{dir(1, entries("a", 4, "b", 3, "c", 4)...), file(2), file(3), file(4)},
		}, ".=1 a=2 c=4 new=5"},
		{"a directory of only whiteouts is empty", []format.InodeVector{
			{dir(1, entries("d", 2)...), dir(2, entries("x", 3)...), whiteout(3)},
		}, ".=1 d=2"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMemory()
			im, err := image.Open(t.Context(), image.Config{Source: m, Root: m.imageOf(t, tt.layers...)})
			if err != nil {
				t.Fatal(err)
			}
			if got := paths(t, im); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			if n := im.Stats().Inodes; int(n) != len(strings.Fields(tt.want)) {
				t.Errorf("%d inodes", n)
			}
		})
	}
}

func TestOpenRefusesHostileTrees(t *testing.T) {
	for name, layer := range map[string]format.InodeVector{
		"no root":             {dir(2)},
		"root is a file":      {file(1)},
		"root is a whiteout":  {whiteout(1)},
		"cycle":               {dir(1, entries("a", 2)...), dir(2, entries("b", 3)...), dir(3, entries("c", 2)...)},
		"root below itself":   {dir(1, entries("a", 1)...)},
		"directory twice":     {dir(1, entries("a", 2, "b", 2)...), dir(2)},
		"duplicate name":      {dir(1, entries("a", 2, "a", 3)...), file(2), file(3)},
		"entry leads nowhere": {dir(1, entries("a", 9)...)},
		"unknown kind":        {dir(1, entries("a", 2)...), {Ino: 2, Kind: format.KindUnknown}},
	} {
		m := newMemory()
		if _, err := image.Open(t.Context(), image.Config{Source: m, Root: m.imageOf(t, layer)}); !errors.Is(err, format.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", name, err)
		}
	}
}

// A broken hard link in a delta of the reference: two inodes have one number.
func TestDuplicateNumbersWarn(t *testing.T) {
	m := newMemory()
	d := m.put([]byte("content"))
	layer := format.InodeVector{
		dir(1, entries("a", 2, "b", 2)...),
		file(2), file(2, format.FileChunk{Blob: format.BlobRef{Digest: d}, Len: 7}),
	}
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: m.imageOf(t, layer)})
	if err != nil {
		t.Fatal(err)
	}
	if len(im.Warnings()) != 1 {
		t.Errorf("warnings %q, want one", im.Warnings())
	}
	if got, want := paths(t, im), ".=1 a=2 b=2"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	// The middle of three is the first that a binary search meets.
	if a, err := im.Attr(2); err != nil || a.Size != 0 {
		t.Errorf("inode 2: %+v, %v", a, err)
	}
}

func TestLookups(t *testing.T) {
	s := openStore(t, store.Config{Dir: testtree.Golden(t, "images", "v3-master")})
	im := openTag(t, s, "small", s)
	if _, err := im.Lookup(1, "missing"); !errors.Is(err, image.ErrNotExist) {
		t.Errorf("missing name: %v", err)
	}
	if _, err := im.Attr(1 << 40); !errors.Is(err, image.ErrNotExist) {
		t.Errorf("missing inode: %v", err)
	}
	tool, err := im.LookupPath("/bin/tool")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.Lookup(tool.Ino, "x"); !errors.Is(err, image.ErrNotDir) {
		t.Errorf("lookup in a file: %v", err)
	}
	if _, err := im.OpenDir(tool.Ino); !errors.Is(err, image.ErrNotDir) {
		t.Errorf("list a file: %v", err)
	}
	if _, err := im.Readlink(tool.Ino); !errors.Is(err, image.ErrNotSymlink) {
		t.Errorf("readlink of a file: %v", err)
	}
	if _, err := im.Xattr(tool.Ino, "user.none"); !errors.Is(err, image.ErrNoXattr) {
		t.Errorf("missing xattr: %v", err)
	}
	if _, err := im.ReadAt(t.Context(), 1, make([]byte, 1), 0); !errors.Is(err, image.ErrIsDir) {
		t.Errorf("read of a directory: %v", err)
	}
	if n, err := im.ReadAt(t.Context(), tool.Ino, make([]byte, 10), int64(tool.Size)-3); n != 3 || !errors.Is(err, io.EOF) {
		t.Errorf("read over the end: %d, %v", n, err)
	}
	if n, err := im.ReadAt(t.Context(), tool.Ino, make([]byte, 10), 1<<62); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("read behind the end: %d, %v", n, err)
	}
	if _, err := im.ReadAt(t.Context(), tool.Ino, make([]byte, 10), -1); err == nil {
		t.Error("read before the start: no error")
	}
	bin, err := im.LookupPath("bin")
	if err != nil {
		t.Fatal(err)
	}
	d, err := im.OpenDir(bin.Ino)
	if err != nil || d.Parent() != 1 {
		t.Errorf("parent of /bin: %d, %v", d.Parent(), err)
	}
}

func TestFS(t *testing.T) {
	src := t.TempDir()
	for name, content := range map[string]string{"a.txt": "a", "d/e/f.bin": strings.Repeat("x", 300_000), "d/empty": "", "z": "zz"} {
		path := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"link": "d/e/f.bin", "d/up": "../a.txt", "d/abs": "/z", "dirlink": "d/e"} {
		if err := os.Symlink(target, filepath.Join(src, name)); err != nil {
			t.Fatal(err)
		}
	}
	im, _ := build(t, builder.Config{Dir: src})
	fsys := im.FS(t.Context())
	if err := fstest.TestFS(fsys, "a.txt", "d/e/f.bin", "d/empty", "d/up", "d/abs", "link", "dirlink"); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]string{"link": strings.Repeat("x", 300_000), "d/up": "a", "d/abs": "zz", "dirlink/f.bin": strings.Repeat("x", 300_000)} {
		f, err := fsys.Open(name)
		if err != nil {
			t.Error(err)
			continue
		}
		if b, err := io.ReadAll(f); err != nil || string(b) != want {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
	}
}

// build makes an image in a store of its own.
func build(t testing.TB, cfg builder.Config) (*image.Image, *store.Store) {
	t.Helper()
	s := openStore(t, store.Config{Dir: filepath.Join(t.TempDir(), "layout"), Create: true})
	cfg.Store, cfg.Tag = s, "t"
	if _, err := builder.Build(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return openTag(t, s, "t", s), s
}

// Chunks far larger than a unit are read from the middle, raw or compressed.
func TestLargeBlobs(t *testing.T) {
	src := t.TempDir()
	rng := rand.New(rand.NewPCG(1, 1))
	content := make([]byte, 30<<20)
	for i := range content {
		content[i] = "abcdefgh"[rng.IntN(8)]
	}
	if err := os.WriteFile(filepath.Join(src, "f"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	large, err := chunk.Jotfs(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	for _, compress := range []bool{false, true} {
		im, _ := build(t, builder.Config{Dir: src, Chunker: large, Compress: compress})
		if n := im.Stats().Blobs; n > 15 {
			t.Fatalf("%d blobs are not large", n)
		}
		a, err := im.LookupPath("f")
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			off := rng.Int64N(int64(len(content)))
			p := make([]byte, 1+rng.IntN(3<<20))
			n, err := im.ReadAt(t.Context(), a.Ino, p, off)
			if err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if !bytes.Equal(p[:n], content[off:off+int64(n)]) || n < len(p) && off+int64(n) != int64(len(content)) {
				t.Fatalf("compress=%v: %d wrong bytes at %d", compress, n, off)
			}
		}
		report, err := im.Verify(t.Context(), nil)
		if err != nil || len(report.Problems) != 0 || len(report.Warnings) != 0 {
			t.Errorf("compress=%v: %+v, %v", compress, report, err)
		}
	}
}

// Blobs that one read wants are read together, raw ones and compressed ones, those in the cache, and those
// that have more than the file needs.
func TestBlobsOfOneRead(t *testing.T) {
	m := newMemory()
	rng := rand.New(rand.NewPCG(3, 3))
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	var chunks []format.FileChunk
	var want []byte
	for i := range 60 {
		content := make([]byte, 20<<10+rng.IntN(200<<10))
		for j := range content {
			content[j] = "abcdefgh"[rng.IntN(8)]
		}
		used := content
		if i%7 == 3 {
			used = content[:len(content)/4]
		}
		ref := format.BlobRef{Compressed: i%3 != 0}
		if ref.Compressed {
			ref.Digest = m.put(enc.EncodeAll(content, nil))
		} else {
			ref.Digest = m.put(content)
		}
		chunks = append(chunks, format.FileChunk{Blob: ref, Len: uint64(len(used))})
		want = append(want, used...)
	}
	root := m.imageOf(t, format.InodeVector{dir(1, entries("f", 2)...), file(2, chunks...)})
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: root, Cache: image.NewCache(1 << 20)})
	if err != nil {
		t.Fatal(err)
	}
	read := func(off, length int) (int, error) {
		// What is behind the buffer is not the reader's.
		all := bytes.Repeat([]byte{0xee}, length+100)
		n, err := im.ReadAt(t.Context(), 2, all[:length], int64(off))
		if !bytes.Equal(all[:n], want[off:off+n]) {
			t.Fatalf("%d wrong bytes at %d", n, off)
		}
		if !bytes.Equal(all[length:], bytes.Repeat([]byte{0xee}, 100)) {
			t.Fatalf("reading %d bytes at %d wrote behind them", length, off)
		}
		return n, err
	}
	for range 200 {
		length := 1 + rng.IntN(3<<20)
		if rng.IntN(2) == 0 {
			length = 1 + rng.IntN(50<<10)
		}
		off := rng.IntN(len(want))
		if n, err := read(off, length); n != min(length, len(want)-off) || err != nil && !errors.Is(err, io.EOF) {
			t.Fatalf("read %d of %d bytes at %d: %v", n, length, off, err)
		}
	}
	spoiled := m.blobs[chunks[20].Blob.Digest]
	spoiled[len(spoiled)/2] ^= 1
	before := 0
	for _, c := range chunks[:20] {
		before += int(c.Len)
	}
	im, err = image.Open(t.Context(), image.Config{Source: m, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := read(0, len(want)); n > before || !errors.Is(err, store.ErrDigestMismatch) {
		t.Errorf("read %d bytes, %v; a blob is spoiled at %d", n, err, before)
	}
}

func TestWrongBlobs(t *testing.T) {
	content := []byte("the content of a chunk")
	tests := []struct {
		name  string
		spoil func(m *memory, d format.Digest)
		ref   func(r *format.FileChunk)
		want  error
	}{
		{"flipped bit", func(m *memory, d format.Digest) { m.blobs[d][3] ^= 1 }, nil, store.ErrDigestMismatch},
		{"missing", func(m *memory, d format.Digest) { delete(m.blobs, d) }, nil, store.ErrNotFound},
		{"too short", nil, func(r *format.FileChunk) { r.Blob.Offset = 10 }, format.ErrCorrupt},
		{"not zstd", nil, func(r *format.FileChunk) { r.Blob.Compressed = true }, format.ErrCorrupt},
		{"far too short", nil, func(r *format.FileChunk) { r.Blob.Offset = 1 << 50 }, format.ErrCorrupt},
		{"no seek table", nil, func(r *format.FileChunk) { r.Blob.Compressed, r.Blob.Offset = true, 1<<50 }, format.ErrCorrupt},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMemory()
			d := m.put(bytes.Clone(content))
			ref := format.FileChunk{Blob: format.BlobRef{Digest: d}, Len: uint64(len(content))}
			if tt.ref != nil {
				tt.ref(&ref)
			}
			root := m.imageOf(t, format.InodeVector{dir(1, entries("f", 2)...), file(2, ref)})
			im, err := image.Open(t.Context(), image.Config{Source: m, Root: root})
			if err != nil {
				t.Fatal(err)
			}
			if tt.spoil != nil {
				tt.spoil(m, d)
			}
			p := make([]byte, 8)
			if n, err := im.ReadAt(t.Context(), 2, p, 0); n != 0 || !errors.Is(err, tt.want) {
				t.Errorf("ReadAt = %d, %v, want %v", n, err, tt.want)
			}
			report, err := im.Verify(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			if len(report.Problems) != 1 || !strings.HasSuffix(report.Problems[0].Where, " of /f") {
				t.Errorf("problems %v, want one of /f", report.Problems)
			}
		})
	}
}
