package store_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
	"github.com/google/go-cmp/cmp"
)

// TestReadDamaged reads blobs that are not what their names say, small and large.
func TestReadDamaged(t *testing.T) {
	for _, size := range []int{5000, store.WholeBlobMax, store.WholeBlobMax + 1, 3 << 20} {
		data := storetest.Data(1, size)
		d := format.DigestOf(data)
		flipped := bytes.Clone(data)
		flipped[size-1] ^= 0x80
		write := func(b []byte) func(*testing.T, string) {
			return func(t *testing.T, path string) { writeFile(t, path, b) }
		}
		for name, damage := range map[string]func(t *testing.T, path string){
			"flipped bit":     write(flipped),
			"truncated":       write(data[:size-1]),
			"empty":           write(nil),
			"longer":          write(append(bytes.Clone(data), 0)),
			"link to content": linkToContent(data),
			"directory":       func(t *testing.T, path string) { must(t, os.Mkdir(path, 0o755)) },
		} {
			t.Run(name, func(t *testing.T) {
				s := create(t, store.Config{})
				damage(t, blobFile(s, d))
				check := func(op string, err error) {
					t.Helper()
					if !errors.Is(err, store.ErrDigestMismatch) {
						t.Errorf("%s of %d bytes: error %v, want ErrDigestMismatch", op, size, err)
						return
					}
					for _, want := range []string{d.String(), blobFile(s, d), "remove it"} {
						if !strings.Contains(err.Error(), want) {
							t.Errorf("%s: error %q does not mention %q", op, err, want)
						}
					}
				}
				b, err := s.Get(t.Context(), d, 1<<30)
				check("Get", err)
				if b != nil {
					t.Error("Get returned bytes all the same")
				}
				p := make([]byte, size+1)
				reads := []store.WholeRead{{Blob: format.VerityData{Digest: d, Verity: verity.Sum(data)}, Into: p}}
				check("ReadWhole", s.ReadWhole(t.Context(), reads))
				if n := reads[0].N; n != 0 || slices.ContainsFunc(p, func(b byte) bool { return b != 0 }) {
					t.Errorf("ReadWhole = %d, and left unverified bytes", n)
				}
				check("GetEarly", getEarly(t.Context(), s, format.VerityData{Digest: d}, 1<<30, nil))
				check("GetEarly by fs-verity", getEarly(t.Context(), s, format.VerityData{Digest: d, Verity: verity.Sum(data)}, 1<<30, nil))
				check("Verify", s.Verify(t.Context(), d))
				// Reads that do not touch the damage fail too, and so does the claim that
				// the blob ends.
				for _, off := range []int64{0, 10, int64(size), int64(size) + 100} {
					for _, length := range []int{1, size + 100} {
						p := bytes.Repeat([]byte{0xee}, length)
						n, err := s.ReadBlobAt(t.Context(), d, p, off)
						check("ReadBlobAt", err)
						if n != 0 || slices.ContainsFunc(p, func(b byte) bool { return b != 0 }) {
							t.Errorf("ReadBlobAt(%d bytes, %d) = %d, and left unverified bytes", length, off, n)
						}
					}
				}
				if used := s.Tables().Used(); used != 0 {
					t.Errorf("%d bytes of block hashes were kept", used)
				}
			})
		}
	}
}

// TestReadLargeDamagedLater damages a large blob after it was found good.
func TestReadLargeDamagedLater(t *testing.T) {
	const size = 20*store.MinBlock + 777
	data := storetest.Data(2, size)
	s := create(t, store.Config{})
	d := put(t, s, data)
	if _, err := s.ReadBlobAt(t.Context(), d, make([]byte, 1), 0); err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(data)
	flipped[5*store.MinBlock+100] ^= 4
	writeFile(t, blobFile(s, d), flipped)

	// Blocks that are still good can be read.
	p := make([]byte, 3*store.MinBlock)
	if n, err := s.ReadBlobAt(t.Context(), d, p, 100); err != nil || !bytes.Equal(p[:n], data[100:100+n]) {
		t.Errorf("read of good blocks: %d, %v", n, err)
	}
	// A read that comes to the bad one returns what is before it.
	for i := range p {
		p[i] = 0xee
	}
	const off = 4*store.MinBlock - 10
	n, err := s.ReadBlobAt(t.Context(), d, p, off)
	if n != store.MinBlock+10 || !errors.Is(err, store.ErrDigestMismatch) {
		t.Errorf("read over the bad block = %d, %v, want %d and ErrDigestMismatch", n, err, store.MinBlock+10)
	}
	if !bytes.Equal(p[:n], data[off:off+n]) || slices.ContainsFunc(p[n:], func(b byte) bool { return b != 0 }) {
		t.Error("read over the bad block returned wrong or unverified bytes")
	}

	must(t, os.Truncate(blobFile(s, d), size-1))
	if n, err := s.ReadBlobAt(t.Context(), d, p[:1], 0); n != 0 || !errors.Is(err, store.ErrDigestMismatch) {
		t.Errorf("read after truncation = %d, %v, want ErrDigestMismatch", n, err)
	}
	must(t, s.Put(data, d))
	if _, err := s.ReadBlobAt(t.Context(), d, p, off); err != nil || !bytes.Equal(p, data[off:off+len(p)]) {
		t.Errorf("read after putting it again: %v", err)
	}
}

