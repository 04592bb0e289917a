package builder_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// overlayMount is an overlay mount over an image.
type overlayMount struct {
	dir, lower, upper, work string
	options                 string
}

// mountImage mounts the image of a tag until the test ends and returns where.
func mountImage(t testing.TB, s *store.Store, tag string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounts overlays, which takes root")
	}
	root, err := s.Resolve(tag)
	if err != nil {
		t.Fatal(err)
	}
	im, err := image.Open(t.Context(), image.Config{Source: s, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	server, err := fuse.Mount(fuse.Config{Image: im, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Error(err)
		}
		server.Wait()
	})
	return dir
}

// newOverlay mounts an overlay over a directory until the test ends.
func newOverlay(t testing.TB, lower, options string) *overlayMount {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounts overlays, which takes root")
	}
	top := t.TempDir()
	o := &overlayMount{dir: top + "/merged", lower: lower, upper: top + "/upper", work: top + "/work", options: options}
	for _, dir := range []string{o.dir, o.upper, o.work} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	o.mount(t)
	t.Cleanup(func() { o.unmount(t) })
	return o
}

func (o *overlayMount) mount(t testing.TB) {
	t.Helper()
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,%s", o.lower, o.upper, o.work, o.options)
	// An earlier mount of the same goes on for as long as a process that has just got mounts of its own has it, too.
	err := patiently(func() error { return unix.Mount("overlay", o.dir, "overlay", 0, strings.TrimSuffix(data, ",")) })
	if err != nil {
		t.Fatalf("mount overlay with %s: %v", data, err)
	}
}

func (o *overlayMount) unmount(t testing.TB) {
	t.Helper()
	// A child of this process has its open files until it runs the program it was made for.
	if err := patiently(func() error { return unix.Unmount(o.dir, 0) }); err != nil {
		t.Error(err)
	}
}

// patiently calls f until it does not say any more that something is busy, or five seconds are over.
func patiently(f func() error) (err error) {
	for range 500 {
		if err = f(); !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

func (o *overlayMount) indexed() bool { return strings.Contains(o.options, "index=on") }

// tree describes what the overlay shows. How many names a file has is counted, or taken from the
// upper directory: without an index stat tells the count of before a name was copied up, and
// gives the names of one file in the upper directory different numbers.
func (o *overlayMount) tree(t testing.TB) []testtree.Entry {
	t.Helper()
	entries := fromDir(t, o.dir)
	type id struct{ dev, ino uint64 }
	names := make(map[id]uint64)
	ids := make([]id, len(entries))
	for i, e := range entries {
		var st unix.Stat_t
		if err := unix.Lstat(o.dir+e.Path, &st); err != nil {
			t.Fatal(err)
		}
		ids[i] = id{st.Dev, st.Ino}
		names[ids[i]]++
	}
	for i := range entries {
		if entries[i].Type == testtree.File {
			entries[i].Nlink = names[ids[i]]
			var st unix.Stat_t
			if unix.Lstat(o.upper+entries[i].Path, &st) == nil && !o.indexed() {
				entries[i].Nlink = uint64(st.Nlink) //nolint:unconvert // has 32 bits on arm64
			}
		}
	}
	return entries
}

// mustBuild builds what the overlay shows and fails unless the image shows the same, and only the files
// that the upper directory has were read.
func (o *overlayMount) mustBuild(t testing.TB, s *store.Store, cfg builder.Config) *builder.Result {
	t.Helper()
	var last builder.Progress
	cfg.Upper, cfg.Store = o.upper, s
	cfg.Progress = func(p builder.Progress) { last = p }
	r := build(t, cfg)
	shows(t, s, cfg.Tag, o.tree(t))
	if want := contentOf(t, o.upper); r.Bytes != want || last.Bytes != want {
		t.Errorf("%d bytes were read (progress says %d), the upper directory has %d", r.Bytes, last.Bytes, want)
	}
	return r
}

// contentOf sums up the files of an upper directory that have their content there.
func contentOf(t testing.TB, dir string) int64 {
	t.Helper()
	var sum int64
	seen := make(map[uint64]bool)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if seen[st.Ino] {
			return nil
		}
		seen[st.Ino] = true
		for _, prefix := range []string{"trusted", "user"} {
			if _, err := unix.Lgetxattr(path, prefix+".overlay.metacopy", nil); err == nil {
				return nil
			}
		}
		sum += st.Size
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// changer changes files below a directory, as programs do it.
type changer struct {
	t   testing.TB
	dir string
}

func (c *changer) path(name string) string { return filepath.Join(c.dir, name) }

func (c *changer) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *changer) write(name, content string) {
	c.t.Helper()
	c.must(os.WriteFile(c.path(name), []byte(content), 0o644))
}

func (c *changer) append(name, content string) {
	c.t.Helper()
	f, err := os.OpenFile(c.path(name), os.O_APPEND|os.O_WRONLY, 0)
	c.must(err)
	_, err = f.WriteString(content)
	c.must(errors.Join(err, f.Close()))
}

func (c *changer) mkdir(name string) { c.t.Helper(); c.must(os.MkdirAll(c.path(name), 0o755)) }

func (c *changer) remove(name string) { c.t.Helper(); c.must(os.RemoveAll(c.path(name))) }

func (c *changer) link(old, name string) { c.t.Helper(); c.must(os.Link(c.path(old), c.path(name))) }

func (c *changer) xattr(name, key, value string) {
	c.t.Helper()
	c.must(unix.Lsetxattr(c.path(name), key, []byte(value), 0))
}

// move moves as mv -T does, by copying where the overlay cannot rename.
func (c *changer) move(old, name string) {
	c.t.Helper()
	err := unix.Rename(c.path(old), c.path(name)) // os.Rename moves no directory over another
	if !errors.Is(err, unix.EXDEV) {
		c.must(err)
		return
	}
	if err := os.Remove(c.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.must(err)
	}
	if out, err := exec.CommandContext(c.t.Context(), "cp", "-a", "-T", c.path(old), c.path(name)).CombinedOutput(); err != nil {
		c.t.Fatalf("cp -a %s %s: %v\n%s", old, name, err, out)
	}
	c.remove(old)
}
