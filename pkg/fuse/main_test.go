package fuse_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
)

// helperVar names what this test binary does instead of testing (helper_test.go).
const helperVar = "PUZZLEFS_FUSE_TEST_HELPER"

// ours begins the source of every mount that these tests make.
const ours = "puzzlefs-fuse-test"

func TestMain(m *testing.M) {
	if name := os.Getenv(helperVar); name != "" {
		os.Exit(runHelper(name, os.Args[1:]))
	}
	code := m.Run()
	if left := leftovers(); left != "" {
		fmt.Fprintf(os.Stderr, "left after the tests: %s\n", left)
		code = 1
	}
	os.Exit(code)
}

// leftovers describes what the tests should have cleaned up: mounts and goroutines.
func leftovers() string {
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return err.Error()
	}
	for _, m := range table {
		if m.Type == fuse.FSType && m.Source == source() {
			return "a mount at " + m.Point
		}
	}
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for stack := range bytes.SplitSeq(stacks, []byte("\n\n")) {
		if bytes.Contains(stack, []byte("go-fuse")) {
			return "a goroutine of a server:\n" + string(stack)
		}
	}
	return ""
}

// source is the source of the mounts of this process.
func source() string { return fmt.Sprintf("%s-%d", ours, os.Getpid()) }

// needRoot skips what only root can do, and says so.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting for all users, and trees with owners and devices, take root")
	}
}

// tempDir is t.TempDir that other users can reach.
func tempDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// mount mounts an image in a directory of its own and unmounts it after the test.
func mount(t testing.TB, img *image.Image, change ...func(*fuse.Config)) (*fuse.Server, string) {
	t.Helper()
	needRoot(t)
	cfg := fuse.Config{Image: img, Dir: tempDir(t), FSName: source(), Logger: slog.New(slog.DiscardHandler)}
	for _, c := range change {
		c(&cfg)
	}
	s, err := fuse.Mount(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Detach(); err != nil {
			t.Error(err)
		}
		s.Wait()
		table, err := mountinfo.Read(mountinfo.Self)
		if err != nil {
			t.Error(err)
		}
		if left := table.At(s.Dir()); len(left) > 0 {
			t.Errorf("left mounted: %+v", left)
		}
	})
	return s, s.Dir()
}

// golden opens a golden image.
func golden(t testing.TB, layout, tag string) *image.Image {
	t.Helper()
	return openTag(t, openStore(t, testtree.Golden(t, "images", layout), false), tag)
}

func openStore(t testing.TB, dir string, create bool) *store.Store {
	t.Helper()
	s, err := store.Open(store.Config{Dir: dir, Create: create})
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

func openTag(t testing.TB, s *store.Store, tag string) *image.Image {
	t.Helper()
	root, err := s.Resolve(tag)
	if err != nil {
		t.Fatal(err)
	}
	return openImage(t, s, root)
}

func openImage(t testing.TB, src image.Source, root format.Descriptor) *image.Image {
	t.Helper()
	img, err := image.Open(context.Background(), image.Config{Source: src, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// build makes an image of a directory and returns it with the store that has it.
func build(t testing.TB, dir string) (*store.Store, format.Descriptor) {
	t.Helper()
	s := openStore(t, filepath.Join(tempDir(t), "layout"), true)
	r, err := builder.Build(context.Background(), builder.Config{Dir: dir, Store: s, Tag: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return s, r.Manifest
}

// tree makes a directory with files; a name that ends with a slash is a directory.
func tree(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(tempDir(t), "tree")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		path := filepath.Join(dir, name)
		var err error
		if strings.HasSuffix(name, "/") {
			err = os.Mkdir(path, 0o755)
		} else {
			err = os.WriteFile(path, []byte(files[name]), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// memory is a Source of blobs in memory. Get, if set, is called before a chunk is handed
// over.
type memory struct {
	blobs map[format.Digest][]byte
	get   func(context.Context, format.Digest) error
}

func (m *memory) Get(ctx context.Context, d format.Digest, _ int64) ([]byte, error) {
	if m.get != nil {
		if err := m.get(ctx, d); err != nil {
			return nil, err
		}
	}
	b, ok := m.blobs[d]
	if !ok {
		return nil, fmt.Errorf("get %s: %w", d, store.ErrNotFound)
	}
	return b, nil
}

func (m *memory) ReadWhole(ctx context.Context, reads []store.WholeRead) error {
	return storetest.ReadWhole(ctx, reads, m.Get)
}

func (m *memory) ReadBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error) {
	b, err := m.Get(ctx, d, 0)
	if err != nil {
		return 0, err
	}
	return bytes.NewReader(b).ReadAt(p, off)
}

func (m *memory) Size(d format.Digest) (int64, error) { return int64(len(m.blobs[d])), nil }

// add adds a blob and returns a reference to all of it.
func (m *memory) add(content []byte) []format.FileChunk {
	d := format.DigestOf(content)
	if m.blobs == nil {
		m.blobs = make(map[format.Digest][]byte)
	}
	m.blobs[d] = content
	return []format.FileChunk{{Blob: format.BlobRef{Digest: d}, Len: uint64(len(content))}}
}

// image makes an image of inodes, which must be sorted by number.
func (m *memory) image(t testing.TB, inodes format.InodeVector) *image.Image {
	t.Helper()
	rootfs, err := format.EncodeRootfs(&format.Rootfs{Layers: []format.InodeVector{inodes}})
	if err != nil {
		t.Fatal(err)
	}
	m.add(rootfs)
	root := format.Descriptor{MediaType: format.MediaTypeRootfs, Digest: format.DigestOf(rootfs), Size: int64(len(rootfs))}
	return openImage(t, m, root)
}

// entries makes a directory's list: names in order, numbers from first on.
func entries(first uint64, names ...string) []format.DirEntry {
	list := make([]format.DirEntry, 0, len(names))
	for i, name := range names {
		list = append(list, format.DirEntry{Ino: first + uint64(i), Name: []byte(name)})
	}
	return list
}

// records is a slog.Handler that keeps the lines it gets, as text.
type records struct {
	mu    sync.Mutex // guards lines
	lines []string
}

func (r *records) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(r, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Write takes one line.
func (r *records) Write(line []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, string(line))
	return len(line), nil
}

// all returns the lines so far.
func (r *records) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.lines)
}

// helper prepares this binary to run as a helper, as the given user.
func helper(t testing.TB, uid uint32, name string, args ...string) *exec.Cmd {
	t.Helper()
	// The binary lies where only root can reach it; what runs can always be run again.
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), helperVar+"="+name)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if uid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	}
	return cmd
}

// runs runs a helper and returns what it prints.
func runs(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("helper %v: %v\n%s", cmd.Args[1:], err, out)
	}
	return string(out)
}
