package image_test

import (
	"errors"
	"fmt"
	"runtime"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// wide returns a directory with that many files.
func wide(n int) format.InodeVector {
	list := format.InodeVector{dir(1)}
	for i := range n {
		list[0].Entries = append(list[0].Entries, format.DirEntry{Ino: uint64(i + 2), Name: fmt.Append(nil, "file", i)})
		list = append(list, file(uint64(i+2)))
	}
	return list
}

// TestLimits: an image is opened if it has no more than the limits say, whichever layers have it.
func TestLimits(t *testing.T) {
	m := newMemory()
	root := m.imageOf(t, format.InodeVector{file(2)}, wide(1000))
	for _, tt := range []struct {
		name   string
		limits image.Limits
		want   error
	}{
		{"none", image.Limits{}, nil},
		{"enough", image.Limits{Inodes: 1002, Memory: 4 << 20}, nil},
		{"one inode too many", image.Limits{Inodes: 1001}, format.ErrTooManyInodes},
		{"blobs too large", image.Limits{Memory: 64 << 10}, format.ErrTooMuchMemory},
		{"values too large", image.Limits{Memory: 400 << 10}, format.ErrTooMuchMemory},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im, err := image.Open(t.Context(), image.Config{Source: m, Root: root, Limits: tt.limits})
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if err != nil {
				return
			}
			if s := im.Stats(); s.LayerInodes != 1002 || s.Inodes != 1001 {
				t.Errorf("%d inodes in layers and %d in the tree, want 1002 and 1001", s.LayerInodes, s.Inodes)
			}
		})
	}
}

// TestMemory: what an image says it takes is what the heap grows by, more or less.
func TestMemory(t *testing.T) {
	m := newMemory()
	root := m.imageOf(t, wide(100_000))
	heap := func() int64 {
		runtime.GC()
		runtime.GC() // pools keep what they have for one collection
		var s runtime.MemStats
		runtime.ReadMemStats(&s)
		return int64(s.HeapAlloc)
	}
	before := heap()
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	grown, said := heap()-before, im.Memory()
	if grown > said*5/4+1<<20 || said > grown*5/4+1<<20 {
		t.Errorf("the heap grew by %d bytes, the image says %d", grown, said)
	}
	runtime.KeepAlive(im)
}
