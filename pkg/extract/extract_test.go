package extract_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/extract"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

func open(t *testing.T, dir, tag string) *image.Image {
	t.Helper()
	s, err := store.Open(store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	root, err := s.Resolve(tag)
	if err != nil {
		t.Fatal(err)
	}
	im, err := image.Open(t.Context(), image.Config{Source: s, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the golden trees have devices and owners, which only root can make")
	}
}

func TestGoldenTrees(t *testing.T) {
	needRoot(t)
	for _, tag := range []string{"small", "changed", "small-zstd", "segments"} {
		t.Run(tag, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "new")
			if _, err := extract.Extract(t.Context(), extract.Config{Image: open(t, testtree.Golden(t, "images", "v3-master"), tag), Dir: dir}); err != nil {
				t.Fatal(err)
			}
			got, err := testtree.FromDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			if diff := testtree.Diff(testtree.ReadGolden(t, strings.TrimSuffix(tag, "-zstd")), got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// capability is cap_net_bind_service, as the kernel stores it.
func capability() []byte { return []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0} }

// oddTree makes a tree of what the golden trees do not have: sockets, read-only directories,
// capabilities, a symlink with attributes, hard links of everything.
func oddTree(t *testing.T) string {
	t.Helper()
	src := filepath.Join(t.TempDir(), "src")
	must(t, os.MkdirAll(filepath.Join(src, "ro", "sub"), 0o755))
	must(t, os.WriteFile(filepath.Join(src, "ro", "sub", "f"), []byte("x"), 0o444))
	must(t, os.Link(filepath.Join(src, "ro", "sub", "f"), filepath.Join(src, "z")))
	must(t, os.Chmod(filepath.Join(src, "ro", "sub"), 0o500))
	must(t, os.Chmod(filepath.Join(src, "ro"), 0o555|os.ModeSticky))
	must(t, unix.Mknod(filepath.Join(src, "sock"), unix.S_IFSOCK|0o600, 0))
	must(t, unix.Mknod(filepath.Join(src, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, os.WriteFile(filepath.Join(src, "cap"), []byte("x"), 0o755))
	must(t, os.Symlink("nowhere", filepath.Join(src, "link")))
	must(t, os.Link(filepath.Join(src, "link"), filepath.Join(src, "link2")))
	must(t, unix.Mkfifo(filepath.Join(src, "fifo"), 0o640))
	must(t, os.Link(filepath.Join(src, "fifo"), filepath.Join(src, "ro", "fifo2")))
	must(t, unix.Lsetxattr(filepath.Join(src, "link"), "trusted.t", []byte("v"), 0))
	must(t, os.Lchown(filepath.Join(src, "cap"), 7, 8))
	must(t, unix.Setxattr(filepath.Join(src, "cap"), "security.capability", capability(), 0))
	must(t, os.Lchown(filepath.Join(src, "link"), 9, 10))
	must(t, os.WriteFile(filepath.Join(src, "suid"), []byte("#!"), 0o755))
	must(t, os.Lchown(filepath.Join(src, "suid"), 11, 12))
	must(t, os.Chmod(filepath.Join(src, "suid"), 0o755|os.ModeSetuid|os.ModeSetgid))
	must(t, os.WriteFile(filepath.Join(src, "large"), bytes.Repeat([]byte("0123456789abcdef"), 40_000), 0o600))
	must(t, unix.Setxattr(filepath.Join(src, "large"), "user.a", []byte("v"), 0))
	must(t, os.Mkdir(filepath.Join(src, "d"), 0o700))
	must(t, os.Lchown(filepath.Join(src, "d"), 13, 14))
	must(t, os.WriteFile(filepath.Join(src, "d", "f"), []byte("in d"), 0o000))
	return src
}

// build returns an image of a directory.
func build(t *testing.T, src string) *image.Image {
	t.Helper()
	im, _ := buildIn(t, src)
	return im
}

// buildIn also returns the layout that it is in, tagged t.
func buildIn(t *testing.T, src string) (im *image.Image, layout string) {
	t.Helper()
	s, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "layout"), Create: true})
	must(t, err)
	defer s.Close()
	_, err = builder.Build(t.Context(), builder.Config{Dir: src, Store: s, Tag: "t"})
	must(t, err)
	return open(t, s.Dir(), "t"), s.Dir()
}

// sameTree fails the test if two directories differ.
func sameTree(t *testing.T, want, got string) {
	t.Helper()
	w, err := testtree.FromDir(want)
	must(t, err)
	g, err := testtree.FromDir(got)
	must(t, err)
	if diff := testtree.Diff(w, g); diff != "" {
		t.Error(diff)
	}
}

func TestOddTrees(t *testing.T) {
	needRoot(t)
	src := oddTree(t)
	dir := t.TempDir() // exists and is empty
	report, err := extract.Extract(t.Context(), extract.Config{Image: build(t, src), Dir: dir})
	must(t, err)
	sameTree(t, src, dir)
	if want := (extract.Report{Files: 5, Bytes: 640_008}); report != want {
		t.Errorf("report %+v, want %+v", report, want)
	}
}

func TestDeepTree(t *testing.T) {
	src := t.TempDir()
	deep := src
	fd, err := unix.Open(src, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	name := strings.Repeat("d", 200)
	for range 40 { // 8,000 bytes of path
		if err := unix.Mkdirat(fd, name, 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		_ = unix.Close(fd)
		fd = next
		deep += "/" + name
	}
	f, err := unix.Openat(fd, "f", unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(f, []byte("deep")); err != nil {
		t.Fatal(err)
	}
	// Its second name comes last, when the path to the first is too long for the kernel.
	if err := unix.Linkat(fd, "f", unix.AT_FDCWD, filepath.Join(src, "z"), 0); err != nil {
		t.Fatal(err)
	}
	_, _ = unix.Close(f), unix.Close(fd)

	s, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "layout"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := builder.Build(t.Context(), builder.Config{Dir: src, Store: s, Tag: "t"}); err != nil {
		t.Fatal(err)
	}
	im := open(t, s.Dir(), "t")
	dir := filepath.Join(t.TempDir(), "out")
	if _, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir}); err != nil {
		t.Fatal(err)
	}
	if _, err := builder.Build(t.Context(), builder.Config{Dir: dir, Store: s, Tag: "again"}); err != nil {
		t.Fatal(err)
	}
	if got, want := open(t, s.Dir(), "again").Digest(), im.Digest(); got != want {
		t.Errorf("the extracted tree is built to %s, the tree to %s", got, want)
	}
}

func TestRefusals(t *testing.T) {
	im := open(t, testtree.Golden(t, "images", "v3-master"), "segments")
	full := t.TempDir()
	keep := filepath.Join(full, "keep")
	if err := os.WriteFile(keep, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: full}); !errors.Is(err, extract.ErrNotEmpty) {
		t.Errorf("into a full directory: %v", err)
	}
	if _, err := os.Stat(keep); err != nil {
		t.Errorf("what was there is gone: %v", err)
	}
	if _, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: keep}); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("into a file: %v", err)
	}
	if _, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: filepath.Join(full, "no", "where")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("below nothing: %v", err)
	}
	for name, cfg := range map[string]extract.Config{
		"no image":         {Dir: filepath.Join(full, "out")},
		"no directory":     {Image: im},
		"negative workers": {Image: im, Dir: filepath.Join(full, "out"), Workers: -1},
	} {
		if _, err := extract.Extract(t.Context(), cfg); !errors.Is(err, extract.ErrConfig) {
			t.Errorf("%s: %v, want ErrConfig", name, err)
		}
	}
}

