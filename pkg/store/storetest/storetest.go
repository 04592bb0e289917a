// Package storetest has the conformance suite for everything that keeps blobs by their
// digest and hands them out verified. An implementation's own tests add what is special to
// it: how its content gets damaged, and what it does then.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
	"github.com/google/go-cmp/cmp"
)

// Interface is what the suite needs: the contracts are those of *store.Store.
type Interface interface {
	Put(data []byte, d format.Digest) error
	Size(d format.Digest) (int64, error)
	Get(ctx context.Context, d format.Digest, limit int64) ([]byte, error)
	ReadWhole(ctx context.Context, reads []store.WholeRead) error
	ReadBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error)
}

// sizes are lengths of blobs, in bytes, around the powers of two at which implementations
// change their ways.
var sizes = []int{0, 1, 100, 4096, 64<<10 - 1, 64 << 10, 64<<10 + 1, 256<<10 + 7, 1 << 20, 1<<20 + 1, 3<<20 + 12345}

// Data returns n bytes that differ for each seed and are the same in each run.
func Data(seed uint64, n int) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b) // never fails
	return b
}

// TestStore checks that the stores that open returns keep the contract. Each subtest opens
// an empty one; open registers its cleanup with t.
func TestStore(t *testing.T, open func(t *testing.T) Interface) {
	tests := []struct {
		name string
		run  func(*testing.T, Interface)
	}{
		{"round trip", testRoundTrip},
		{"read whole", testReadWhole},
		{"absent blob", testAbsent},
		{"put twice", testPutTwice},
		{"digest left out", testZeroDigest},
		{"limit", testLimit},
		{"read at", testReadAt},
		{"ownership", testOwnership},
		{"cancelled", testCancelled},
		{"concurrent", testConcurrent},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

// put stores data and returns its digest.
func put(t *testing.T, s Interface, data []byte) format.Digest {
	t.Helper()
	d := format.DigestOf(data)
	if err := s.Put(data, d); err != nil {
		t.Fatalf("Put of %d bytes: %v", len(data), err)
	}
	return d
}

func testRoundTrip(t *testing.T, s Interface) {
	for i, n := range sizes {
		data := Data(uint64(i), n)
		d := put(t, s, data)
		got, err := s.Get(t.Context(), d, int64(n))
		if err != nil {
			t.Errorf("Get of %d bytes: %v", n, err)
		} else if !bytes.Equal(got, data) {
			t.Errorf("Get of %d bytes returned others", n)
		}
		if size, err := s.Size(d); err != nil || size != int64(n) {
			t.Errorf("Size = %d, %v, want %d", size, err, n)
		}
	}
}

// ReadWhole is a ReadWhole for stores that have nothing but a Get, such as those in the memory of a test.
func ReadWhole(ctx context.Context, reads []store.WholeRead, get func(context.Context, format.Digest, int64) ([]byte, error)) error {
	for i := range reads {
		r := &reads[i]
		b, err := get(ctx, r.Blob.Digest, int64(len(r.Into)))
		if err == nil && len(b) > len(r.Into) {
			err = store.ErrTooLarge
		}
		if err != nil {
			return err
		}
		r.N = copy(r.Into, b)
	}
	return nil
}

// readWhole reads one blob.
func readWhole(ctx context.Context, s Interface, d format.VerityData, p []byte) (int, error) {
	reads := []store.WholeRead{{Blob: d, Into: p}}
	err := s.ReadWhole(ctx, reads)
	return reads[0].N, err
}

// Whatever is said of the fs-verity digest, and however much room there is, one by one and all together.
func testReadWhole(t *testing.T, s Interface) {
	if err := s.ReadWhole(t.Context(), nil); err != nil {
		t.Errorf("ReadWhole of nothing: %v", err)
	}
	var all []store.WholeRead
	var contents [][]byte
	for i, n := range sizes {
		data := Data(uint64(i), n)
		d := put(t, s, data)
		for name, sum := range map[string]verity.Digest{"right": verity.Sum(data), "wrong": {1}, "no": {}} {
			blob := format.VerityData{Digest: d, Verity: sum}
			p := make([]byte, n+10)
			got, err := readWhole(t.Context(), s, blob, p)
			if err != nil || got != n || !bytes.Equal(p[:n], data) {
				t.Errorf("ReadWhole of %d bytes with %s fs-verity digest: %d bytes, %v", n, name, got, err)
			}
			all, contents = append(all, store.WholeRead{Blob: blob, Into: make([]byte, n+i%2)}), append(contents, data)
			if n == 0 {
				continue
			}
			if got, err := readWhole(t.Context(), s, blob, p[:n-1]); got != 0 || !errors.Is(err, store.ErrTooLarge) {
				t.Errorf("ReadWhole of %d bytes into one less: %d, %v, want ErrTooLarge", n, got, err)
			}
		}
	}
	if err := s.ReadWhole(t.Context(), all); err != nil {
		t.Fatalf("ReadWhole of all: %v", err)
	}
	for i := range all {
		if got := all[i].Into[:all[i].N]; !bytes.Equal(got, contents[i]) {
			t.Errorf("ReadWhole of all: %d bytes for blob %d of %d", len(got), i, len(contents[i]))
		}
	}
	all[3].Blob.Digest = format.DigestOf([]byte("never put"))
	if err := s.ReadWhole(t.Context(), all); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("ReadWhole of all and one that is not there: %v, want ErrNotFound", err)
	}
	for i := range all {
		if all[i].N != 0 || bytes.ContainsFunc(all[i].Into, func(r rune) bool { return r != 0 }) {
			t.Errorf("ReadWhole left %d bytes of blob %d after an error", all[i].N, i)
		}
	}
}

func testAbsent(t *testing.T, s Interface) {
	put(t, s, []byte("something else"))
	d := format.DigestOf([]byte("never put"))
	if _, err := s.Size(d); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Size: error %v, want ErrNotFound", err)
	}
	if _, err := s.Get(t.Context(), d, 1<<20); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Get: error %v, want ErrNotFound", err)
	}
	if n, err := readWhole(t.Context(), s, format.VerityData{Digest: d}, make([]byte, 10)); n != 0 || !errors.Is(err, store.ErrNotFound) {
		t.Errorf("ReadWhole = %d, %v, want ErrNotFound", n, err)
	}
	if n, err := s.ReadBlobAt(t.Context(), d, make([]byte, 10), 0); n != 0 || !errors.Is(err, store.ErrNotFound) {
		t.Errorf("ReadBlobAt = %d, %v, want ErrNotFound", n, err)
	}
}

