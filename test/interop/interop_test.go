// Package interop_test holds this implementation against the reference, the Rust crate
// puzzlefs 0.2.0: the same trees must get the same digests, and each must read what the
// other writes.
package interop_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/imagetree"
	"github.com/csi-puzzlefs/csi-puzzlefs/internal/reftest"
	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/extract"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// tree makes a directory tree; change makes the one that a delta is built from.
type tree struct {
	name string
	make func(t *testing.T, dir string)
	// change, if not nil, edits the tree for a delta.
	change func(t *testing.T, dir string)
	// digestsOnly says that the tree is too large to be read through both.
	digestsOnly bool
}

func trees() []tree {
	return []tree{
		{name: "empty", make: func(*testing.T, string) {}},
		{name: "one empty file", make: func(t *testing.T, dir string) { write(t, dir, "empty", nil) }},
		{
			name: "small files over chunk boundaries",
			make: func(t *testing.T, dir string) {
				for i := range 1500 {
					write(t, dir, fmt.Sprintf("d%02d/sub%d/f%d", i%23, i%5, i), random(uint64(i), (i*7919)%3000))
				}
			},
			change: func(t *testing.T, dir string) {
				for i := range 1500 {
					name := fmt.Sprintf("d%02d/sub%d/f%d", i%23, i%5, i)
					switch i % 50 {
					case 0:
						remove(t, dir, name)
					case 1:
						write(t, dir, name, random(uint64(i)+1e6, 1000))
					case 2:
						write(t, dir, name+".new", random(uint64(i)+2e6, 500))
					}
				}
				remove(t, dir, "d07")
				write(t, dir, "brand/new/dir/file", []byte("x"))
			},
		},
		{
			name: "large files",
			make: func(t *testing.T, dir string) {
				write(t, dir, "random", random(1, 5<<20+123))
				write(t, dir, "zeros", make([]byte, 3<<20))
				write(t, dir, "text", bytes.Repeat([]byte("the quick brown fox jumps over the lazy dog\n"), 50_000))
				write(t, dir, "again/random", random(1, 5<<20+123))
			},
			change: func(t *testing.T, dir string) {
				b := random(1, 5<<20+123)
				copy(b[2<<20:], "changed in the middle")
				write(t, dir, "random", b)
				remove(t, dir, "zeros")
			},
		},
		{
			name: "links and devices",
			make: func(t *testing.T, dir string) {
				write(t, dir, "a/file", []byte("content"))
				must(t, os.Link(filepath.Join(dir, "a/file"), filepath.Join(dir, "a/hard")))
				must(t, os.Link(filepath.Join(dir, "a/file"), filepath.Join(dir, "z-hard")))
				must(t, os.Symlink("a/file", filepath.Join(dir, "link")))
				must(t, os.Symlink("a", filepath.Join(dir, "dirlink")))
				must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644))
				must(t, unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
				must(t, unix.Mknod(filepath.Join(dir, "loop"), unix.S_IFBLK|0o640, int(unix.Mkdev(7, 300))))
				must(t, os.Lchown(filepath.Join(dir, "link"), 12, 34))
				must(t, os.Chown(filepath.Join(dir, "z-hard"), 1000, 1001))
				must(t, os.Chmod(filepath.Join(dir, "a"), 0o1777|os.ModeSticky))
				must(t, unix.Setxattr(filepath.Join(dir, "a"), "user.key", []byte("value"), 0))
				write(t, dir, "name \xff\n", []byte("odd"))
			},
			change: func(t *testing.T, dir string) {
				remove(t, dir, "fifo")
				remove(t, dir, "dirlink")
				write(t, dir, "dirlink/now-a-dir", []byte("x"))
				must(t, os.Link(filepath.Join(dir, "a/file"), filepath.Join(dir, "another")))
			},
		},
		{
			name: "sockets and set-id bits",
			make: func(t *testing.T, dir string) {
				must(t, unix.Mknod(filepath.Join(dir, "socket"), unix.S_IFSOCK|0o700, 0))
				write(t, dir, "setuid", []byte("x"))
				must(t, os.Chmod(filepath.Join(dir, "setuid"), 0o755|os.ModeSetuid|os.ModeSetgid))
				must(t, os.Symlink("dangling", filepath.Join(dir, "link")))
			},
			digestsOnly: true, // the reference cannot extract a socket
		},
		{
			name: "over 100,000 inodes",
			make: func(t *testing.T, dir string) {
				for i := range 101_000 {
					sub := filepath.Join(dir, fmt.Sprintf("directory-%03d", i/300))
					if i%300 == 0 {
						must(t, os.Mkdir(sub, 0o755))
					}
					must(t, os.WriteFile(filepath.Join(sub, fmt.Sprintf("a file with a name of some length %d", i)), []byte(fmt.Sprint(i%777)), 0o644))
				}
			},
			digestsOnly: true,
		},
	}
}

