package store_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
)

const benchSize = 64 << 10 // an average chunk

func benchStore(b *testing.B) *store.Store {
	b.Helper()
	s, err := store.Open(store.Config{Dir: filepath.Join(b.TempDir(), "layout"), Create: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	b.SetBytes(benchSize)
	b.ReportAllocs()
	return s
}

func BenchmarkPutNew(b *testing.B) {
	s := benchStore(b)
	data := storetest.Data(1, benchSize)
	var d format.Digest
	for i := range b.N {
		binary.LittleEndian.PutUint64(d[:], uint64(i)+1) // hashing is the caller's work
		if err := s.Put(data, d); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPutExisting(b *testing.B) {
	s := benchStore(b)
	data := storetest.Data(1, benchSize)
	d := format.DigestOf(data)
	for b.Loop() {
		if err := s.Put(data, d); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	s := benchStore(b)
	data := storetest.Data(1, benchSize)
	d := format.DigestOf(data)
	if err := s.Put(data, d); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.Get(b.Context(), d, benchSize); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadBlobAt(b *testing.B) {
	for name, size := range map[string]int{"small": benchSize, "large": 64 << 20} {
		b.Run(name, func(b *testing.B) {
			s := benchStore(b)
			data := storetest.Data(1, size)
			d := format.DigestOf(data)
			if err := s.Put(data, d); err != nil {
				b.Fatal(err)
			}
			p := make([]byte, benchSize)
			off := int64(0)
			for b.Loop() {
				if _, err := s.ReadBlobAt(b.Context(), d, p, off); err != nil {
					b.Fatal(err)
				}
				off = (off + benchSize) % int64(size)
			}
		})
	}
}

// BenchmarkCollect surveys and collects a layout of 100 images of 1,000 blobs each, of which
// nothing is to go.
func BenchmarkCollect(b *testing.B) {
	s, err := store.Open(store.Config{Dir: filepath.Join(b.TempDir(), "layout"), Create: true})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	pins, err := store.OpenPins(store.PinsConfig{Dir: pinsDir(s.Dir()), Create: true})
	if err != nil {
		b.Fatal(err)
	}
	const images, chunks = 100, 1000
	for i := range images {
		rootfs := format.Descriptor{Digest: format.DigestOf([]byte(format.EmptyConfig)), Size: 2}
		var list []format.Descriptor
		for j := range chunks {
			data := fmt.Appendf(nil, "chunk %d of image %d", j, i)
			d := format.DigestOf(data)
			// Faster than Put, whose cost is not of interest here.
			if err := os.WriteFile(blobFile(s, d), data, 0o600); err != nil {
				b.Fatal(err)
			}
			list = append(list, format.Descriptor{MediaType: format.MediaTypeChunk, Digest: d, Size: int64(len(data))})
		}
		manifest, err := format.NewManifest(rootfs, [32]byte{}, list).Encode()
		if err == nil {
			err = s.Put(manifest, format.Digest{})
		}
		if err == nil {
			err = s.Tag(fmt.Sprint(i), format.Descriptor{Digest: format.DigestOf(manifest), Size: int64(len(manifest))})
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	b.Run("usage", func(b *testing.B) {
		for b.Loop() {
			if _, _, err := s.Usage(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("survey", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.Survey(b.Context(), pins, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("nothing wanted", func(b *testing.B) {
		for b.Loop() {
			if c, err := s.Collect(b.Context(), pins, store.CollectOptions{OrphanAge: time.Hour}); err != nil || c.Blobs > 0 {
				b.Fatalf("removed %d blobs: %v", c.Blobs, err)
			}
		}
	})
	b.Run("hold", func(b *testing.B) {
		for b.Loop() {
			release, err := pins.Hold(format.Digest{1})
			if err != nil {
				b.Fatal(err)
			}
			release()
		}
	})
}
