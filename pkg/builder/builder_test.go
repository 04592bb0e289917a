package builder_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/imagetree"
	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

func newStore(t testing.TB) *store.Store {
	t.Helper()
	s, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "layout"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func build(t testing.TB, cfg builder.Config) *builder.Result {
	t.Helper()
	r, err := builder.Build(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// tagged is a store that images can be opened in by their tags.
type tagged interface {
	image.Source
	Resolve(tag string) (format.Descriptor, error)
}

// imageTree describes the image of a tag, and fails unless all of it is in good order.
func imageTree(t testing.TB, s tagged, tag string) []testtree.Entry {
	t.Helper()
	root, err := s.Resolve(tag)
	if err != nil {
		t.Fatal(err)
	}
	im, err := image.Open(t.Context(), image.Config{Source: s, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	if w := im.Warnings(); len(w) != 0 {
		t.Errorf("warnings: %q", w)
	}
	got, err := imagetree.FromImage(t.Context(), im)
	if err != nil {
		t.Fatal(err)
	}
	report, err := im.Verify(t.Context(), nil)
	if err != nil || len(report.Problems)+len(report.Warnings) != 0 {
		t.Errorf("verify %s: %+v, %v", tag, report, err)
	}
	return got
}

// shows fails unless the image of a tag has the tree of a directory.
func shows(t testing.TB, s *store.Store, tag string, want []testtree.Entry) {
	t.Helper()
	if diff := testtree.Diff(want, imageTree(t, s, tag)); diff != "" {
		t.Errorf("%s:\n%s", tag, diff)
	}
}

func fromDir(t testing.TB, dir string) []testtree.Entry {
	t.Helper()
	entries, err := testtree.FromDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// write makes files; a content that begins with "->" makes a symlink, with "=" a hard link.
func write(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for _, pass := range []bool{false, true} { // links after what they link to
		for name, content := range files {
			path := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			var err error
			switch target, isLink := strings.CutPrefix(content, "="); {
			case isLink != pass:
			case isLink:
				err = os.Link(filepath.Join(dir, target), path)
			case strings.HasPrefix(content, "->"):
				err = os.Symlink(content[2:], path)
			default:
				err = os.WriteFile(path, []byte(content), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

func remove(t testing.TB, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// The digests that the reference printed for the golden trees (testdata/README.md), however
// many workers there are.
func TestGoldenDigests(t *testing.T) {
	for _, workers := range []int{1, 2, 7} {
		s := newStore(t)
		for _, tt := range []struct{ tree, base, verity, oci string }{
			{"small", "", "c538c09bd36d5b265077e224a31708ca5943c0c19e96e620581d624604b08b30", "9f6cda1472e370be2a773a9dd47bdd6b58d9f69b8406360ba264a59d41373ca7"},
			{"changed", "small", "0d2ea38671ae1c43b86dbb271c7a6285645a017cbf0f0587d284bb8ed6dd3877", "4c49edf478a92d3859cbe6fc93e89a58ac33229f00e6702a8f4ab7339854f2a1"},
			{"segments", "", "b1d4235b953628423b7f0a3679caa9fb1870fded697a4c43d688b1c6be94e21f", "3321cc822cb53527d1c509377a8d23fba84c9bb0ecdfdccc2dc155e1a3e6a5dc"},
		} {
			dir := testtree.UnpackTar(t, testtree.Golden(t, tt.tree+".tar"))
			r := build(t, builder.Config{Dir: dir, Store: s, Tag: tt.tree, Base: tt.base, Workers: workers})
			if r.Verity.String() != tt.verity || r.Manifest.Digest.Hex() != tt.oci {
				t.Errorf("%d workers, %s: %s and %s, want %s and %s", workers, tt.tree, r.Verity, r.Manifest.Digest.Hex(), tt.verity, tt.oci)
			}
			shows(t, s, tt.tree, testtree.ReadGolden(t, tt.tree))
		}
	}
}

// Compressed images differ from the reference's but not from build to build. The digest
// changes when the zstd library changes its output: then images that users have are not
// reproduced, which belongs into the changelog.
func TestCompressedDigest(t *testing.T) {
	dir := testtree.UnpackTar(t, testtree.Golden(t, "small.tar"))
	for level, want := range map[builder.CompressionLevel]string{
		builder.CompressionFastest: "b5f3d32f6bd96f7df98ceba17b83259ba4b64f356a2a53c15ac9359c68a079e3",
		builder.CompressionMedium:  "e5bc0a5d410516a7cc5465fa21bdc085da1688bdf4b6362bf3289a3bca6d476b",
		builder.CompressionBetter:  "bb0261ab96b6cf9181e2966d4b965e5b4b2014ff74adf93ab169a4cc2ed41c10",
		builder.CompressionBest:    "6536f213b47a53b25485f422f57af491a97e785eb4c0cb6c2aa62d594c0ec177",
	} {
		for _, workers := range []int{1, 3} {
			s := newStore(t)
			r := build(t, builder.Config{Dir: dir, Store: s, Tag: "z", Compress: true, Level: level, Workers: workers})
			if r.Verity.String() != want {
				t.Errorf("%v, %d workers: %s, want %s", level, workers, r.Verity, want)
			}
			shows(t, s, "z", testtree.ReadGolden(t, "small"))
		}
	}
}

func TestJotfsChunker(t *testing.T) {
	a, err := chunk.Jotfs(16 << 10)
	if err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	dir := testtree.UnpackTar(t, testtree.Golden(t, "segments.tar"))
	if r := build(t, builder.Config{Dir: dir, Store: s, Tag: "j", Chunker: a}); r.Chunks < 20 {
		t.Errorf("%d chunks of 16 KiB in %d bytes", r.Chunks, r.Bytes)
	}
	shows(t, s, "j", testtree.ReadGolden(t, "segments"))
}

func TestKindsOfFiles(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"empty": "", "a/b/c/deep": "x", "big": strings.Repeat("0123456789", 200_000),
		"link": "->nowhere", "hard": "=big", "a/hard": "=big", "symhard": "=link", "not utf-8 \xff": "x", "new\nline": "y",
	})
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o620); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(filepath.Join(dir, "socket"), unix.S_IFSOCK|0o700, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "a"), 0o3777|os.ModeSetgid|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"user.z": "last", "user.a": "", "user.m": "mid"} {
		if err := unix.Setxattr(filepath.Join(dir, "empty"), name, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	s := newStore(t)
	r := build(t, builder.Config{Dir: dir, Store: s, Tag: "t"})
	shows(t, s, "t", fromDir(t, dir))
	if r.Bytes != 2_000_003 {
		t.Errorf("%d bytes of content", r.Bytes)
	}
}

// Deltas read as the tree they were built from, also where the reference's do not.
func TestDeltas(t *testing.T) {
	type step struct {
		remove []string
		write  map[string]string
	}
	base := map[string]string{"a": "one", "b": "=a", "c": "three", "d/e": "four", "d/f/g": "five", "l": "->c"}
	for name, steps := range map[string][]step{
		"nothing":             {{}},
		"add":                 {{nil, map[string]string{"new": "n", "d/new": "n"}}},
		"remove":              {{[]string{"c", "d/e", "l"}, nil}},
		"remove a directory":  {{[]string{"d"}, nil}},
		"replace by other":    {{[]string{"c", "d", "l"}, map[string]string{"c/now/dir": "x", "d": "file", "l": "regular"}}},
		"there and back":      {{[]string{"c"}, nil}, {nil, map[string]string{"c": "three"}}},
		"back after whiteout": {{[]string{"c", "d/f"}, nil}, {nil, map[string]string{"x": "y"}}, {nil, map[string]string{"c": "other", "d/f/g": "again"}}},
		"A, B, A":             {{nil, map[string]string{"c": "changed"}}, {nil, map[string]string{"c": "three"}}},
		"break a hard link":   {{[]string{"b"}, map[string]string{"b": "own"}}},
		"drop first link":     {{[]string{"a"}, nil}},
		"drop second link":    {{[]string{"b"}, nil}},
		"drop both links":     {{[]string{"a", "b"}, nil}, {nil, map[string]string{"a": "one", "b": "=a"}}},
		"new link first":      {{nil, map[string]string{"0": "=a"}}},
		"link two old files":  {{[]string{"c"}, map[string]string{"c": "=a"}}},
	} {
		t.Run(name, func(t *testing.T) {
			dir, s := t.TempDir(), newStore(t)
			write(t, dir, base)
			build(t, builder.Config{Dir: dir, Store: s, Tag: "0"})
			for i, step := range steps {
				remove(t, dir, step.remove...)
				write(t, dir, step.write)
				tag := fmt.Sprint(i + 1)
				build(t, builder.Config{Dir: dir, Store: s, Tag: tag, Base: fmt.Sprint(i)})
				shows(t, s, tag, fromDir(t, dir))
			}
		})
	}
}

func TestUnchangedDeltaAddsNoLayer(t *testing.T) {
	dir, s := t.TempDir(), newStore(t)
	write(t, dir, map[string]string{"a": "1", "b": "2"})
	first := build(t, builder.Config{Dir: dir, Store: s, Tag: "first"})
	again := build(t, builder.Config{Dir: dir, Store: s, Tag: "again", Base: "first"})
	if first.Manifest.Digest != again.Manifest.Digest {
		t.Errorf("%s, then %s", first.Manifest.Digest, again.Manifest.Digest)
	}
	remove(t, dir, "a")
	gone := build(t, builder.Config{Dir: dir, Store: s, Tag: "gone", Base: "first"})
	still := build(t, builder.Config{Dir: dir, Store: s, Tag: "still", Base: "gone"})
	if gone.Manifest.Digest != still.Manifest.Digest {
		t.Errorf("with a whiteout: %s, then %s", gone.Manifest.Digest, still.Manifest.Digest)
	}
}

// A mount below the tree is not entered.
func TestStaysOnOneFileSystem(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"a": "x", "m/hidden": "y"})
	if os.Geteuid() != 0 {
		t.Skip("mounting a tmpfs needs root")
	}
	if err := unix.Mount("tmpfs", filepath.Join(dir, "m"), "tmpfs", 0, "size=1m,mode=711"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(filepath.Join(dir, "m"), 0); err != nil {
			t.Error(err)
		}
	}()
	write(t, dir, map[string]string{"m/mounted": "z"})
	s := newStore(t)
	build(t, builder.Config{Dir: dir, Store: s, Tag: "t"})
	var want []testtree.Entry
	for _, e := range fromDir(t, dir) {
		if e.Path != "/m/mounted" {
			want = append(want, e)
		}
	}
	shows(t, s, "t", want)
}

// A file that changes its size is an error, and the tag stays as it was.
func TestChangingFiles(t *testing.T) {
	grow := func(f *os.File) error { _, err := f.WriteAt([]byte("more"), 64<<20); return err }
	shrink := func(f *os.File) error { return f.Truncate(1 << 20) }
	for name, change := range map[string]func(*os.File) error{
		"grows": grow, "shrinks": shrink, "grows in an upper": grow, "shrinks in an upper": shrink,
	} {
		t.Run(name, func(t *testing.T) {
			dir, s := t.TempDir(), newStore(t)
			f, err := os.Create(filepath.Join(dir, "f"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(64 << 20); err != nil {
				t.Fatal(err)
			}
			// While the first chunk is stored, the pipeline holds at most half of the file.
			slow := &hooked{Store: s}
			slow.put = func(data []byte) error {
				if len(data) > 1000 {
					return change(f)
				}
				return nil
			}
			cfg := builder.Config{Dir: dir, Store: slow, Tag: "t", Workers: 1}
			if strings.HasSuffix(name, "upper") {
				build(t, builder.Config{Dir: t.TempDir(), Store: s, Tag: "base"})
				cfg.Dir, cfg.Upper, cfg.UpperXattrs, cfg.Base = "", dir, builder.UpperXattrsUser, "base"
			}
			_, err = builder.Build(t.Context(), cfg)
			if !errors.Is(err, builder.ErrChanged) || !strings.Contains(err.Error(), filepath.Join(dir, "f")) {
				t.Errorf("%v, want ErrChanged with the path", err)
			}
			if _, err := s.Resolve("t"); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("the tag is set: %v", err)
			}
		})
	}
}

// hooked is a store with something done before each Put.
type hooked struct {
	*store.Store
	put func(data []byte) error
}

func (h *hooked) Put(data []byte, d format.Digest) error {
	if err := h.put(data); err != nil {
		return err
	}
	return h.Store.Put(data, d)
}

// Whatever stops a build, no goroutine and no open file is left, and no tag is set.
func TestFailuresLeaveNothing(t *testing.T) {
	src := t.TempDir()
	rng := rand.New(rand.NewPCG(3, 3))
	files := make(map[string]string)
	for i := range 400 {
		b := make([]byte, rng.IntN(40_000))
		for k := range b {
			b[k] = byte(rng.Uint32())
		}
		files[fmt.Sprintf("d%d/f%d", i%7, i)] = "random" + string(b)
	}
	write(t, src, files)
	full := errors.New("no space")
	for name, tt := range map[string]struct {
		stop    func(cancel func()) error
		want    error
		workers int
	}{
		"full disk":           {func(func()) error { return full }, full, 1},
		"full disk, parallel": {func(func()) error { return full }, full, 6},
		"interrupt":           {func(cancel func()) error { cancel(); return nil }, context.Canceled, 1},
		"interrupt, parallel": {func(cancel func()) error { cancel(); return nil }, context.Canceled, 6},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			before, beforeFDs := runtime.NumGoroutine(), openFiles(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var n atomic.Int32
			h := &hooked{Store: s, put: func([]byte) error {
				if n.Add(1) == 20 {
					return tt.stop(cancel)
				}
				return nil
			}}
			if _, err := builder.Build(ctx, builder.Config{Dir: src, Store: h, Tag: "t", Workers: tt.workers}); !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
			for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			if n := runtime.NumGoroutine(); n > before {
				t.Errorf("%d goroutines, %d before", n, before)
			}
			if n := openFiles(t); n > beforeFDs {
				t.Errorf("%d open files, %d before", n, beforeFDs)
			}
			if _, err := s.Resolve("t"); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("the tag is set: %v", err)
			}
		})
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

func TestBadInput(t *testing.T) {
	s := newStore(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	write(t, dir, map[string]string{"file": "x"})
	old, err := store.Open(store.Config{Dir: testtree.Golden(t, "images", "v2-0.1.0")})
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	foreign := []byte(`{"schemaVersion":2,"config":{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar"}]}`)
	d := format.DigestOf(foreign)
	if err := s.Put(foreign, d); err != nil {
		t.Fatal(err)
	}
	if err := s.Tag("foreign", format.Descriptor{Digest: d, Size: int64(len(foreign)), MediaType: format.MediaTypeManifest}); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		cfg  builder.Config
		want error
	}{
		"missing directory": {builder.Config{Dir: filepath.Join(dir, "no"), Store: s, Tag: "t"}, fs.ErrNotExist},
		"a file":            {builder.Config{Dir: file, Store: s, Tag: "t"}, nil},
		"no tag":            {builder.Config{Dir: dir, Store: s}, builder.ErrConfig},
		"no store":          {builder.Config{Dir: dir, Tag: "t"}, builder.ErrConfig},
		"missing base":      {builder.Config{Dir: dir, Store: s, Tag: "t", Base: "none"}, store.ErrNotFound},
		"foreign base":      {builder.Config{Dir: dir, Store: s, Tag: "t", Base: "foreign"}, format.ErrNotPuzzleFS},
		"old layout":        {builder.Config{Dir: dir, Store: old, Tag: "t"}, store.ErrReadOnly},
	} {
		_, err := builder.Build(t.Context(), tt.cfg)
		if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}

// BenchmarkBuild builds an image of the Go tool's own sources, without syncing anything.
func BenchmarkBuild(b *testing.B) {
	dir := filepath.Join(runtime.GOROOT(), "src") //nolint:staticcheck // where the sources are if they are anywhere
	if _, err := os.Stat(dir); err != nil {
		b.Skipf("no Go sources: %v", err)
	}
	b.ReportAllocs()
	for b.Loop() {
		r := build(b, builder.Config{Dir: dir, Store: newStore(b), Tag: "t"})
		b.SetBytes(r.Bytes)
	}
}