func TestSameDigests(t *testing.T) {
	reference := reftest.Binary(t)
	for _, tree := range trees() {
		t.Run(tree.name, func(t *testing.T) {
			dir, work := t.TempDir(), t.TempDir()
			tree.make(t, dir)
			theirs, ours := filepath.Join(work, "theirs"), filepath.Join(work, "ours")
			same := func(tag, base string) {
				t.Helper()
				want := refBuild(t, reference, dir, theirs, tag, base, false)
				got := build(t, dir, ours, tag, base)
				if got.Verity.String() != want {
					t.Errorf("%s: digest %s, the reference's is %s", tag, got.Verity, want)
				}
				sameBlobs(t, theirs, ours)
			}
			same("one", "")
			if tree.change != nil {
				tree.change(t, dir)
				same("two", "one")
				same("unchanged", "two")
			}
			if tree.digestsOnly {
				return
			}
			for _, tag := range tags(t, ours) {
				readBoth(t, reference, theirs, ours, tag)
			}
		})
	}
}

// What we compress, at whatever level, the reference reads as well as what it compressed itself.
func TestCompressed(t *testing.T) {
	reference := reftest.Binary(t)
	for _, tree := range trees() {
		if tree.digestsOnly {
			continue
		}
		t.Run(tree.name, func(t *testing.T) {
			dir, work := t.TempDir(), t.TempDir()
			tree.make(t, dir)
			theirs, ours := filepath.Join(work, "theirs"), filepath.Join(work, "ours")
			s, err := store.Open(store.Config{Dir: ours, Create: true})
			must(t, err)
			defer s.Close()
			for level := builder.CompressionFastest; level <= builder.CompressionBest; level++ {
				tag := level.String()
				refBuild(t, reference, dir, theirs, tag, "", true)
				_, err := builder.Build(t.Context(), builder.Config{Dir: dir, Store: s, Tag: tag, Compress: true, Level: level})
				must(t, err)
				readBoth(t, reference, theirs, ours, tag)
			}
		})
	}
}

