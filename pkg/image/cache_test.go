package image_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// However many readers want a chunk it is loaded once, and a reader that gives up does not
// make the others fail.
func TestOneLoadAtATime(t *testing.T) {
	m := newMemory()
	content := []byte("content")
	d := m.put(content)
	root := m.imageOf(t, format.InodeVector{dir(1, entries("f", 2)...), file(2, format.FileChunk{Blob: format.BlobRef{Digest: d}, Len: 7})})
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	first, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	var loads atomic.Int64
	m.hook = func(format.Digest) error {
		if loads.Add(1) == 1 {
			close(started)
			<-first.Done()
			return first.Err()
		}
		return nil
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := im.ReadAt(first, 2, make([]byte, 7), 0); !errors.Is(err, context.Canceled) {
			t.Errorf("interrupted read: %v", err)
		}
	})
	<-started
	for range 20 {
		wg.Go(func() {
			p := make([]byte, 7)
			if _, err := im.ReadAt(t.Context(), 2, p, 0); err != nil || !bytes.Equal(p, content) {
				t.Errorf("read: %q, %v", p, err)
			}
		})
	}
	cancel()
	wg.Wait()
	if n := loads.Load(); n != 2 {
		t.Errorf("%d loads, want the interrupted one and one more", n)
	}
}

func TestCacheStaysBounded(t *testing.T) {
	m := newMemory()
	var chunks []format.FileChunk
	for i := range 64 {
		chunks = append(chunks, format.FileChunk{Blob: format.BlobRef{Digest: m.put(bytes.Repeat([]byte{byte(i)}, 64<<10))}, Len: 64 << 10})
	}
	root := m.imageOf(t, format.InodeVector{dir(1, entries("f", 2)...), file(2, chunks...)})
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: root, Cache: image.NewCache(1 << 20)})
	if err != nil {
		t.Fatal(err)
	}
	read := func() int64 {
		before := m.gets.Load()
		for off := int64(0); off < 64*64<<10; off += 4096 {
			p := make([]byte, 4096)
			if _, err := im.ReadAt(t.Context(), 2, p, off); err != nil || p[0] != byte(off/(64<<10)) {
				t.Fatalf("at %d: %d, %v", off, p[0], err)
			}
		}
		return m.gets.Load() - before
	}
	if n := read(); n != 64 {
		t.Errorf("%d loads for 64 chunks", n)
	}
	if n := read(); n != 64 {
		t.Errorf("%d loads when the cache is too small for all, want 64", n)
	}
	if counted, kept := im.CachedBytes(); counted > 1<<20 || kept > counted {
		t.Errorf("%d bytes cached, %d of data, limit is 1 MiB", counted, kept)
	}
}

// TestSharedCache: two images that have chunks in common load them once, each sees its own
// length of a blob, and together they stay below the limit.
func TestSharedCache(t *testing.T) {
	m := newMemory()
	var chunks []format.FileChunk
	for i := range 8 {
		chunks = append(chunks, format.FileChunk{Blob: format.BlobRef{Digest: m.put(bytes.Repeat([]byte{byte(i)}, 64<<10))}, Len: 64 << 10})
	}
	short := slices.Clone(chunks)
	short[7].Len = 100
	cache := image.NewCache(16 << 20)
	open := func(chunks []format.FileChunk) *image.Image {
		im, err := image.Open(t.Context(), image.Config{
			Source: m, Root: m.imageOf(t, format.InodeVector{dir(1, entries("f", 2)...), file(2, chunks...)}), Cache: cache,
		})
		if err != nil {
			t.Fatal(err)
		}
		return im
	}
	first, second := open(chunks), open(short)
	before := m.gets.Load()
	for im, size := range map[*image.Image]int{first: 8 * 64 << 10, second: 7*64<<10 + 100} {
		// In pieces so small that they are kept.
		content, err := io.ReadAll(io.NewSectionReader(reader{t.Context(), im, 2}, 0, 1<<20))
		if err != nil || len(content) != size {
			t.Fatalf("read %d bytes, want %d: %v", len(content), size, err)
		}
		for i, b := range content {
			if b != byte(i/(64<<10)) {
				t.Fatalf("byte %d is %d", i, b)
			}
		}
	}
	// Seven are the same in both; of the last each needs another length, and who needs little of it finds out that
	// there is more.
	if n := m.gets.Load() - before; n != 9+1 {
		t.Errorf("%d requests for blobs, want 10", n)
	}
	if s := cache.Stats(); s.Loads != 9 || s.Hits < 7 || s.Limit != 16<<20 || s.Bytes < 9*64<<10-(64<<10-100) || s.Bytes > s.Limit {
		t.Errorf("the cache says %+v, want 9 loads, 7 hits or more, and what was read", s)
	}
	if a, _ := first.CachedBytes(); a > 16<<20 {
		t.Errorf("%d bytes cached, limit is 16 MiB", a)
	}
}

