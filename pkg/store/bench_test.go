package store_test

import (
	"encoding/binary"
	"path/filepath"
	"testing"

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
