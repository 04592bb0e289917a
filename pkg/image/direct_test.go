package image_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// generator makes a layer like one that a builder makes of the files of a system: directories of some files each,
// most of which are smaller than a chunk.
type generator struct {
	rand  *rand.Rand
	layer format.InodeVector
	last  uint64 // the last number that was given away
	blob  format.BlobRef
	left  uint64 // of the blob
}

// generated returns a layer with about that many files.
func generated(files int) format.InodeVector {
	g := &generator{rand: rand.New(rand.NewPCG(1, 2)), last: format.RootIno}
	g.dir(format.RootIno, (files+159)/160, 10, 16)
	layer := make(format.InodeVector, g.last)
	for _, inode := range g.layer {
		layer[inode.Ino-1] = inode
	}
	return layer
}

// dir adds a directory with so many children, each of which has so many children, and so on.
func (g *generator) dir(ino uint64, children int, below ...int) {
	d := dir(ino)
	first := g.last + 1
	g.last += uint64(children)
	for i := range uint64(children) {
		d.Entries = append(d.Entries, format.DirEntry{Ino: first + i, Name: fmt.Appendf(nil, "%04d-%0*d", i, 1+g.rand.IntN(16), 0)})
	}
	g.layer = append(g.layer, d)
	for i := range uint64(children) {
		switch {
		case len(below) > 0:
			g.dir(first+i, below[0], below[1:]...)
		case g.rand.IntN(20) == 0:
			g.layer = append(g.layer, format.Inode{Ino: first + i, Kind: format.KindSymlink, Perm: 0o777, Symlink: fmt.Append(nil, "../target/", i)})
		default:
			g.file(first + i)
		}
	}
}

// file adds a file, whose chunks begin where those of the file before ended.
func (g *generator) file(ino uint64) {
	f := file(ino)
	f.Perm = 0o644
	if g.rand.IntN(100) == 0 {
		f.UID, f.Xattrs = 1000, []format.Xattr{{Key: []byte("user.origin"), Val: []byte("generated")}}
	}
	for size := uint64(1) << g.rand.IntN(18); size > 0; {
		if g.left == 0 {
			g.left = 16<<10 + g.rand.Uint64N(100<<10)
			g.blob = format.BlobRef{Digest: format.DigestOf(fmt.Append(nil, ino, size))}
		}
		n := min(size, g.left)
		f.Chunks = append(f.Chunks, format.FileChunk{Blob: g.blob, Len: n})
		g.blob.Offset += n
		g.left -= n
		size -= n
	}
	g.layer = append(g.layer, f)
}