// reader is a file of an image that is read in pieces of at most 4 KiB.
type reader struct {
	ctx context.Context
	im  *image.Image
	ino uint64
}

func (r reader) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := r.im.ReadAt(r.ctx, r.ino, p[done:min(done+4096, len(p))], off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// Content that is wanted in large pieces does not push out of the cache what small reads need, and is taken
// from there if it is there.
func TestLargeReadsGoAroundTheCache(t *testing.T) {
	m := newMemory()
	var chunks []format.FileChunk
	var want []byte
	for i := range 8 {
		content := bytes.Repeat([]byte{byte(i)}, 64<<10)
		want = append(want, content...)
		chunks = append(chunks, format.FileChunk{Blob: format.BlobRef{Digest: m.put(content)}, Len: 64 << 10})
	}
	root := m.imageOf(t, format.InodeVector{dir(1, entries("f", 2)...), file(2, chunks...)})
	cache := image.NewCache(1 << 20)
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: root, Cache: cache})
	if err != nil {
		t.Fatal(err)
	}
	// The third chunk is kept, the first and the last are wanted in part.
	if _, err := im.ReadAt(t.Context(), 2, make([]byte, 100), 2*64<<10); err != nil {
		t.Fatal(err)
	}
	before := m.gets.Load()
	p := make([]byte, 7*64<<10)
	if n, err := im.ReadAt(t.Context(), 2, p, 100); n != len(p) || err != nil || !bytes.Equal(p, want[100:100+len(p)]) {
		t.Fatalf("read %d bytes, %v, or others than there are", n, err)
	}
	if n := m.gets.Load() - before; n != 7 {
		t.Errorf("%d loads, want those of 8 chunks but the one that was kept", n)
	}
	if s := cache.Stats(); s.Hits != 1 || s.Loads != 3 || s.Bytes < 3*64<<10 || s.Bytes >= 4*64<<10 {
		t.Errorf("the cache says %+v, want 3 chunks and a hit", s)
	}
}

// Files that need a byte each of large blobs do not keep the blobs in memory.
func TestCacheKeepsNoMoreThanItCounts(t *testing.T) {
	m := newMemory()
	var chunks []format.FileChunk
	for i := range 32 {
		chunks = append(chunks, format.FileChunk{Blob: format.BlobRef{Digest: m.put(bytes.Repeat([]byte{byte(i)}, 1<<20))}, Len: 1})
	}
	root := m.imageOf(t, format.InodeVector{dir(1, entries("f", 2)...), file(2, chunks...)})
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: root, Cache: image.NewCache(1 << 20)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.ReadAt(t.Context(), 2, make([]byte, len(chunks)), 0); err != nil {
		t.Fatal(err)
	}
	counted, kept := im.CachedBytes()
	if counted < int64(len(chunks)) || counted > 1<<20 || kept > counted {
		t.Errorf("%d bytes cached, %d of data, limit is 1 MiB", counted, kept)
	}
}