// TestLargeBlocks reads a blob whose table does not fit with the smallest blocks.
func TestLargeBlocks(t *testing.T) {
	const size = 130 << 20 // 2080 blocks of 64 KiB, of which 64 KiB of tables hold 1024
	s := create(t, store.Config{TableBytes: 64 << 10})
	data := storetest.Data(3, size)
	d := put(t, s, data)
	for _, read := range []struct{ off, length int }{{0, 10}, {size - 5, 100}, {256<<10 - 1, 2}, {1 << 20, 512 << 10}, {100_000, 600_000}} {
		p := make([]byte, read.length)
		n, err := s.ReadBlobAt(t.Context(), d, p, int64(read.off))
		want := data[read.off:min(read.off+read.length, size)]
		if n != len(want) || (err != nil) != (n < len(p)) || !bytes.Equal(p[:n], want) {
			t.Errorf("ReadBlobAt(%d bytes, %d) = %d, %v", read.length, read.off, n, err)
		}
	}
	if used := s.Tables().Used(); used == 0 || used > 32<<10 {
		t.Errorf("the table has %d bytes, want at most half of TableBytes", used)
	}
}

func TestTableCacheIsBounded(t *testing.T) {
	const limit = 10 * 32
	c := store.NewTableCache(limit)
	builds := 0
	load := func(i byte, entries int) {
		t.Helper()
		n, err := c.Load(t.Context(), format.Digest{i}, func() (int, error) { builds++; return entries, nil })
		if err != nil || n != entries {
			t.Fatalf("Load %d = %d, %v", i, n, err)
		}
		if used := c.Used(); used > limit {
			t.Fatalf("%d bytes used, the limit is %d", used, limit)
		}
	}
	load(1, 4)
	load(2, 4)
	load(1, 4) // used last: 2 is evicted next
	if builds != 2 {
		t.Errorf("%d tables made, want 2", builds)
	}
	load(3, 4)
	load(1, 4)
	if builds != 3 {
		t.Errorf("%d tables made, want 3: the one used last was evicted", builds)
	}
	load(2, 4)
	if builds != 4 {
		t.Errorf("%d tables made, want 4", builds)
	}
	for i := range byte(100) {
		load(i, 5)
	}
}

// TestTableCacheFlight checks that one of several callers makes a table, and what becomes
// of the others when it fails.
func TestTableCacheFlight(t *testing.T) {
	d := format.Digest{1}
	failure := errors.New("failure")
	tests := []struct {
		name       string
		first      error // what the first build fails with
		wantErr    error // what the one that waits gets
		wantBuilds int32
	}{
		{"success", nil, nil, 1},
		{"failure", failure, failure, 1},
		{"the first caller gives up", context.Canceled, nil, 2},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := store.NewTableCache(1000)
			var builds atomic.Int32
			building, goOn := make(chan struct{}), make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() {
				_, err := c.Load(t.Context(), d, func() (int, error) {
					builds.Add(1)
					close(building)
					<-goOn
					return 3, test.first
				})
				if !errors.Is(err, test.first) {
					t.Errorf("the first got %v, want %v", err, test.first)
				}
			})
			<-building

			cancelled, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := c.Load(cancelled, d, nil); !errors.Is(err, context.Canceled) {
				t.Errorf("waiting without time got %v, want context.Canceled", err)
			}

			waiting := make(chan struct{})
			wg.Go(func() {
				close(waiting)
				_, err := c.Load(t.Context(), d, func() (int, error) { builds.Add(1); return 3, test.wantErr })
				if !errors.Is(err, test.wantErr) {
					t.Errorf("the second got %v, want %v", err, test.wantErr)
				}
			})
			<-waiting
			close(goOn)
			wg.Wait()
			// A second that came late made the table itself, where the first failed.
			if got := builds.Load(); got != test.wantBuilds && (test.first == nil || got != 2) {
				t.Errorf("%d builds, want %d", got, test.wantBuilds)
			}
		})
	}
}

func TestReadLargeConcurrently(t *testing.T) {
	s := create(t, store.Config{})
	data := storetest.Data(4, 5<<20)
	d := put(t, s, data)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			p := make([]byte, 200_000)
			off := i * 500_000
			if _, err := s.ReadBlobAt(t.Context(), d, p, int64(off)); err != nil || !bytes.Equal(p, data[off:off+len(p)]) {
				t.Errorf("read at %d: %v", off, err)
			}
		})
	}
	wg.Wait()
}

func TestOpenBlob(t *testing.T) {
	s := create(t, store.Config{})
	d := put(t, s, chunkData)
	f, err := s.OpenBlob(d)
	must(t, err)
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil || !bytes.Equal(b, chunkData) {
		t.Errorf("%d bytes, error %v", len(b), err)
	}
	if f.Name() != blobFile(s, d) {
		t.Errorf("name %q, want %q", f.Name(), blobFile(s, d))
	}
	if _, err := s.OpenBlob(format.Digest{1}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("error %v, want ErrNotFound", err)
	}
}

func TestBlobs(t *testing.T) {
	s := create(t, store.Config{})
	var want []string
	for i := range 2000 { // more than one batch of the directory
		want = append(want, put(t, s, storetest.Data(uint64(i), 10)).Hex())
	}
	writeFile(t, filepath.Join(s.Dir(), "blobs", "sha256", "README"), nil)
	var got []string
	for d, err := range s.Blobs() {
		must(t, err)
		got = append(got, d.Hex())
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Blobs (-want +got):\n%s", diff)
	}
	n := 0
	for _, err := range s.Blobs() {
		must(t, err)
		if n++; n == 3 {
			break
		}
	}
}
