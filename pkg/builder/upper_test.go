package builder_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

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
	if err := unix.Mount("overlay", o.dir, "overlay", 0, strings.TrimSuffix(data, ",")); err != nil {
		t.Fatalf("mount overlay with %s: %v", data, err)
	}
}

func (o *overlayMount) unmount(t testing.TB) {
	t.Helper()
	if err := unix.Unmount(o.dir, 0); err != nil {
		t.Error(err)
	}
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

// baseTree makes a directory with something for each change to happen to.
func baseTree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	c := &changer{t, dir}
	for i := range 6 {
		for j := range 4 {
			c.mkdir(fmt.Sprintf("d%d/s%d", i, j))
			c.write(fmt.Sprintf("d%d/s%d/f", i, j), fmt.Sprintf("content %d %d", i, j))
			c.write(fmt.Sprintf("d%d/f%d", i, j), strings.Repeat(fmt.Sprint(i, j, " "), 100))
		}
	}
	large := make([]byte, 700_000)
	random := rand.NewChaCha8([32]byte{7})
	_, _ = random.Read(large) // which does not fail
	c.write("large", string(large))
	c.write("large2", string(large[1000:]))
	c.mkdir("links")
	c.write("links/a", "one of three")
	c.link("links/a", "links/b")
	c.link("links/a", "d5/c")
	c.write("links/x", "one of two")
	c.link("links/x", "d4/y")
	c.write("links/p", "another of two")
	c.link("links/p", "links/q")
	c.must(os.Symlink("large", c.path("symlink")))
	c.must(unix.Mkfifo(c.path("fifo"), 0o600))
	c.write("empty", "")
	c.write(".wh.name", "no whiteout")
	c.mkdir("deep/1/2/3/4/5")
	c.write("deep/1/2/3/4/5/f", "deep")
	c.xattr("d0", "user.note", "of a directory")
	c.xattr("d0/f0", "user.note", "of a file")
	c.must(os.Chown(c.path("d1/f1"), 1000, 1001))
	return dir
}