// readBoth reads the images of a tag in two layouts with both implementations. The
// reference must see the same in ours as in its own, whatever it gets wrong; we must see
// the same in all.
func readBoth(t *testing.T, reference, theirs, ours, tag string) {
	t.Helper()
	// The reference fails on images with whiteouts, its own too.
	want, wantErr := refExtract(t, reference, theirs, tag)
	got, gotErr := refExtract(t, reference, ours, tag)
	if (wantErr == nil) != (gotErr == nil) {
		t.Errorf("%s: the reference extracts its image: %v, ours: %v", tag, wantErr, gotErr)
	} else if diff := testtree.Diff(want, got); diff != "" && wantErr == nil {
		t.Errorf("%s: the reference extracts ours differently:\n%s", tag, diff)
	}
	want = refMount(t, reference, theirs, tag, wantErr == nil)
	got = refMount(t, reference, ours, tag, wantErr == nil)
	if diff := testtree.Diff(want, got); diff != "" {
		t.Errorf("%s: the reference mounts ours differently:\n%s", tag, diff)
	}
	mine := openImage(t, ours, tag)
	truth, err := imagetree.FromImage(t.Context(), mine)
	must(t, err)
	for _, layout := range []string{theirs, ours} {
		if diff := testtree.Diff(truth, mount(t, layout, tag)); diff != "" {
			t.Errorf("%s: mounted from %s:\n%s", tag, layout, diff)
		}
		out := filepath.Join(t.TempDir(), "out")
		_, err := extract.Extract(t.Context(), extract.Config{Image: openImage(t, layout, tag), Dir: out})
		must(t, err)
		if diff := testtree.Diff(truth, fromDir(t, out)); diff != "" {
			t.Errorf("%s: extracted from %s:\n%s", tag, layout, diff)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func random(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func write(t *testing.T, dir, name string, content []byte) {
	t.Helper()
	path := filepath.Join(dir, name)
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, content, 0o644))
}

func remove(t *testing.T, dir, name string) {
	t.Helper()
	must(t, os.RemoveAll(filepath.Join(dir, name)))
}

func fromDir(t *testing.T, dir string) []testtree.Entry {
	t.Helper()
	entries, err := testtree.FromDir(dir)
	must(t, err)
	return entries
}

// refBuild builds with the reference and returns the digest that it prints.
func refBuild(t *testing.T, reference, dir, layout, tag, base string, compress bool) string {
	t.Helper()
	args := []string{"build"}
	if compress {
		args = append(args, "-c")
	}
	if base != "" {
		args = append(args, "-b", base)
	}
	out, err := exec.Command(reference, append(args, dir, layout+":"+tag)...).CombinedOutput()
	if err != nil {
		t.Fatalf("reference: %v\n%s", err, out)
	}
	_, digest, ok := strings.Cut(strings.TrimSpace(string(out)), "digest: ")
	if !ok {
		t.Fatalf("the reference prints %q", out)
	}
	return digest
}

func build(t *testing.T, dir, layout, tag, base string) *builder.Result {
	t.Helper()
	s, err := store.Open(store.Config{Dir: layout, Create: true})
	must(t, err)
	defer s.Close()
	r, err := builder.Build(t.Context(), builder.Config{Dir: dir, Store: s, Tag: tag, Base: base})
	must(t, err)
	return r
}

// sameBlobs compares all files of two layouts.
func sameBlobs(t *testing.T, theirs, ours string) {
	t.Helper()
	cmd := exec.Command("diff", "-rq", theirs, ours)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("the layouts differ: %v\n%s", err, out)
	}
}

func tags(t *testing.T, layout string) []string {
	t.Helper()
	s, err := store.Open(store.Config{Dir: layout})
	must(t, err)
	defer s.Close()
	list, err := s.Tags()
	must(t, err)
	var names []string
	for _, d := range list {
		names = append(names, d.Annotations["org.opencontainers.image.ref.name"])
	}
	return names
}

func openImage(t *testing.T, layout, tag string) *image.Image {
	t.Helper()
	s, err := store.Open(store.Config{Dir: layout})
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	root, err := s.Resolve(tag)
	must(t, err)
	im, err := image.Open(t.Context(), image.Config{Source: s, Root: root})
	must(t, err)
	return im
}

func refExtract(t *testing.T, reference, layout, tag string) ([]testtree.Entry, error) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	if b, err := exec.Command(reference, "extract", layout+":"+tag, out).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, b)
	}
	return fromDir(t, out), nil
}

// refMount mounts with the reference and describes what it shows. Where the reference
// cannot list the tree, because of whiteouts, nothing is compared.
func refMount(t *testing.T, reference, layout, tag string, listable bool) []testtree.Entry {
	t.Helper()
	if !listable {
		return nil
	}
	dir := t.TempDir()
	var output bytes.Buffer
	cmd := exec.Command(reference, "mount", "-f", layout+":"+tag, dir)
	cmd.Stdout, cmd.Stderr = &output, &output
	must(t, cmd.Start())
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount the reference: %v", err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
		if err := cmd.Wait(); err != nil {
			t.Logf("the reference ends with %v: %s", err, output.Bytes())
		}
	}()
	waitMounted(t, dir)
	return fromDir(t, dir)
}

func waitMounted(t *testing.T, dir string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile("/proc/self/mountinfo")
		must(t, err)
		if bytes.Contains(b, []byte(" "+dir+" ")) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("nothing is mounted on %s after 20 s", dir)
		}
	}
}

// mount mounts with our server and describes what it shows.
func mount(t *testing.T, layout, tag string) []testtree.Entry {
	t.Helper()
	dir := t.TempDir()
	s, err := fuse.Mount(fuse.Config{Image: openImage(t, layout, tag), Dir: dir, FSName: "interop"})
	must(t, err)
	defer func() {
		if err := s.Unmount(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
		s.Wait()
	}()
	return fromDir(t, dir)
}
