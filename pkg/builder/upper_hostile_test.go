package builder_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// handmade makes an upper directory without an overlay.
type handmade struct{ changer }

func newHandmade(t testing.TB) *handmade {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes whiteouts and attributes of an overlay, which takes root")
	}
	h := &handmade{changer{t, t.TempDir()}}
	h.must(os.Chmod(h.dir, 0o755))
	return h
}

func (h *handmade) whiteout(name string) {
	h.t.Helper()
	h.mkdir(filepath.Dir(name))
	h.must(unix.Mknod(h.path(name), unix.S_IFCHR, 0))
}

// write makes a file, and the directories above.
func (h *handmade) write(name, content string) {
	h.t.Helper()
	h.mkdir(filepath.Dir(name))
	h.changer.write(name, content)
}

// mark gives a name one of the overlay's attributes.
func (h *handmade) mark(name, key, value string) {
	h.t.Helper()
	h.xattr(name, "trusted.overlay."+key, value)
}

// smallBase builds an image to put upper directories over.
func smallBase(t testing.TB) *store.Store {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"a/f": "f of a", "a/b/g": "g", "a/l": "->f", "c/x": "linked", "c/y": "=c/x", "d/e/f": "deep", "file": "file", "z": "=c/x",
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	build(t, builder.Config{Dir: dir, Store: s, Tag: "base"})
	return s
}

