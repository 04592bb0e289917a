package tree_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/tree"
	"github.com/google/go-cmp/cmp"
)

// write makes files with contents; a name that ends with a slash is a directory.
func write(t *testing.T, dir string, files ...string) {
	t.Helper()
	for _, name := range files {
		path := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(path, []byte("hello\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func link(t *testing.T, dir, from, to string) {
	t.Helper()
	if err := os.Link(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
		t.Fatal(err)
	}
}

func describe(t *testing.T, dir string) tree.Tree {
	t.Helper()
	described, err := tree.Describe(dir)
	if err != nil {
		t.Fatal(err)
	}
	return described
}

func TestLinks(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "d/", "b", "c", "alone", "odd\n\"name\"")
	link(t, dir, "b", "d/b")
	link(t, dir, "b", "a")
	link(t, dir, "c", "d/c")
	link(t, dir, "odd\n\"name\"", "d/\xff")
	if err := os.Symlink("b", filepath.Join(dir, "symlink")); err != nil {
		t.Fatal(err)
	}
	got := describe(t, dir)
	want := [][]string{{"/a", "/b", "/d/b"}, {"/c", "/d/c"}, {"/d/\xff", "/odd\n\"name\""}}
	if diff := cmp.Diff(want, got.Links); diff != "" {
		t.Errorf("links (-want +got):\n%s", diff)
	}
	wantTail := `links: "/a" "/b" "/d/b"
links: "/c" "/d/c"
links: "/d/\xff" "/odd\n\"name\""
`
	text := got.Format()
	if !strings.HasSuffix(string(text), "\n"+wantTail) {
		t.Errorf("text:\n%s\nwant it to end with\n%s", text, wantTail)
	}
	parsed, err := tree.Parse(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if diff := tree.Diff(got, parsed); diff != "" {
		t.Errorf("what was parsed: %s", diff)
	}
}

// Two trees with the same files differ when other names are links to each other.
func TestDiff(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for _, dir := range []string{a, b} {
		write(t, dir, "1", "2")
	}
	link(t, a, "1", "x")
	link(t, a, "2", "y")
	link(t, b, "1", "y")
	link(t, b, "2", "x")
	if diff := tree.Diff(describe(t, a), describe(t, a)); diff != "" {
		t.Errorf("a tree differs from itself: %s", diff)
	}
	want := `-links: "/1" "/x"
-links: "/2" "/y"
+links: "/1" "/y"
+links: "/2" "/x"
`
	if diff := cmp.Diff(want, tree.Diff(describe(t, a), describe(t, b))); diff != "" {
		t.Errorf("difference (-want +got):\n%s", diff)
	}
	write(t, b, "more")
	if diff := tree.Diff(describe(t, a), describe(t, b)); !strings.Contains(diff, "+/more file") {
		t.Errorf("difference does not name the file that was added: %s", diff)
	}
}

func TestParseErrors(t *testing.T) {
	for _, line := range []string{"links:", `links: "/a"`, `links: "/a" "/b`, `links: /a /b`, `links: "/a"x"/b"`, "nonsense"} {
		if got, err := tree.Parse(strings.NewReader(line + "\n")); err == nil {
			t.Errorf("%q was parsed as %+v", line, got)
		}
	}
}

func TestDescribeErrors(t *testing.T) {
	if _, err := tree.Describe(filepath.Join(t.TempDir(), "not-there")); !os.IsNotExist(err) && !strings.Contains(err.Error(), "not-there") {
		t.Errorf("error %v", err)
	}
}
