package sample_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/sample"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/tree"
	"golang.org/x/sys/unix"
)

// tmpfs mounts a file system that holds attributes wherever the tests run.
func tmpfs(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root, as do the owners and devices of a sample")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

func make1(t *testing.T, dir string, cfg sample.Config) tree.Tree {
	t.Helper()
	omitted, err := sample.Make(dir, cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range omitted {
		t.Errorf("left out: %s", o)
	}
	described, err := tree.Describe(dir)
	if err != nil {
		t.Fatal(err)
	}
	return described
}

// A sample has what the package promises, whatever the umask.
func TestMake(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	const size = 3<<20 + 1
	got := make1(t, filepath.Join(tmpfs(t), "s"), sample.Config{Size: size})

	entries := make(map[string]testtree.Entry)
	types := make(map[testtree.Type]int)
	keys := make(map[string]bool)
	small := 0
	longest := 0
	for _, e := range got.Entries {
		entries[e.Path] = e
		types[e.Type]++
		for _, x := range e.Xattrs {
			keys[x.Key] = true
		}
		if strings.HasPrefix(e.Path, "/many/") {
			small++
		}
		longest = max(longest, len(filepath.Base(e.Path)))
	}
	for _, kind := range []testtree.Type{testtree.Dir, testtree.File, testtree.Symlink, testtree.Fifo, testtree.Char, testtree.Block} {
		if types[kind] == 0 {
			t.Errorf("no %s", kind)
		}
	}
	if small != sample.SmallFiles || longest != 255 {
		t.Errorf("%d small files, longest name %d bytes; want %d, 255", small, longest, sample.SmallFiles)
	}
	wantKeys := []string{
		"security.capability", "trusted.of-the-system", "user.binary", "user.empty", "user.long", "user.of-a-directory", "user.text", "user.ключ",
	}
	if got := slices.Sorted(maps.Keys(keys)); !slices.Equal(got, wantKeys) {
		t.Errorf("attributes %q, want %q", got, wantKeys)
	}
	for _, mode := range []uint16{0o000, 0o400, 0o644, 0o1644, 0o2755, 0o4755, 0o6755} {
		path := fmt.Sprintf("/modes/file-%04o", mode)
		if e := entries[path]; e.Perm != mode || e.Type != testtree.File {
			t.Errorf("%s: mode %04o, type %q", path, e.Perm, e.Type)
		}
	}
	if e := entries["/modes/dir-1777"]; e.Perm != 0o1777 || e.Type != testtree.Dir {
		t.Errorf("directory of mode 1777: %+v", e)
	}
	if e := entries["/modes/owned-suid"]; e.UID != 65532 || e.Perm != 0o4755 {
		t.Errorf("set-id file of another user: %+v", e)
	}
	if e := entries["/modes/owner-4000000000-3999999999"]; e.UID != 4_000_000_000 || e.GID != 3_999_999_999 {
		t.Errorf("owner beyond 31 bits: %+v", e)
	}
	if large, sparse := entries["/large"], entries["/sparse"]; large.Size != size || sparse.Size != 2*size {
		t.Errorf("sizes %d and %d, want %d and twice that", large.Size, sparse.Size, size)
	}
	if a, b := entries["/twin-a"], entries["/twin-b"]; a.SHA256 != b.SHA256 || a.Nlink != 1 {
		t.Errorf("twins differ, or are links: %+v, %+v", a, b)
	}
	if len(got.Links) != 1 || len(got.Links[0]) != 3 {
		t.Errorf("links %q, want three of one file", got.Links)
	}
}

func TestSameSeed(t *testing.T) {
	dir := tmpfs(t)
	cfg := sample.Config{Seed: 7, Size: 1 << 20}
	a := make1(t, filepath.Join(dir, "a"), cfg)
	b := make1(t, filepath.Join(dir, "b"), cfg)
	if diff := tree.Diff(a, b); diff != "" {
		t.Errorf("the same seed: %s", diff)
	}
	cfg.Seed = 8
	if diff := tree.Diff(a, make1(t, filepath.Join(dir, "c"), cfg)); !strings.Contains(diff, "/large file") {
		t.Errorf("another seed does not give the large file other bytes: %q", diff)
	}
}

func TestMakeErrors(t *testing.T) {
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name, dir string
		cfg       sample.Config
		want      string
	}{
		{"directory with a file", full, sample.Config{}, "it is not empty"},
		{"file", filepath.Join(full, "x"), sample.Config{}, "not a directory"},
		{"negative size", t.TempDir(), sample.Config{Size: -1}, "want 1 to"},
		{"huge size", t.TempDir(), sample.Config{Size: sample.MaxSize + 1}, "want 1 to"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := sample.Make(tt.dir, tt.cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one about %q", err, tt.want)
			}
		})
	}
}