// Upper directories that no overlay over the base leaves, or that say what only the overlay
// knows: each is refused, with the path.
func TestUpperRefused(t *testing.T) {
	s := smallBase(t)
	for name, tt := range map[string]struct {
		make func(*handmade)
		want string
	}{
		"redirect to nowhere":      {func(h *handmade) { h.mkdir("n"); h.mark("n", "redirect", "/none/b") }, `"/n": it was renamed from "/none/b", which is not in the base`},
		"redirect to a neighbour":  {func(h *handmade) { h.mkdir("a/n"); h.mark("a/n", "redirect", "none") }, `"/a/n": it was renamed from "none", which is not in the base`},
		"redirect to a file":       {func(h *handmade) { h.mkdir("n"); h.mark("n", "redirect", "/file") }, `"/n": it was renamed from "/file", which is no directory`},
		"redirect over a symlink":  {func(h *handmade) { h.mkdir("n"); h.mark("n", "redirect", "/a/l/x") }, `"/n": it was renamed`},
		"redirect out":             {func(h *handmade) { h.mkdir("n"); h.mark("n", "redirect", "/a/../d") }, "neither a name nor a path"},
		"redirect up":              {func(h *handmade) { h.mkdir("a/n"); h.mark("a/n", "redirect", "..") }, "neither a name nor a path"},
		"redirect without end":     {func(h *handmade) { h.mkdir("n"); h.mark("n", "redirect", "/a/") }, "neither a name nor a path"},
		"redirect of two names":    {func(h *handmade) { h.mkdir("n"); h.mark("n", "redirect", "a/b") }, "neither a name nor a path"},
		"empty redirect":           {func(h *handmade) { h.mkdir("n"); h.mark("n", "redirect", "/") }, "neither a name nor a path"},
		"redirect of a new parent": {func(h *handmade) { h.mkdir("n/m"); h.mark("n/m", "redirect", "b") }, "its directory is not in the base"},
		"redirect to itself above": {func(h *handmade) { h.mkdir("a/n"); h.mark("a/n", "redirect", "/a") }, `"/a/n": it and "/a" are the same directory`},
		"redirect to the root":     {func(h *handmade) { h.mkdir("n"); h.mark("n", "redirect", "/") }, "neither a name"},
		"redirects in a circle": {func(h *handmade) {
			h.mkdir("a/n")
			h.mark("a", "redirect", "/d/e")
			h.mark("a/n", "redirect", "/d")
			h.whiteout("d")
		}, `"/a": it is a directory of the base image that is still there as "/a/n/e"`},
		"moved and still there":    {func(h *handmade) { h.mkdir("n"); h.mark("n", "redirect", "/a") }, `"/n": it is a directory of the base image that is still there as "/a"`},
		"moved from what is there": {func(h *handmade) { h.mkdir("n"); h.mark("n", "redirect", "/a/b"); h.mkdir("a") }, `"/n": it is a directory of the base image that is still there as "/a/b"`},
		"moved twice": {func(h *handmade) {
			h.mkdir("n")
			h.mark("n", "redirect", "/a")
			h.mkdir("m")
			h.mark("m", "redirect", "/a")
			h.whiteout("a")
		}, `"/n": it and "/m" are the same directory`},
		"metacopy of nothing":      {func(h *handmade) { h.write("n", ""); h.mark("n", "metacopy", "") }, `"/n": its content is not here (metacopy), and the base image has no file`},
		"metacopy of a directory":  {func(h *handmade) { h.write("a", ""); h.mark("a", "metacopy", "") }, "has no file"},
		"metacopy of another size": {func(h *handmade) { h.write("file", "longer"); h.mark("file", "metacopy", "") }, `"/file": its content is not here (metacopy), and the base image's has 4 bytes instead of 6`},
		"metacopy in an opaque": {func(h *handmade) {
			h.mkdir("a")
			h.mark("a", "opaque", "y")
			h.write("a/f", "f of a")
			h.mark("a/f", "metacopy", "")
		}, "has no file"},
		"metacopy of a later form": {func(h *handmade) { h.write("file", "file"); h.mark("file", "metacopy", "\x01\x04\x00\x00") }, "of a form that this program does not know"},
		"metacopy of a new file": {func(h *handmade) {
			h.mkdir("n")
			h.write("n/f", "file")
			h.mark("n/f", "metacopy", "")
			h.mark("n/f", "redirect", "file")
		}, "its directory is not in the base"},
		"metacopy and a directory": {func(h *handmade) { h.mkdir("a"); h.mark("a", "metacopy", "") }, `"/a": it is a directory and has the attribute trusted.overlay.metacopy of a file`},
		"opaque file":              {func(h *handmade) { h.write("n", ""); h.mark("n", "opaque", "y") }, "of a directory"},
		"opaque otherwise":         {func(h *handmade) { h.mkdir("n"); h.mark("n", "opaque", "z") }, `trusted.overlay.opaque is "z"`},
		"unknown attribute":        {func(h *handmade) { h.mkdir("a"); h.mark("a", "news", "y") }, `"/a": it has the attribute trusted.overlay.news, whose meaning`},
		"whiteout file":            {func(h *handmade) { h.write("file", ""); h.mark("file", "whiteout", "y") }, `"/file": it is marked as a whiteout, but its directory`},
		"whiteout with content": {func(h *handmade) {
			h.mkdir("a")
			h.mark("a", "opaque", "x")
			h.write("a/f", "x")
			h.mark("a/f", "whiteout", "y")
		}, `"/a/f": it is marked as a whiteout and has content`},
		"opaque root":  {func(h *handmade) { h.mark(".", "opaque", "y") }, "the root of an upper directory is neither opaque nor renamed"},
		"renamed root": {func(h *handmade) { h.mark(".", "redirect", "/a") }, "the root of an upper directory is neither opaque nor renamed"},
		"two overlays' attributes": {func(h *handmade) {
			h.mkdir("a")
			h.mark("a", "opaque", "y")
			h.write("a/f", "")
			h.xattr("a/f", "user.overlay.metacopy", "")
		}, `"/a" has attributes trusted.overlay.*, and "/a/f" has user.overlay.*`},
		"links of an unknown form":    {func(h *handmade) { h.write("c/x", "new"); h.mark("c/x", "nlink", "X+1") }, `"/c/x": its attribute nlink is "X+1"`},
		"more links than there are":   {func(h *handmade) { h.write("c/x", "new"); h.mark("c/x", "nlink", "U+7") }, "it cannot be told which other names"},
		"fewer links than there are":  {func(h *handmade) { h.write("c/x", "new"); h.mark("c/x", "nlink", "U-3") }, "it cannot be told which other names"},
		"links that are in the index": {func(h *handmade) { h.mark(".", "origin", ""); h.mark(".", "origin", "x"); h.whiteout("c/x") }, `"/c/x": it was one of several names`},
		"two files that are one":      {func(h *handmade) { h.write("n", "file"); h.link("n", "m"); h.mark("n", "metacopy", "") }, "has no file"},
		"two files with one content": {func(h *handmade) {
			h.write("c/x", "linked")
			h.must(os.MkdirAll(h.path("a"), 0o755))
			h.link("c/x", "a/f")
			h.mark("c/x", "metacopy", "")
		}, `are one file, but have not the same content`},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHandmade(t)
			tt.make(h)
			_, err := builder.Build(t.Context(), builder.Config{Upper: h.dir, Store: s, Tag: "t", Base: "base"})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !errors.Is(err, builder.ErrUpper) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if _, err := s.Resolve("t"); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("the tag is there: %v", err)
			}
		})
	}
}