func testPutTwice(t *testing.T, s Interface) {
	data := Data(1, 100_000)
	d := put(t, s, data)
	put(t, s, data)
	if got, err := s.Get(t.Context(), d, 1<<20); err != nil || !bytes.Equal(got, data) {
		t.Errorf("Get after the second Put: %d bytes, error %v", len(got), err)
	}
}

func testZeroDigest(t *testing.T, s Interface) {
	data := Data(2, 1000)
	if err := s.Put(data, format.Digest{}); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Get(t.Context(), format.DigestOf(data), 1000); err != nil || !bytes.Equal(got, data) {
		t.Errorf("Get: %d bytes, error %v", len(got), err)
	}
}

func testLimit(t *testing.T, s Interface) {
	d := put(t, s, Data(3, 1000))
	for _, limit := range []int64{-1, 0, 999} {
		if b, err := s.Get(t.Context(), d, limit); !errors.Is(err, store.ErrTooLarge) || b != nil {
			t.Errorf("Get with limit %d: %d bytes, error %v, want ErrTooLarge", limit, len(b), err)
		}
	}
	empty := put(t, s, nil)
	if _, err := s.Get(t.Context(), empty, 0); err != nil {
		t.Errorf("Get of nothing with limit 0: %v", err)
	}
}

// testReadAt compares with bytes.Reader, the standard library's io.ReaderAt.
func testReadAt(t *testing.T, s Interface) {
	for i, n := range sizes {
		data := Data(uint64(i), n)
		d := put(t, s, data)
		want := bytes.NewReader(data)
		for _, off := range []int{0, 1, 4095, 64<<10 - 1, 64 << 10, 1<<20 - 1, 1 << 20, n - 1, n, n + 1, n + 1<<20} {
			for _, length := range []int{0, 1, 4096, 128 << 10, 2 << 20, n} {
				if off < 0 || length == 0 && off > n {
					continue // bytes.Reader says io.EOF to nothing beyond the end, others do not
				}
				name := fmt.Sprintf("blob of %d: ReadBlobAt(%d bytes, %d)", n, length, off)
				p, q := make([]byte, length), make([]byte, length)
				gotN, gotErr := s.ReadBlobAt(t.Context(), d, p, int64(off))
				wantN, wantErr := want.ReadAt(q, int64(off))
				if length == 0 {
					wantErr = nil
				}
				if gotN != wantN || gotErr != wantErr { //nolint:errorlint // io.ReaderAt returns io.EOF itself
					t.Errorf("%s = %d, %v, want %d, %v", name, gotN, gotErr, wantN, wantErr)
				} else if !bytes.Equal(p, q) {
					t.Errorf("%s returned other bytes", name)
				}
			}
		}
		if _, err := s.ReadBlobAt(t.Context(), d, make([]byte, 1), -1); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("blob of %d: ReadBlobAt at offset -1: error %v, want one that says so", n, err)
		}
	}
}