func encode(t testing.TB, layers ...format.InodeVector) []byte {
	t.Helper()
	b, err := format.EncodeRootfs(&format.Rootfs{Layers: layers})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What builders make is indexed directly, and as it would be otherwise.
func TestDirectIndex(t *testing.T) {
	rootfses := map[string][]byte{
		"generated": encode(t, generated(3000)),
		"kinds":     encode(t, kinds()),
		"empty":     encode(t, format.InodeVector{dir(1)}),
		"hard links and holes": encode(t, format.InodeVector{
			dir(1, entries("a", 2, "b", 3)...), dir(2, entries("c", 9, "d", 9)...), dir(3, entries("e", 9, "f", 12)...), file(9),
			{Ino: 12, Kind: format.KindChr, Major: 3, Minor: 4},
		}),
		"scattered": encode(t, scattered(1000)),
	}
	for _, layout := range []string{"v3-0.2.0", "v3-master"} {
		names, err := filepath.Glob(filepath.Join(testtree.Golden(t, "images", layout), "blobs", "sha256", "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if r, err := format.DecodeRootfs(b); err == nil && len(r.Layers) == 1 {
				rootfses[filepath.Join(layout, filepath.Base(name))] = b
			}
		}
	}
	if len(rootfses) < 6 {
		t.Fatal("no images of the reference")
	}
	for name, b := range rootfses {
		t.Run(name, func(t *testing.T) {
			directly, err := image.CompareIndexes(b)
			if !directly {
				t.Error("it is not indexed directly")
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// scattered returns a directory whose files have numbers far from each other.
func scattered(n int) format.InodeVector {
	list := format.InodeVector{dir(1)}
	for i := range n {
		ino := uint64(10*i + 10)
		list[0].Entries = append(list[0].Entries, format.DirEntry{Ino: ino, Name: fmt.Appendf(nil, "%06d", i)})
		list = append(list, file(ino))
	}
	return list
}

// A message of which a byte is changed has the same index whichever way it is made, or is not indexed directly.
func TestDirectIndexOrNot(t *testing.T) {
	b := encode(t, kinds())
	directly := 0
	for i := range b {
		for _, x := range []byte{1, 2, 3, 5, 0x7f, 0xff} {
			changed := bytes.Clone(b)
			changed[i] ^= x
			if sameIndex(t, changed) {
				directly++
			}
		}
	}
	if directly < len(b) {
		t.Errorf("%d messages were indexed directly: too few to say anything", directly)
	}
}

// sameIndex compares the two ways of making an index, and reports whether there are two.
func sameIndex(t *testing.T, b []byte) bool {
	t.Helper()
	directly, err := image.CompareIndexes(b)
	if err != nil && !strings.Contains(err.Error(), "traversal limit") {
		t.Errorf("indexed directly, otherwise not so: %v", err)
	}
	return directly
}

// kinds returns a small tree with an inode of each kind, a hard link and extended attributes.
func kinds() format.InodeVector {
	blob := format.BlobRef{Digest: format.DigestOf([]byte("content")), Offset: 3}
	return format.InodeVector{
		dir(1, entries("a", 2, "b", 3, "c", 4, "d", 5)...),
		dir(2, entries("e", 7, "f", 8, "g", 9, "h", 10)...),
		file(3, format.FileChunk{Blob: blob, Len: 5}, format.FileChunk{Blob: format.BlobRef{Digest: format.DigestOf(nil), Compressed: true}, Len: 7}),
		{Ino: 4, Kind: format.KindSymlink, UID: 5, GID: 6, Symlink: []byte("a/e")},
		{Ino: 5, Kind: format.KindFifo, Perm: 0o640},
		{Ino: 7, Kind: format.KindSocket},
		{Ino: 8, Kind: format.KindChr, Major: 1, Minor: 3, Xattrs: []format.Xattr{{Key: []byte("user.b"), Val: []byte("1")}, {Key: []byte("user.a")}}},
		{Ino: 9, Kind: format.KindBlk, Major: 8, Minor: 1},
		file(10, format.FileChunk{Blob: blob, Len: 1}),
	}
}

// FuzzIndex: both ways of making an index agree.
func FuzzIndex(f *testing.F) {
	for _, layer := range []format.InodeVector{kinds(), scattered(20), unsorted(3), {dir(1, entries("a", 2, "b", 2)...), file(2)}} {
		f.Add(encode(f, layer))
	}
	f.Fuzz(func(t *testing.T, b []byte) { sameIndex(t, b) })
}

// unsorted returns a directory of files whose numbers go up and down.
func unsorted(n int) format.InodeVector {
	list := scattered(n)
	for i := 2; i < len(list)-1; i++ {
		list[i].Ino = uint64(1 << 40 >> (i % 30))
	}
	return list
}

// What is unusual is not indexed directly: it means what the general way says it means, or is refused there.
func TestNoDirectIndex(t *testing.T) {
	for name, layers := range map[string][]format.InodeVector{
		"no layer":             {},
		"no inodes":            {{}},
		"two layers":           {{dir(1)}, {dir(1)}},
		"no root":              {{dir(2)}},
		"root is a file":       {{file(1)}},
		"root has a name":      {{dir(1, entries("a", 1)...)}},
		"root has two numbers": {{dir(1), dir(1)}},
		"whiteout":             {{dir(1, entries("a", 2)...), whiteout(2)}},
		"unknown":              {{dir(1, entries("a", 2)...), {Ino: 2}}},
		"no such inode":        {{dir(1, entries("a", 3)...), file(2)}},
		"no name":              {{dir(1), file(2)}},
		"same name":            {{dir(1, entries("a", 2, "a", 3)...), file(2), file(3)}},
		"not in order":         {{dir(1, entries("b", 2, "a", 3)...), file(2), file(3)}},
		"same number":          {{dir(1, entries("a", 2)...), file(2), file(2)}},
		"far from sorted":      {unsorted(1000)},
		"almost in order":      {unsorted(3)},
		"directory twice":      {{dir(1, entries("a", 2, "b", 2)...), dir(2)}},
		"directory in two":     {{dir(1, entries("a", 2, "b", 3)...), dir(2, entries("c", 4)...), dir(3, entries("c", 4)...), dir(4)}},
		"above what lists it":  {{dir(1, entries("a", 3)...), dir(2), dir(3, entries("b", 2)...)}},
		"circle":               {{dir(1), dir(2, entries("a", 3)...), dir(3, entries("b", 2)...)}},
		"in itself":            {{dir(1), dir(2, entries("a", 2)...)}},
		"too large": {{
			dir(1, entries("a", 2, "b", 3)...), file(2, format.FileChunk{Len: 1 << 62}), file(3, format.FileChunk{Len: 1 << 62}),
		}},
	} {
		t.Run(name, func(t *testing.T) {
			directly, err := image.CompareIndexes(encode(t, layers...))
			if directly {
				t.Errorf("it is indexed directly: %v", err)
			}
		})
	}
}

// The index takes 100 bytes for an inode at most, without names: nodes, names' places, chunks and blobs.
func TestIndexSize(t *testing.T) {
	m := newMemory()
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: m.imageOf(t, generated(50_000))})
	if err != nil {
		t.Fatal(err)
	}
	inodes := im.Stats().Inodes
	bytes, chunks, blobs := im.Footprint()
	perInode := func(n int) float64 { return float64(n) / float64(inodes) }
	t.Logf("%d inodes, %.2f chunks and %.2f blobs for each: %.1f bytes", inodes, perInode(chunks), perInode(blobs), perInode(int(bytes)))
	if inodes < 50_000 || perInode(chunks) < 0.9 {
		t.Error("the generated tree says nothing")
	}
	if perInode(int(bytes)) > 100 {
		t.Errorf("%.1f bytes for an inode, want 100 at most", perInode(int(bytes)))
	}
}

// BenchmarkOpen opens an image of 50,000 files whose metadata is in memory: what is measured is decoding and
// indexing, without reading and hashing.
func BenchmarkOpen(b *testing.B) {
	m := newMemory()
	root := m.imageOf(b, generated(50_000))
	var before, after runtime.MemStats
	var im *image.Image
	b.ReportAllocs()
	runtime.ReadMemStats(&before)
	for b.Loop() {
		var err error
		if im, err = image.Open(b.Context(), image.Config{Source: m, Root: root}); err != nil {
			b.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	bytes, _, _ := im.Footprint()
	b.ReportMetric(float64(after.NumGC-before.NumGC)/float64(b.N), "GCs/op")
	b.ReportMetric(float64(bytes)/float64(im.Stats().Inodes), "index-B/inode")
}