// changes makes one of each change.
func (c *changer) changes(indexed bool) {
	c.t.Helper()
	// Files.
	c.append("d0/f0", "more")
	c.write("d0/new", "new")
	c.remove("d0/f1")
	c.must(os.Truncate(c.path("d0/f2"), 3))
	c.write("empty", "no longer")
	c.write("d1/empty", "")
	c.write(".wh.new", "no whiteout either")
	c.write("deep/1/2/3/4/5/.wh..wh..opq", "")
	c.append("deep/1/2/3/4/5/f", "er")
	// Attributes.
	c.must(unix.Chmod(c.path("large"), 0o4711))
	c.must(os.Chown(c.path("large2"), 5, 6))
	c.xattr("d1", "user.note", "new")
	c.xattr("d1/f0", "user.note", "new")
	c.xattr("d1/f0", "trusted.note", "new")
	c.must(unix.Removexattr(c.path("d0"), "user.note"))
	c.must(os.Chmod(c.path("deep/1/2"), 0o700))
	c.must(os.Chmod(c.dir, 0o750))
	// Removed and made again, as another type or the same.
	c.remove("d2/f0")
	c.mkdir("d2/f0/inside")
	c.write("d2/f0/inside/f", "inside")
	c.remove("d2/s0")
	c.write("d2/s0", "was a directory")
	c.remove("d2/s1")
	c.mkdir("d2/s1")
	c.write("d2/s1/g", "other")
	c.remove("d2/s2")
	c.mkdir("d2/s2")
	c.write("d2/s2/f", "of the same name")
	c.remove("symlink")
	c.must(unix.Mkfifo(c.path("symlink"), 0o644))
	c.remove("fifo")
	c.must(os.Symlink("elsewhere", c.path("fifo")))
	c.remove("d2/f3")
	c.must(unix.Mknod(c.path("d2/f3"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	c.must(unix.Mknod(c.path("d2/sock"), unix.S_IFSOCK|0o600, 0))
	c.mkdir("new/dir/of/dirs")
	c.write("new/dir/f", "f")
	c.remove("deep/1/2/3/4/5/f")
	c.write("deep/1/2/3/4/5/f", "again")
	// Moved.
	c.move("d3/f0", "d3/moved")
	c.move("d3/s0", "d3/s9")
	c.move("d3/s1", "new/s1")
	c.append("new/s1/f", " moved")
	c.remove("d3/s2/f")
	c.move("d3/s2", "d0/s0/s2")
	c.mkdir("d3/s2") // where one was moved from
	c.write("d3/s2/f", "in the place of one that moved")
	c.mkdir("d3/s1/f") // the same with another type below
	c.remove("d4/s0/f")
	c.move("d4/s1", "d4/s0") // over another
	c.move("d4/s3", "d4/tmp")
	c.move("d4/s2", "d4/s3") // exchanged
	c.move("d4/tmp", "d4/s2")
	c.append("d4/s2/f", " of s3")
	c.move("d5", "d1/d5") // with a subdirectory that then moves out
	c.move("d1/d5/s0", "s0 of d5")
	c.move("s0 of d5", "s0 again")
	c.must(os.Chmod(c.path("d1/d5/f3"), 0o600))
	// Hard links.
	c.link("d0/f3", "d0/f3 too")
	c.link("d0/new", "d1/new too")
	c.link("large", "large too")
	c.append("links/a", " changed")
	if !indexed {
		c.append("links/x", " changed")
		c.append("d4/y", " too")
		c.remove("links/p")
	}
}

// The mounts that there are: what is below, and the options.
var overlayKinds = []struct{ name, lower, options string }{
	{"plain", "image", "redirect_dir=off,metacopy=off,index=off"},
	{"default", "image", ""},
	{"redirect", "image", "redirect_dir=on,metacopy=off,index=off"},
	{"metacopy", "image", "redirect_dir=on,metacopy=on,index=off"},
	{"index", "image", "redirect_dir=on,metacopy=on,index=on"},
	{"index without redirect", "image", "redirect_dir=off,metacopy=off,index=on"},
	{"nfs_export", "image", "redirect_dir=on,metacopy=off,index=on,nfs_export=on"},
	{"userxattr", "image", "userxattr"},
	{"directory", "directory", "redirect_dir=on,metacopy=on,index=off"},
	{"directory with index", "directory", "redirect_dir=on,metacopy=on,index=on"},
	{"xino", "directory", "redirect_dir=on,metacopy=on,index=off,xino=on"},
}

func TestUpper(t *testing.T) {
	for _, kind := range overlayKinds {
		t.Run(kind.name, func(t *testing.T) {
			dir := baseTree(t)
			s := newStore(t)
			build(t, builder.Config{Dir: dir, Store: s, Tag: "base"})
			lower := dir
			if kind.lower == "image" {
				lower = mountImage(t, s, "base")
			}
			o := newOverlay(t, lower, kind.options)
			c := &changer{t, o.dir}
			c.changes(o.indexed())
			o.mustBuild(t, s, builder.Config{Tag: "delta", Base: "base"})
			// Another mount of the same, as nothing may hang on what the kernel has in memory.
			o.unmount(t)
			o.mount(t)
			o.mustBuild(t, s, builder.Config{Tag: "again", Base: "base"})
			same(t, s, "delta", "again")
			c.write("d0/later", "later")
			o.mustBuild(t, s, builder.Config{Tag: "later", Base: "base", Compress: true})

			// A delta on the delta, by an overlay over it.
			second := newOverlay(t, mountImage(t, s, "delta"), kind.options)
			c = &changer{t, second.dir}
			c.append("d0/f0", "and more")
			if !o.indexed() {
				c.remove("d0/new") // of which there is another name
			}
			c.write("d0/f1", "is there again")
			c.move("new", "newer")
			c.remove("d2/f0")
			c.write("newer/dir/f", "changed")
			second.mustBuild(t, s, builder.Config{Tag: "second", Base: "delta"})

			// A delta on that from a directory.
			tree := fromDir(t, dir)
			build(t, builder.Config{Dir: dir, Store: s, Tag: "back", Base: "second"})
			shows(t, s, "back", tree)
		})
	}
}

// same fails unless two tags name one image.
func same(t testing.TB, s *store.Store, a, b string) {
	t.Helper()
	x, errX := s.Resolve(a)
	y, errY := s.Resolve(b)
	if err := errors.Join(errX, errY); err != nil {
		t.Fatal(err)
	}
	if x.Digest != y.Digest {
		t.Errorf("%s is %s, %s is %s", a, x.Digest, b, y.Digest)
	}
}

// An upper directory that says nothing new gives the base image.
func TestUpperWithoutChanges(t *testing.T) {
	dir := baseTree(t)
	s := newStore(t)
	build(t, builder.Config{Dir: dir, Store: s, Tag: "base", Minimal: builder.Minimal{NoDevices: true}})
	o := newOverlay(t, mountImage(t, s, "base"), "metacopy=on")
	r := o.mustBuild(t, s, builder.Config{Tag: "empty", Base: "base"})
	same(t, s, "base", "empty")
	if r.Inodes != 0 || r.Chunks != 0 || r.Bytes != 0 {
		t.Errorf("%+v", r)
	}
	c := &changer{t, o.dir}
	for _, name := range []string{"large", "d0/s0/f", "deep/1/2"} { // copied up, as they are
		c.must(os.Chmod(c.path(name), 0o600))
		c.must(os.Chmod(c.path(name), 0o755))
	}
	for _, name := range []string{"large", "d0/s0/f"} {
		c.must(os.Chmod(c.path(name), 0o644))
	}
	c.write("x", "")
	c.remove("x")
	o.mustBuild(t, s, builder.Config{Tag: "touched", Base: "base"})
	same(t, s, "base", "touched")
}
