package image_test

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// TestBeside asks for what is beside files: what is in the cache with their ends, and was not shown before.
func TestBeside(t *testing.T) {
	m := newMemory()
	first, second := m.put([]byte("aabbccddee")), m.put([]byte("ffgg"))
	part := func(d format.Digest, off, n uint64) format.FileChunk {
		return format.FileChunk{Blob: format.BlobRef{Digest: d, Offset: off}, Len: n}
	}
	layer := format.InodeVector{
		dir(1, entries("a", 2, "b", 3, "c", 4, "d", 5, "e", 6, "f", 7, "g", 8)...),
		file(2, part(first, 0, 2)), file(3, part(first, 2, 2)), file(4), file(5, part(first, 4, 4)),
		file(6, part(first, 8, 2), part(second, 0, 2)), file(7, part(second, 2, 1)), file(8, part(second, 3, 1)),
	}
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: m.imageOf(t, layer)})
	if err != nil {
		t.Fatal(err)
	}
	read := func(ino uint64) {
		t.Helper()
		if _, err := im.ReadAt(t.Context(), ino, make([]byte, 2), 0); err != nil {
			t.Fatal(err)
		}
	}
	// beside returns what is shown until one of the given content is refused.
	beside := func(ino uint64, refuse string) string {
		var all []string
		im.Beside(ino, func(_ uint64, content []byte) bool {
			if string(content) == refuse {
				return false
			}
			all = append(all, string(content))
			return true
		})
		return strings.Join(all, " ")
	}
	want := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	want("nothing was loaded", beside(2, ""), "")
	read(2)
	want("the second is refused", beside(2, "ccdd"), "bb")
	want("the first was shown", beside(2, ""), "")
	want("behind what was shown", beside(3, ""), "ccdd")
	want("all were shown", beside(5, ""), "")
	want("its end was not loaded", beside(6, ""), "")
	if _, err := im.ReadAt(t.Context(), 6, make([]byte, 4), 0); err != nil {
		t.Fatal(err)
	}
	want("beside the end of one in two chunks", beside(6, ""), "g g")
	for _, ino := range []uint64{0, 1, 4, 8, 9} {
		want("no file, an empty one, the last one", beside(ino, ""), "")
	}
	// Another image of the same cache knows nothing of it.
	other := bytes.Repeat([]byte("x"), 10)
	d := m.put(other)
	cache := image.NewCache(1 << 20)
	open := func() *image.Image {
		im, err := image.Open(t.Context(), image.Config{Source: m, Cache: cache, Root: m.imageOf(t, format.InodeVector{
			dir(1, entries("a", 2, "b", 3)...), file(2, part(d, 0, 4)), file(3, part(d, 4, 6)),
		})})
		if err != nil {
			t.Fatal(err)
		}
		return im
	}
	for _, each := range []*image.Image{open(), open()} {
		im = each
		read(2)
		want("of several images", beside(2, ""), "xxxxxx")
	}
}

// TestPassingThrough reads a large file in large pieces, which begin and end in the middle of chunks, one by one and
// out of order: nothing of it stays in the cache, each chunk is loaded once, and what small reads want stays.
func TestPassingThrough(t *testing.T) {
	const size, chunk, piece = 4 << 20, 96 << 10, 1 << 20
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content) // never fails
	for name, order := range map[string][]int{"in order": {0, 1, 2, 3}, "backwards": {3, 2, 1, 0}, "mixed": {1, 0, 3, 2}} {
		t.Run(name, func(t *testing.T) {
			m := newMemory()
			var chunks []format.FileChunk
			for part := range slices.Chunk(content, chunk) {
				chunks = append(chunks, format.FileChunk{Blob: format.BlobRef{Digest: m.put(part)}, Len: uint64(len(part))})
			}
			root := m.imageOf(t, format.InodeVector{dir(1, entries("f", 2)...), file(2, chunks...)})
			im, err := image.Open(t.Context(), image.Config{Source: m, Root: root})
			if err != nil {
				t.Fatal(err)
			}
			before := m.gets.Load()
			got := make([]byte, size)
			for _, i := range order {
				if n, err := im.ReadAt(t.Context(), 2, got[i*piece:(i+1)*piece], int64(i*piece)); err != nil || n != piece {
					t.Fatalf("%d bytes, %v", n, err)
				}
			}
			if !bytes.Equal(got, content) {
				t.Error("read something else")
			}
			if n := int(m.gets.Load() - before); n != len(chunks) {
				t.Errorf("%d loads for %d chunks", n, len(chunks))
			}
			if counted, kept := im.CachedBytes(); counted != 0 || kept != 0 {
				t.Errorf("%d bytes are in the cache", kept)
			}
			if _, err := im.ReadAt(t.Context(), 2, make([]byte, 10), 5); err != nil {
				t.Fatal(err)
			}
			if _, kept := im.CachedBytes(); kept != chunk {
				t.Errorf("%d bytes are in the cache after a small read, want a chunk", kept)
			}
		})
	}
}
