package builder_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// counting counts what is put into a store.
type counting struct {
	*store.Store
	puts atomic.Int64
}

func (c *counting) Put(data []byte, d format.Digest) error {
	c.puts.Add(1)
	return c.Store.Put(data, d)
}

// metadataPuts is how many blobs are put that are no chunks: the config, the rootfs, the manifest.
const metadataPuts = 3

// noise returns bytes that are cut into chunks of all lengths.
func noise(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// mutable is a directory that changes.
type mutable struct {
	dir string
	rng *rand.Rand
	n   int
}

func (m *mutable) path(name string) string { return filepath.Join(m.dir, name) }

// files returns the regular files.
func (m *mutable) files(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(m.path("*/*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// add makes a file somewhere in the order, of a size that may be nothing, or some chunks.
func (m *mutable) add(t *testing.T) {
	t.Helper()
	m.n++
	size := []int{0, 1, 100, 5000, 70_000, 300_000, 1 << 20}[m.rng.IntN(7)]
	name := m.path(fmt.Sprintf("%c/%c%d", 'a'+m.rng.IntN(4), 'a'+m.rng.IntN(26), m.n))
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, noise(m.rng, size), 0o644); err != nil {
		t.Fatal(err)
	}
}

// change does something to the tree, and returns what.
func (m *mutable) change(t *testing.T) string {
	t.Helper()
	files := m.files(t)
	name := files[m.rng.IntN(len(files))]
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	what, write := "", true
	switch m.rng.IntN(9) {
	case 0:
		m.add(t)
		return "add a file"
	case 1:
		what, write, err = "remove ", false, os.Remove(name)
	case 2:
		what, write, err = "rename ", false, os.Rename(name, m.path(fmt.Sprintf("b/m%d", m.n)))
		m.n++
	case 3:
		what, b = "append to ", append(b, noise(m.rng, 1+m.rng.IntN(5000))...)
	case 4:
		what, b = "cut ", b[:len(b)/2]
	case 5:
		what = "overwrite a byte of "
		if len(b) > 0 {
			b[m.rng.IntN(len(b))] ^= 1
		}
	case 6:
		what, write, err = "chmod ", false, os.Chmod(name, 0o600|os.FileMode(m.rng.IntN(64)))
	case 7:
		what, write, err = "set an attribute of ", false, unix.Lsetxattr(name, "user.n", fmt.Append(nil, m.n), 0)
		m.n++
	case 8:
		what, write, err = "link ", false, os.Link(name, m.path(fmt.Sprintf("c/l%d", m.n)))
		m.n++
	}
	if write {
		err = os.WriteFile(name, b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return what + name
}

// Whatever happened since the build that is remembered, the image is the one that a build makes that
// remembers nothing.
func TestBuildAgain(t *testing.T) {
	jotfs, err := chunk.Jotfs(16 << 10)
	if err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]builder.Config{
		"canonical": {}, "compressed": {Compress: true}, "better": {Compress: true, Level: builder.CompressionBetter}, "jotfs": {Chunker: jotfs}, "delta": {Base: "base"},
	} {
		t.Run(name, func(t *testing.T) {
			m := &mutable{dir: t.TempDir(), rng: rand.New(rand.NewPCG(7, uint64(len(name))))}
			if err := os.MkdirAll(m.path("c"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(m.path("b"), 0o755); err != nil {
				t.Fatal(err)
			}
			for range 25 {
				m.add(t)
			}
			here, there := newStore(t), newStore(t)
			cfg.Dir, cfg.Tag = m.dir, "t"
			if cfg.Base != "" {
				for _, s := range []*store.Store{here, there} {
					build(t, builder.Config{Dir: m.dir, Store: s, Tag: cfg.Base})
				}
			}
			remembering := builder.Later(cfg)
			remembering.Record = filepath.Join(t.TempDir(), "record")
			for step := range 10 {
				what := "nothing"
				if step > 0 {
					what = m.change(t)
				}
				if step%5 == 4 {
					what += ", " + m.change(t)
				}
				counted := &counting{Store: here}
				remembering.Store, cfg.Store = counted, there
				again, fresh := build(t, remembering), build(t, cfg)
				if again.Manifest.Digest != fresh.Manifest.Digest || again.Inodes != fresh.Inodes || again.Bytes != fresh.Bytes || again.Chunks != fresh.Chunks {
					t.Fatalf("step %d, after %s: %+v, want %+v", step, what, again, fresh)
				}
				if len(again.Warnings) > 0 {
					t.Errorf("warnings: %q", again.Warnings)
				}
				// Each change is in a file of at most 1 MiB, or between files.
				if n := counted.puts.Load() - metadataPuts; step > 0 && n > 3<<20/(16<<10) || step > 0 && n > int64(fresh.Chunks/2) && fresh.Chunks > 200 {
					t.Errorf("step %d, after %s: %d of %d chunks were stored", step, what, n, fresh.Chunks)
				}
			}
			shows(t, here, "t", fromDir(t, m.dir))
		})
	}
}

// Nothing is read, hashed or stored of a tree that did not change.
func TestBuildUnchangedAgain(t *testing.T) {
	m := &mutable{dir: t.TempDir(), rng: rand.New(rand.NewPCG(3, 4))}
	for range 60 {
		m.add(t)
	}
	s := &counting{Store: newStore(t)}
	cfg := builder.Later(builder.Config{Dir: m.dir, Store: s, Tag: "t", Record: filepath.Join(t.TempDir(), "made", "record")})
	build(t, cfg)
	if s.puts.Swap(0) <= metadataPuts {
		t.Fatal("the first build stored no chunks")
	}
	for range 2 {
		s.puts.Store(0)
		build(t, cfg)
		if n := s.puts.Load(); n != metadataPuts {
			t.Errorf("%d blobs were stored, want the %d that are no chunks", n, metadataPuts)
		}
	}
}

// A file that was changed just before a build may be changed again without a trace: it is read each time.
func TestUnsettledFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	st := newStore(t)
	cfg := builder.Config{Dir: dir, Store: st, Tag: "t", Record: filepath.Join(t.TempDir(), "record")}
	for i := range 20 {
		want := bytes.Repeat([]byte{byte('a' + i)}, 100)
		if err := os.WriteFile(name, want, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0); err != nil {
			t.Fatal(err)
		}
		build(t, cfg)
		shows(t, st, "t", fromDir(t, dir))
	}
}

// What is remembered of blobs that are gone, or in a file that is damaged, of another build or of none, costs time only.
func TestUselessRecords(t *testing.T) {
	m := &mutable{dir: t.TempDir(), rng: rand.New(rand.NewPCG(5, 6))}
	for range 30 {
		m.add(t)
	}
	record := filepath.Join(t.TempDir(), "record")
	cfg := builder.Later(builder.Config{Dir: m.dir, Store: newStore(t), Tag: "t", Record: record})
	want := build(t, cfg)
	good, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	damaged := bytes.Clone(good)
	damaged[len(damaged)/2] ^= 1
	// summed is what is left of the record with another end, and the right sum.
	summed := func(cut int, end ...byte) []byte {
		b := slices.Concat(good[:len(good)-sha256.Size-cut], end)
		return append(b, sum(b)...)
	}
	const chunkBytes = 109
	for name, b := range map[string][]byte{
		"empty": {}, "short": good[:len(good)/2], "damaged": damaged, "text": []byte("hello"), "good": good,
		"a chunk too few": summed(chunkBytes), "a byte too many": summed(0, 0), "a chunk of nothing": summed(chunkBytes, make([]byte, chunkBytes)...),
		"too many chunks": summed(want.Chunks*chunkBytes+4, 0xff, 0xff, 0xff, 0xff), "no chunks": summed(want.Chunks*chunkBytes+4, 0, 0, 0, 0),
		"no number of chunks": summed(want.Chunks*chunkBytes + 4),
	} {
		if err := os.WriteFile(record, b, 0o600); err != nil {
			t.Fatal(err)
		}
		st := newStore(t) // which has none of the blobs
		cfg.Store = st
		if r := build(t, cfg); r.Manifest.Digest != want.Manifest.Digest {
			t.Errorf("%s: another image", name)
		}
		shows(t, st, "t", fromDir(t, m.dir))
	}
	st := newStore(t)
	cfg.Compress, cfg.Store = true, st
	build(t, cfg)
	shows(t, st, "t", fromDir(t, m.dir))
	// A record that cannot be written is a matter for a warning.
	cfg.Record = filepath.Join(record, "file", "is", "no", "directory")
	if r := build(t, cfg); len(r.Warnings) != 1 {
		t.Errorf("warnings %q, want one", r.Warnings)
	}
}

func sum(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}

// A file that changes while others are read is noticed when its turn comes.
func TestChangeDuringBuildAgain(t *testing.T) {
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(8, 9))
	fill := func(name string, n int) {
		if err := os.WriteFile(filepath.Join(dir, name), noise(rng, n), 0o644); err != nil {
			t.Error(err)
		}
	}
	fill("a", 24<<20) // more than is read ahead
	fill("z", 1<<20)
	cfg := builder.Later(builder.Config{Dir: dir, Store: newStore(t), Tag: "t", Record: filepath.Join(t.TempDir(), "record")})
	want := build(t, cfg)
	fill("a", 24<<20)
	fill("z", 1<<20)
	changed := false
	cfg.Progress = func(builder.Progress) {
		if !changed {
			changed = true
			fill("z", 1<<20)
		}
	}
	if _, err := builder.Build(context.Background(), cfg); !errors.Is(err, builder.ErrChanged) {
		t.Errorf("error %v, want ErrChanged", err)
	}
	if d, err := cfg.Store.Resolve("t"); err != nil || d.Digest != want.Manifest.Digest {
		t.Errorf("the tag names %v, %v, want what it did", d, err)
	}
}
