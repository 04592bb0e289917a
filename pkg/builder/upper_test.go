package builder_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/reftest"
	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

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

// Attributes of the overlay's name space that users of the overlay give are not its own.
func TestUpperHoldsOverlays(t *testing.T) {
	for _, tt := range []struct{ options, prefix, other string }{
		{"redirect_dir=on", "trusted.overlay.", "user.overlay."},
		{"userxattr", "user.overlay.", "trusted.overlay."},
	} {
		t.Run(tt.options, func(t *testing.T) {
			s := newStore(t)
			build(t, builder.Config{Dir: baseTree(t), Store: s, Tag: "base"})
			o := newOverlay(t, mountImage(t, s, "base"), tt.options)
			c := &changer{t, o.dir}
			c.mkdir("d0/new")
			for key, value := range map[string]string{"opaque": "y", "redirect": "/none", "overlay.opaque": "y", "what": "ever"} {
				c.xattr("d0/new", tt.prefix+key, value)
			}
			o.mustBuild(t, s, builder.Config{Tag: "auto", Base: "base"})
			c.xattr("d0/new", tt.other+"opaque", "y")
			_, err := builder.Build(t.Context(), builder.Config{Upper: o.upper, Store: s, Tag: "t", Base: "base"})
			if !errors.Is(err, builder.ErrUpper) || !strings.Contains(err.Error(), "say which are the overlay's") {
				t.Errorf("got %v", err)
			}
			xattrs := builder.UpperXattrsTrusted
			if tt.options == "userxattr" {
				xattrs = builder.UpperXattrsUser
			}
			o.mustBuild(t, s, builder.Config{Tag: "said", Base: "base", UpperXattrs: xattrs})
		})
	}
}

// With an index all names of a file change, whatever was done to one, and the image mounted
// says which file it was.
func TestUpperIndex(t *testing.T) {
	for name, change := range map[string]func(*changer){
		"content":      func(c *changer) { c.append("links/a", "more") },
		"owner":        func(c *changer) { c.must(os.Chown(c.path("links/b"), 7, 8)) },
		"a new name":   func(c *changer) { c.append("d5/c", "more"); c.link("d5/c", "new") },
		"moved":        func(c *changer) { c.move("links/a", "d0/moved"); c.append("links/b", "more") },
		"exchanged":    func(c *changer) { c.move("links/a", "t"); c.move("links/x", "links/a"); c.move("t", "links/x") },
		"two of three": func(c *changer) { c.append("links/a", "1"); c.append("links/b", "2"); c.append("links/p", "3") },
		"all moved":    func(c *changer) { c.move("links/p", "n"); c.move("links/q", "m"); c.append("m", "more") },
		"over another": func(c *changer) { c.append("links/p", "more"); c.move("links/p", "d0/f0") },
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			build(t, builder.Config{Dir: baseTree(t), Store: s, Tag: "base"})
			o := newOverlay(t, mountImage(t, s, "base"), "redirect_dir=on,metacopy=on,index=on")
			change(&changer{t, o.dir})
			o.mustBuild(t, s, builder.Config{Tag: "t", Base: "base"})
		})
	}
}

// An image with a partial layer is one that the reference reads, as long as nothing is deleted.
func TestReferenceReadsUpper(t *testing.T) {
	puzzlefs := reftest.Binary(t)
	s, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "layout"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write(t, dir, map[string]string{"a/f": "f", "a/g": strings.Repeat("g", 100_000), "b/c/d": "d", "h": "=a/f"})
	build(t, builder.Config{Dir: dir, Store: s, Tag: "base"})
	h := newHandmade(t)
	h.write("a/f", "changed")
	h.write("b/c/new", "new")
	h.write("n/f", "new")
	build(t, builder.Config{Upper: h.dir, Store: s, Tag: "delta", Base: "base"})
	want := imageTree(t, s, "delta")
	out := filepath.Join(t.TempDir(), "out")
	if b, err := exec.CommandContext(t.Context(), puzzlefs, "extract", s.Dir()+":delta", out).CombinedOutput(); err != nil {
		t.Fatalf("the reference's extract: %v\n%s", err, b)
	}
	if diff := testtree.Diff(want, fromDir(t, out)); diff != "" {
		t.Error(diff)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// An empty upper directory over an image of the reference, also one with several layers and
// whiteouts, gives that image; and what is changed over it is right.
func TestUpperOverReference(t *testing.T) {
	for _, layout := range []string{"v3-master", "v3-0.2.0"} {
		t.Run(layout, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "layout")
			if err := os.CopyFS(dir, os.DirFS(testtree.Golden(t, filepath.Join("images", layout)))); err != nil {
				t.Fatal(err)
			}
			s, err := store.Open(store.Config{Dir: dir})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			for _, tag := range []string{"small", "changed", "small-zstd", "segments"} {
				lower := mountImage(t, s, tag)
				h := newHandmade(t)
				root := fromDir(t, lower)[0]
				h.must(os.Chown(h.dir, int(root.UID), int(root.GID)))
				h.must(unix.Chmod(h.dir, uint32(root.Perm)))
				for _, x := range root.Xattrs {
					h.xattr(".", x.Key, string(x.Value))
				}
				build(t, builder.Config{Upper: h.dir, Store: s, Tag: "same", Base: tag})
				same(t, s, tag, "same")

				if tag == "small-zstd" {
					continue // verify warns of it
				}
				o := newOverlay(t, lower, "redirect_dir=on,metacopy=on")
				c := &changer{t, o.dir}
				entries := fromDir(t, lower)
				for i, e := range slices.Backward(entries[1:]) {
					switch {
					case e.Type == testtree.Dir && strings.Count(e.Path, "/") == 1:
						c.write(e.Path+"/newer", "new")
						c.move(e.Path, e.Path+" moved")
					case e.Type == testtree.File && i%3 == 0:
						c.append(e.Path, "more")
					case e.Type == testtree.File && i%3 == 1:
						c.remove(e.Path)
					}
				}
				o.mustBuild(t, s, builder.Config{Tag: "t", Base: tag})
			}
		})
	}
}

// A file that is overwritten after its attributes were read is noticed, though its size is the same.
func TestUpperChanges(t *testing.T) {
	s := smallBase(t)
	h := newHandmade(t)
	const files, size = 300, 1 << 20
	name := func(i int) string { return fmt.Sprintf("f%03d", i) }
	for i := range files {
		h.write(name(i), "")
		h.must(os.Truncate(h.path(name(i)), size))
	}
	// While the first chunk is stored, neither the walker nor the cutter are near the last file.
	slow := &hooked{Store: s}
	slow.put = func(data []byte) error {
		if len(data) < 1000 {
			return nil
		}
		f, err := os.OpenFile(h.path(name(files-1)), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.Write([]byte("changed"))
		return errors.Join(err, f.Close())
	}
	_, err := builder.Build(t.Context(), builder.Config{Upper: h.dir, Store: slow, Tag: "t", Base: "base", Workers: 1})
	if !errors.Is(err, builder.ErrChanged) || !strings.Contains(err.Error(), h.path(name(files-1))) {
		t.Errorf("got %v, want ErrChanged with the path", err)
	}
}