// with returns the tree of the base with entries removed and files added.
func with(t testing.TB, s *store.Store, gone []string, files map[string]string) []testtree.Entry {
	t.Helper()
	// The base is small: make it anew, and change it.
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"a/f": "f of a", "a/b/g": "g", "a/l": "->f", "c/x": "linked", "c/y": "=c/x", "d/e/f": "deep", "file": "file", "z": "=c/x",
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	shows(t, s, "base", fromDir(t, dir))
	remove(t, dir, gone...)
	for name := range files {
		remove(t, dir, name)
	}
	write(t, dir, files)
	return fromDir(t, dir)
}

// Upper directories as an overlay may leave them, and the trees that they show.
func TestUpperByHand(t *testing.T) {
	for name, tt := range map[string]struct {
		make  func(*handmade)
		gone  []string
		files map[string]string
	}{
		"nothing":                      {func(*handmade) {}, nil, nil},
		"whiteout":                     {func(h *handmade) { h.whiteout("a/f") }, []string{"a/f"}, nil},
		"whiteout of nothing":          {func(h *handmade) { h.whiteout("a/none"); h.whiteout("none") }, nil, nil},
		"whiteouts in a new directory": {func(h *handmade) { h.whiteout("n/f"); h.write("n/x", "") }, nil, map[string]string{"n/x": ""}},
		"whiteout of one name":         {func(h *handmade) { h.whiteout("c/x") }, []string{"c/x"}, nil},
		"whiteout of all names":        {func(h *handmade) { h.whiteout("c/x"); h.whiteout("c/y"); h.whiteout("z") }, []string{"c/x", "c/y", "z"}, nil},
		"whiteouts that are files": {func(h *handmade) {
			h.mkdir("a")
			h.mark("a", "opaque", "x")
			h.write("a/f", "")
			h.mark("a/f", "whiteout", "")
			h.write("a/n", "n")
		}, []string{"a/f"}, map[string]string{"a/n": "n"}},
		"opaque": {func(h *handmade) { h.mkdir("a"); h.mark("a", "opaque", "y"); h.write("a/n", "n") }, []string{"a"}, map[string]string{"a/n": "n"}},
		"opaque, with a name that was": {func(h *handmade) {
			h.mkdir("a/b")
			h.mark("a", "opaque", "y")
			h.write("a/b/n", "n")
			h.write("a/f", "new")
		}, []string{"a"}, map[string]string{"a/b/n": "n", "a/f": "new"}},
		"directory over a file": {func(h *handmade) { h.write("file/n", "n") }, []string{"file"}, map[string]string{"file/n": "n"}},
		"file over a directory": {func(h *handmade) { h.write("a", "n") }, nil, map[string]string{"a": "n"}},
		"a redirect that an opaque directory forgot": {func(h *handmade) {
			h.mkdir("n")
			h.mark("n", "opaque", "y")
			h.mark("n", "redirect", "/a")
			h.write("n/x", "x")
		}, nil, map[string]string{"n/x": "x"}},
		"a redirect that a file forgot": {func(h *handmade) { h.write("n", "n"); h.mark("n", "redirect", "/none") }, nil, map[string]string{"n": "n"}},
		"notes of the overlay": {func(h *handmade) {
			h.mkdir("a")
			for _, key := range []string{"impure", "origin", "upper", "uuid", "protattr"} {
				h.mark("a", key, "y")
			}
			h.write("a/n", "n")
		}, nil, map[string]string{"a/n": "n"}},
		"a directory below what takes its place": {func(h *handmade) {
			h.mkdir("d/e/n")
			h.mark("d", "opaque", "y")
			h.mark("d/e/n", "redirect", "/d")
			h.write("d/f", "f")
		}, []string{"d"}, map[string]string{"d/e/n/e/f": "deep", "d/f": "f"}},
		"broken hard link":        {func(h *handmade) { h.mkdir("c"); h.write("c/x", "new") }, []string{"c/x"}, map[string]string{"c/x": "new"}},
		"broken hard link, later": {func(h *handmade) { h.write("z", "new") }, []string{"z"}, map[string]string{"z": "new"}},
		"hard link of the index": {func(h *handmade) {
			// Its only file that can be meant has three names, of which this is one.
			h.mkdir("c")
			h.write("c/x", "new")
			h.mark("c/x", "nlink", "U+2")
		}, []string{"c/x", "c/y", "z"}, map[string]string{"c/x": "new", "c/y": "=c/x", "z": "=c/x"}},
		"hard link of the index, as copied": {func(h *handmade) {
			h.mkdir("c")
			h.write("c/x", "new")
			h.link("c/x", "n")
			h.mark("c/x", "nlink", "L+1")
		}, []string{"c/x", "c/y", "z"}, map[string]string{"c/x": "new", "c/y": "=c/x", "z": "=c/x", "n": "=c/x"}},
		"hard link of the index, all names": {func(h *handmade) {
			h.write("n", "new")
			h.link("n", "m")
			h.mark("n", "nlink", "U+0")
		}, nil, map[string]string{"n": "new", "m": "=n"}},
		"metacopy with a digest": {func(h *handmade) {
			h.write("file", "what")
			h.mark("file", "metacopy", "\x00\x24\x00\x01"+strings.Repeat("d", 32))
		}, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := smallBase(t)
			h := newHandmade(t)
			tt.make(h)
			build(t, builder.Config{Upper: h.dir, Store: s, Tag: "t", Base: "base"})
			shows(t, s, "t", with(t, s, tt.gone, tt.files))
		})
	}
}