// A blob that turns out to be wrong half-way leaves nothing behind.
func TestFailureLeavesNothing(t *testing.T) {
	layout := filepath.Join(t.TempDir(), "layout")
	if err := os.CopyFS(layout, os.DirFS(testtree.Golden(t, "images", "v3-master"))); err != nil {
		t.Fatal(err)
	}
	im := open(t, layout, "segments")
	blobs, err := filepath.Glob(filepath.Join(layout, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	spoiled := 0
	for _, b := range blobs {
		content, err := os.ReadFile(b)
		if err != nil {
			t.Fatal(err)
		}
		if len(content) > 50_000 {
			content[len(content)/2] ^= 1
			if err := os.WriteFile(b, content, 0o600); err != nil {
				t.Fatal(err)
			}
			spoiled++
		}
	}
	if spoiled == 0 {
		t.Fatal("no blob was spoiled")
	}
	for _, exists := range []bool{false, true} {
		dir := filepath.Join(t.TempDir(), "out")
		if exists {
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir}); !errors.Is(err, store.ErrDigestMismatch) {
			t.Errorf("%v, want ErrDigestMismatch", err)
		}
		entries, err := os.ReadDir(dir)
		if exists && (err != nil || len(entries) != 0) || !exists && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("left behind: %v, %v", entries, err)
		}
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := filepath.Join(t.TempDir(), "out")
	if _, err := extract.Extract(ctx, extract.Config{Image: open(t, testtree.Golden(t, "images", "v3-master"), "segments"), Dir: dir}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}
