package builder_test

import (
	"archive/tar"
	"bytes"
	"errors"
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
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

func patterns(t testing.TB, texts ...string) []builder.Pattern {
	t.Helper()
	var list []builder.Pattern
	for _, text := range texts {
		p, err := builder.ParsePattern(text)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
	return list
}

func TestParsePattern(t *testing.T) {
	for text, want := range map[string]string{
		"a": "a", "/a/": "a", "a//./b": "a/b", "**/**/a": "**/a", `\!a`: `\!a`, `a\*\*b`: `a\*\*b`, "a b ": "a b ",
	} {
		p, err := builder.ParsePattern(text)
		if err != nil || p.String() != want {
			t.Errorf("%q: %q, %v, want %q", text, p, err, want)
		}
	}
	for _, text := range []string{"", "/", ".", "a/../b", "..", "!a", "a[", "[]a]", `a\`, "**.o", "a**", "a/b**/c", "***", "a\x00b"} {
		if p, err := builder.ParsePattern(text); !errors.Is(err, builder.ErrConfig) {
			t.Errorf("%q: %q, %v, want ErrConfig", text, p, err)
		}
	}
}

// What is left of a tree with one of everything that patterns tell apart.
func TestExclude(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"x.o": "1", "keep": "2", "a/x.o": "3", "a/b/x.o": "4", "a/b/y": "5", "cache/z/z": "6", "*": "7", "\xff.o": "8", "a/b/c/d/e": "9",
	})
	all := []string{"*", "a", "a/b", "a/b/c", "a/b/c/d", "a/b/c/d/e", "a/b/x.o", "a/b/y", "a/x.o", "cache", "cache/z", "cache/z/z", "keep", "x.o", "\xff.o"}
	for pattern, gone := range map[string][]string{
		"*.o":            {"x.o", "\xff.o"},
		"?.o":            {"x.o", "\xff.o"},
		"**/*.o":         {"x.o", "\xff.o", "a/x.o", "a/b/x.o"},
		"a/*/x.o":        {"a/b/x.o"},
		"a/**/x.o":       {"a/x.o", "a/b/x.o"},
		"cache/**":       {"cache/z", "cache/z/z"},
		"/cache/":        {"cache", "cache/z", "cache/z/z"},
		`\*`:             {"*"},
		"**/[b-c]":       {"a/b", "a/b/c", "a/b/c/d", "a/b/c/d/e", "a/b/x.o", "a/b/y"},
		"**/[^b-z]":      {"*", "a", "a/b", "a/b/c", "a/b/c/d", "a/b/c/d/e", "a/b/x.o", "a/b/y", "a/x.o"},
		"a/**/b/**/**/e": {"a/b/c/d/e"},
		"**":             all,
		"none":           nil,
	} {
		t.Run(strings.ReplaceAll(pattern, "/", "|"), func(t *testing.T) {
			var want []testtree.Entry
			for _, e := range fromDir(t, dir) {
				if !slices.Contains(gone, strings.TrimPrefix(e.Path, "/")) {
					want = append(want, e)
				}
			}
			if len(want) != len(all)+1-len(gone) {
				t.Fatalf("the test names paths that are not there: %q", gone)
			}
			s := newStore(t)
			build(t, builder.Config{Dir: dir, Store: s, Tag: "t", Minimal: builder.Minimal{Exclude: patterns(t, pattern)}})
			shows(t, s, "t", want)
		})
	}
}

// everyKind makes a directory with a file of each kind, of several owners and with attributes.
func everyKind(t testing.TB) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes devices and files of others, which takes root")
	}
	dir := t.TempDir()
	write(t, dir, map[string]string{"f": "file", "l": "->f", "h": "=f", "d/f.o": "object"})
	for name, dev := range map[string]int{"chr": unix.S_IFCHR, "d/blk": unix.S_IFBLK, "fifo": unix.S_IFIFO, "sock": unix.S_IFSOCK} {
		if err := unix.Mknod(filepath.Join(dir, name), uint32(dev|0o600), int(unix.Mkdev(7, 3))); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{".", "f", "d"} {
		if err := unix.Setxattr(filepath.Join(dir, name), "user.note", []byte(name), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Lchown(filepath.Join(dir, "l"), 1000, 1001); err != nil {
		t.Fatal(err)
	}
	return dir
}

// minimized is the tree that is left of entries.
func minimized(entries []testtree.Entry, m *builder.Minimal) []testtree.Entry {
	var left []testtree.Entry
	for _, e := range entries {
		if m.NoDevices && (e.Type == testtree.Char || e.Type == testtree.Block) {
			continue
		}
		if m.NoXattrs {
			e.Xattrs = nil
		}
		if m.Owner != nil {
			e.UID, e.GID = m.Owner.UID, m.Owner.GID
		}
		left = append(left, e)
	}
	return left
}

// annotations returns those of the manifest of a tag.
func annotations(t testing.TB, s *store.Store, tag string) map[string]string {
	t.Helper()
	root, err := s.Resolve(tag)
	if err != nil {
		t.Fatal(err)
	}
	out, err := image.Inspect(t.Context(), s, root)
	if err != nil {
		t.Fatal(err)
	}
	return out.Manifest.Annotations
}

func TestMinimal(t *testing.T) {
	dir := everyKind(t)
	for name, tt := range map[string]struct {
		m    builder.Minimal
		want string
	}{
		"nothing":  {builder.Minimal{}, ""},
		"xattrs":   {builder.Minimal{NoXattrs: true}, `[{"noXattrs":true}]`},
		"devices":  {builder.Minimal{NoDevices: true}, `[{"noDevices":true}]`},
		"owner":    {builder.Minimal{Owner: &builder.Owner{UID: 4294967294, GID: 7}}, `[{"owner":"4294967294:7"}]`},
		"root":     {builder.Minimal{Owner: &builder.Owner{}}, `[{"owner":"0:0"}]`},
		"patterns": {builder.Minimal{Exclude: patterns(t, "/no/", "<no>", "no")}, `[{"exclude":["<no>","no"]}]`},
		"all": {
			builder.Minimal{NoXattrs: true, NoDevices: true, Owner: &builder.Owner{UID: 1, GID: 2}, Exclude: patterns(t, "no")},
			`[{"exclude":["no"],"noDevices":true,"noXattrs":true,"owner":"1:2"}]`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			r := build(t, builder.Config{Dir: dir, Store: s, Tag: "t", Minimal: tt.m})
			shows(t, s, "t", minimized(fromDir(t, dir), &tt.m))
			if got := annotations(t, s, "t")[builder.AnnotationMinimal]; got != tt.want {
				t.Errorf("annotation %s, want %s", got, tt.want)
			}
			// A delta describes the whole tree, so that what its base left out is no matter.
			again := build(t, builder.Config{Dir: dir, Store: s, Tag: "again", Base: "t", Minimal: tt.m})
			if again.Manifest.Digest != r.Manifest.Digest {
				t.Error("a delta that changes nothing has another digest")
			}
			build(t, builder.Config{Dir: dir, Store: s, Tag: "full", Base: "t"})
			shows(t, s, "full", fromDir(t, dir))
			if got := annotations(t, s, "full"); len(got) != 0 {
				t.Errorf("the delta with everything has the annotations %v", got)
			}
		})
	}
}

// An archive and a directory of one tree give one image, whatever is left out.
func TestMinimalOfArchive(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"f": "file", "d/f.o": "object", "d/g": "->f"})
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		w.WriteHeader(&tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}),
		w.WriteHeader(&tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}), w.Close(),
	); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	m := builder.Minimal{NoDevices: true, Owner: &builder.Owner{UID: 5, GID: 5}, Exclude: patterns(t, "**/*.o")}
	tree, err := builder.ReadTar(t.Context(), &archive, builder.ReadConfig{Name: "archive"})
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	s := newStore(t)
	fromTar := build(t, builder.Config{Tree: tree, Store: s, Tag: "tar", Minimal: m})
	plain := build(t, builder.Config{Dir: dir, Store: s, Tag: "dir", Minimal: m})
	if fromTar.Manifest.Digest != plain.Manifest.Digest {
		t.Errorf("from the archive %s, from the directory %s\n%s", fromTar.Manifest.Digest, plain.Manifest.Digest,
			testtree.Diff(imageTree(t, s, "dir"), imageTree(t, s, "tar")))
	}
}

func TestParseOwner(t *testing.T) {
	if o, err := builder.ParseOwner("0:4294967294"); err != nil || o != (builder.Owner{GID: 4294967294}) {
		t.Errorf("%v, %v", o, err)
	}
	for _, text := range []string{"", "1", "1:", ":1", "root:root", "-1:0", "1:4294967295", "4294967295:1", "1:2:3", "1 :2", "+1:1"} {
		if o, err := builder.ParseOwner(text); !errors.Is(err, builder.ErrConfig) {
			t.Errorf("%q: %v, %v, want ErrConfig", text, o, err)
		}
	}
}

// The reference reads an image with the annotation.
func TestReferenceReadsMinimal(t *testing.T) {
	puzzlefs := reftest.Binary(t)
	dir := t.TempDir()
	write(t, dir, map[string]string{"f": "file", "d/f.o": "object", "d/g": "text"})
	layout := filepath.Join(t.TempDir(), "layout")
	s, err := store.Open(store.Config{Dir: layout, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	build(t, builder.Config{Dir: dir, Store: s, Tag: "t", Minimal: builder.Minimal{NoXattrs: true, Exclude: patterns(t, "**/*.o")}})
	want := imageTree(t, s, "t")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	if b, err := exec.CommandContext(t.Context(), puzzlefs, "extract", layout+":t", out).CombinedOutput(); err != nil {
		t.Fatalf("the reference's extract: %v\n%s", err, b)
	}
	if diff := testtree.Diff(want, fromDir(t, out)); diff != "" {
		t.Error(diff)
	}
}
