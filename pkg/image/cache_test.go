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
		p := make([]byte, 8*64<<10)
		n, err := im.ReadAt(t.Context(), 2, p, 0)
		if n != size || (err != nil && !errors.Is(err, io.EOF)) {
			t.Fatalf("read %d bytes, want %d: %v", n, size, err)
		}
		for i, b := range p[:n] {
			if b != byte(i/(64<<10)) {
				t.Fatalf("byte %d is %d", i, b)
			}
		}
	}
	// Seven are the same in both; of the last each needs another length.
	if n := m.gets.Load() - before; n != 9 {
		t.Errorf("%d loads, want 9", n)
	}
	if s := cache.Stats(); s.Loads != 9 || s.Hits < 7 || s.Limit != 16<<20 || s.Bytes < 9*64<<10-(64<<10-100) || s.Bytes > s.Limit {
		t.Errorf("the cache says %+v, want 9 loads, 7 hits or more, and what was read", s)
	}
	if a, _ := first.CachedBytes(); a > 16<<20 {
		t.Errorf("%d bytes cached, limit is 16 MiB", a)
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