// An attribute that only looks like the overlay's loses its escape, and keeps what it is.
func TestUpperUnescapes(t *testing.T) {
	s := smallBase(t)
	h := newHandmade(t)
	h.mkdir("n")
	h.mark("n", "overlay.opaque", "y")
	h.mark("n", "overlay.overlay.redirect", "/x")
	h.mark("n", "impure", "y")
	h.xattr("n", "user.overlay.overlay.opaque", "z") // not this overlay's
	build(t, builder.Config{Upper: h.dir, Store: s, Tag: "t", Base: "base", UpperXattrs: builder.UpperXattrsTrusted})
	var got []string
	for _, e := range imageTree(t, s, "t") {
		for _, x := range e.Xattrs {
			got = append(got, e.Path+" "+x.Key+"="+string(x.Value))
		}
	}
	want := "/n trusted.overlay.opaque=y\n/n trusted.overlay.overlay.redirect=/x\n/n user.overlay.overlay.opaque=z"
	if strings.Join(got, "\n") != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What is left out of an upper directory stays as the base has it, but for a device.
func TestUpperMinimal(t *testing.T) {
	s := smallBase(t)
	h := newHandmade(t)
	h.mkdir("a/b")
	h.write("a/f", "changed")
	h.write("a/b/new.o", "object")
	h.whiteout("d")
	h.must(unix.Mknod(h.path("file"), unix.S_IFBLK|0o600, int(unix.Mkdev(7, 3))))
	h.write("new", "new")
	h.xattr("new", "user.note", "note")
	owner := builder.Owner{UID: 1, GID: 2}
	build(t, builder.Config{Upper: h.dir, Store: s, Tag: "t", Base: "base", Minimal: builder.Minimal{
		NoXattrs: true, NoDevices: true, Owner: &owner, Exclude: patterns(t, "a/f", "**/*.o", "d"),
	}})
	want := with(t, s, []string{"file"}, map[string]string{"new": "new"})
	for i := range want {
		switch want[i].Path {
		case "/", "/a", "/a/b", "/new":
			want[i].UID, want[i].GID = 1, 2
		}
	}
	shows(t, s, "t", want)
	const first = `{"exclude":["**/*.o","a/f","d"],"noDevices":true,"noXattrs":true,"owner":"1:2"}`
	for _, tt := range []struct {
		base string
		m    builder.Minimal
		want string
	}{
		{"t", builder.Minimal{}, "[" + first + "]"},
		{"t", builder.Minimal{NoXattrs: true}, "[" + first + `,{"noXattrs":true}]`},
		{"t", builder.Minimal{NoXattrs: true, NoDevices: true, Owner: &owner, Exclude: patterns(t, "d", "a/f", "**/*.o")}, "[" + first + "]"},
		{"base", builder.Minimal{}, ""},
	} {
		build(t, builder.Config{Upper: h.dir, Store: s, Tag: "next", Base: tt.base, Minimal: tt.m})
		if got := annotations(t, s, "next")[builder.AnnotationMinimal]; got != tt.want {
			t.Errorf("annotation %s, want %s", got, tt.want)
		}
	}
}

// Of the base only its metadata is needed. What comes of it names all chunks.
func TestUpperOverMetadata(t *testing.T) {
	full := smallBase(t)
	root, err := full.Resolve("base")
	if err != nil {
		t.Fatal(err)
	}
	h := newHandmade(t)
	h.write("new", "new")
	h.whiteout("a")
	s := newStore(t)
	manifest, err := full.Get(t.Context(), root.Digest, format.MaxManifestSize)
	if err != nil {
		t.Fatal(err)
	}
	m, err := format.ParseManifest(manifest)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []format.Digest{root.Digest, m.Layers[0].Digest} {
		b, err := full.Get(t.Context(), d, format.MaxRootfsSize)
		if err == nil {
			err = s.Put(b, d)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	r := build(t, builder.Config{Upper: h.dir, Store: s, Tag: "t", BaseManifest: root.Digest})
	if r.Bytes != 3 || r.Chunks != 1 || r.Inodes != 2 { // the root and the new file
		t.Errorf("%+v", r)
	}
	// With the base's chunks it is whole.
	for _, d := range m.Layers[1:] {
		b, err := full.Get(t.Context(), d.Digest, format.MaxRootfsSize)
		if err == nil {
			err = s.Put(b, d.Digest)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	shows(t, s, "t", with(t, full, []string{"a"}, map[string]string{"new": "new"}))
}

// A manifest that does not name what its files need is noticed.
func TestUpperOverBrokenBase(t *testing.T) {
	s := smallBase(t)
	root, err := s.Resolve("base")
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Get(t.Context(), root.Digest, format.MaxManifestSize)
	if err != nil {
		t.Fatal(err)
	}
	m, err := format.ParseManifest(b)
	if err != nil {
		t.Fatal(err)
	}
	m.Layers = m.Layers[:1]
	if b, err = m.Encode(); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(b, format.DigestOf(b)); err != nil {
		t.Fatal(err)
	}
	_, err = builder.Build(t.Context(), builder.Config{Upper: newHandmade(t).dir, Store: s, Tag: "t", BaseManifest: format.DigestOf(b)})
	if !errors.Is(err, format.ErrCorrupt) || !strings.Contains(err.Error(), "does not name the chunk") {
		t.Errorf("got %v", err)
	}
}

func TestUpperConfig(t *testing.T) {
	s := smallBase(t)
	dir := t.TempDir()
	for name, cfg := range map[string]builder.Config{
		"no base":  {Upper: dir, Store: s, Tag: "t"},
		"both":     {Upper: dir, Dir: dir, Store: s, Tag: "t", Base: "base"},
		"two base": {Upper: dir, Store: s, Tag: "t", Base: "base", BaseManifest: format.DigestOf(nil)},
	} {
		if _, err := builder.Build(t.Context(), cfg); !errors.Is(err, builder.ErrConfig) {
			t.Errorf("%s: %v, want ErrConfig", name, err)
		}
	}
	if _, err := builder.Build(t.Context(), builder.Config{Upper: dir + "/none", Store: s, Tag: "t", Base: "base"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v, want ErrNotExist", err)
	}
}