// testOwnership checks that the store keeps neither what it is given nor what it returns.
func testOwnership(t *testing.T, s Interface) {
	data := Data(4, 5000)
	want := bytes.Clone(data)
	d := put(t, s, data)
	clear(data)
	for range 2 {
		got, err := s.Get(t.Context(), d, 5000)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatal("a change to the caller's bytes reached the store")
		}
		clear(got)
	}
}

func testCancelled(t *testing.T, s Interface) {
	for _, n := range []int{1000, 1<<20 + 1} {
		d := put(t, s, Data(5, n))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := s.Get(ctx, d, 1<<30); !errors.Is(err, context.Canceled) {
			t.Errorf("Get of %d bytes: error %v, want context.Canceled", n, err)
		}
		if _, err := readWhole(ctx, s, format.VerityData{Digest: d}, make([]byte, n)); !errors.Is(err, context.Canceled) {
			t.Errorf("ReadWhole of %d bytes: error %v, want context.Canceled", n, err)
		}
		if _, err := s.ReadBlobAt(ctx, d, make([]byte, 10), 5); !errors.Is(err, context.Canceled) {
			t.Errorf("ReadBlobAt of %d bytes: error %v, want context.Canceled", n, err)
		}
		// One caller giving up must not spoil it for the next.
		if _, err := s.ReadBlobAt(t.Context(), d, make([]byte, 10), 5); err != nil {
			t.Errorf("ReadBlobAt of %d bytes afterwards: %v", n, err)
		}
	}
}

// testConcurrent puts and reads the same few blobs from many goroutines.
func testConcurrent(t *testing.T, s Interface) {
	blobs := [][]byte{Data(10, 10), Data(11, 70_000), Data(12, 1<<20+100)}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i, data := range blobs {
				d := format.DigestOf(data)
				if err := s.Put(data, d); err != nil {
					t.Errorf("Put %d: %v", i, err)
					return
				}
				if got, err := s.Get(t.Context(), d, 2<<20); err != nil || !bytes.Equal(got, data) {
					t.Errorf("Get %d: %d bytes, error %v", i, len(got), err)
				}
				p := make([]byte, 5)
				if _, err := s.ReadBlobAt(t.Context(), d, p, 3); err != nil {
					t.Errorf("ReadBlobAt %d: %v", i, err)
				} else if diff := cmp.Diff(data[3:8], p); diff != "" {
					t.Errorf("ReadBlobAt %d (-want +got):\n%s", i, diff)
				}
			}
		})
	}
	wg.Wait()
}
