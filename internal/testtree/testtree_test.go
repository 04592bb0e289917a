package testtree_test

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
)

var golden = []string{"small", "changed", "segments"}

func TestGoldenTreesUnpackToTheirDescriptions(t *testing.T) {
	for _, tree := range golden {
		t.Run(tree, func(t *testing.T) {
			want := testtree.ReadGolden(t, tree)
			got, err := testtree.FromDir(testtree.UnpackTar(t, testtree.Golden(t, tree+".tar")))
			if err != nil {
				t.Fatal(err)
			}
			if d := testtree.Diff(want, got); d != "" {
				t.Error(d)
			}
			txt, err := os.ReadFile(testtree.Golden(t, tree+".txt"))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(txt), string(testtree.Format(got))); d != "" {
				t.Errorf("text differs (-want +got):\n%s", d)
			}
		})
	}
}

func TestFromDirSeesSocketsAndRefusesMissing(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	entries, err := testtree.FromDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 2 || entries[1].Path != "/s" || entries[1].Type != testtree.Socket {
		t.Errorf("a directory with one socket is described as\n%s", testtree.Format(entries))
	}
	if _, err := testtree.FromDir(filepath.Join(dir, "missing")); err == nil {
		t.Error("a missing directory is no error")
	}
}

// awkward has everything that the text form must escape.
var awkward = []testtree.Entry{
	{Path: "/", Type: testtree.Dir, Perm: 0o7777, UID: 4294967295, GID: 1},
	{Path: "/a dir 0755 0:0", Type: testtree.Fifo, Perm: 0o644},
	{Path: "/a dir 0755 0:0 b", Type: testtree.Socket, Perm: 0o644},
	{Path: "/back\\slash \\n \\x20", Type: testtree.Char, Major: 1, Minor: 3},
	{Path: "/control \x01\x7f\r\t\n é \ufffd \xc3", Type: testtree.Block, Major: 4095, Minor: 1048575},
	{Path: "/empty", Type: testtree.File, SHA256: strings.Repeat("0", 64), Nlink: 1},
	{Path: "/link", Type: testtree.Symlink, Perm: 0o777, Target: "a xattr:user.b=00"},
	{
		Path: "/x", Type: testtree.File, Size: 1<<63 - 1, SHA256: strings.Repeat("f", 64), Nlink: 12,
		Xattrs: []testtree.Xattr{{Key: "user. a=b xattr:", Value: []byte{}}, {Key: "user.c\n", Value: []byte("=\x00\xff")}},
	},
	{Path: "/y", Type: testtree.Dir, Xattrs: []testtree.Xattr{{Key: "user.a", Value: []byte("v")}}},
}

func TestFormatAndParseAreInverse(t *testing.T) {
	txt := testtree.Format(awkward)
	got, err := testtree.Parse(bytes.NewReader(txt))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(awkward, got); d != "" {
		t.Errorf("after\n%s\n(-want +got):\n%s", txt, d)
	}
	if n := bytes.Count(txt, []byte("\n")); n != len(awkward) {
		t.Errorf("%d entries in %d lines", len(awkward), n)
	}
}

func TestParseRefuses(t *testing.T) {
	for name, txt := range map[string]string{
		"an empty line":          "\n",
		"a relative path":        "a dir 0755 0:0",
		"an unknown type":        "/a door 0755 0:0",
		"a mode of five digits":  "/a dir 00755 0:0",
		"a huge owner":           "/a dir 0755 4294967296:0",
		"a file without size":    "/a file 0644 0:0",
		"a negative size":        "/a file 0644 0:0 size=-1 sha256=00 nlink=1",
		"a link without target":  "/a link 0777 0:0",
		"a device without rdev":  "/a chr 0644 0:0 7:5",
		"a directory with size":  "/a dir 0755 0:0 size=1",
		"an xattr without value": "/a dir 0755 0:0  xattr:user.a",
		"an xattr not in hex":    "/a dir 0755 0:0  xattr:user.a=xy",
		"an unknown escape":      `/a\t dir 0755 0:0`,
		"half an escape":         `/a\x0 dir 0755 0:0`,
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := testtree.Parse(strings.NewReader(txt)); err == nil {
				t.Errorf("Parse(%q) = %+v, want an error", txt, got)
			}
		})
	}
}

func TestDiff(t *testing.T) {
	a := testtree.Entry{Path: "/a", Type: testtree.Dir, Perm: 0o755}
	a2 := testtree.Entry{Path: "/a", Type: testtree.Dir, Perm: 0o700}
	b := testtree.Entry{Path: "/b", Type: testtree.Fifo}
	for name, test := range map[string]struct {
		want, got []testtree.Entry
		lines     []string
	}{
		"both empty":     {},
		"equal":          {want: []testtree.Entry{a, b}, got: []testtree.Entry{a, b}},
		"another order":  {want: []testtree.Entry{a, b}, got: []testtree.Entry{b, a}},
		"missing":        {want: []testtree.Entry{a, b}, got: []testtree.Entry{a}, lines: []string{"-/b fifo 0000 0:0"}},
		"unwanted":       {want: []testtree.Entry{b}, got: []testtree.Entry{a, b}, lines: []string{"+/a dir 0755 0:0"}},
		"changed":        {want: []testtree.Entry{a, b}, got: []testtree.Entry{b, a2}, lines: []string{"+/a dir 0700 0:0", "-/a dir 0755 0:0"}},
		"listed twice":   {want: []testtree.Entry{b}, got: []testtree.Entry{b, b}, lines: []string{"+/b fifo 0000 0:0"}},
		"nothing at all": {want: []testtree.Entry{b}, lines: []string{"-/b fifo 0000 0:0"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := testtree.Diff(test.want, test.got)
			if (d == "") != (len(test.lines) == 0) {
				t.Fatalf("Diff = %q, want the lines %q", d, test.lines)
			}
			if d == "" {
				return
			}
			got := strings.Split(strings.TrimSuffix(d, "\n"), "\n")[1:]
			if c := cmp.Diff(test.lines, got); c != "" {
				t.Errorf("lines (-want +got):\n%s", c)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, tree := range []string{"small", "changed"} { // the third is too large to mutate quickly
		txt, err := os.ReadFile(testtree.Golden(f, tree+".txt"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(txt)
	}
	f.Add(testtree.Format(awkward))
	f.Fuzz(func(t *testing.T, txt []byte) {
		entries, err := testtree.Parse(bytes.NewReader(txt))
		if err != nil {
			return
		}
		again, err := testtree.Parse(bytes.NewReader(testtree.Format(entries)))
		if err != nil {
			t.Fatalf("what Format wrote does not parse: %v", err)
		}
		if !reflect.DeepEqual(entries, again) { // quicker than cmp.Diff, which only reports
			t.Errorf("Parse, Format, Parse (-first +second):\n%s", cmp.Diff(entries, again))
		}
	})
}
