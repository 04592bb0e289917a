package mountinfo_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

const table = `22 1 252:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /mnt/a\040b\011c\134d ro,nosuid,nodev shared:7 master:3 - fuse.puzzlefs sha256:00\043\012 ro,user_id=0,allow_other
31 30 0:41 /sub /mnt/stack rw - tmpfs none rw
33 32 0:43 / /mnt/stack rw - tmpfs top rw
32 31 0:42 / /mnt/stack rw - tmpfs middle rw
`

func read(t *testing.T, text string) mountinfo.Table {
	t.Helper()
	name := filepath.Join(t.TempDir(), "mountinfo")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := mountinfo.Read(name)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestRead(t *testing.T) {
	got := read(t, table)
	if len(got) != 5 {
		t.Fatalf("%d mounts, want 5", len(got))
	}
	want := mountinfo.Mount{
		ID: 30, Parent: 22, Device: "0:40", Root: "/", Point: "/mnt/a b\tc\\d",
		Type: "fuse.puzzlefs", Source: "sha256:00#\n",
		Options:      []string{"ro", "nosuid", "nodev"},
		SuperOptions: []string{"ro", "user_id=0", "allow_other"},
	}
	if d := cmp.Diff(want, got[1]); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestAt(t *testing.T) {
	for name, test := range map[string]struct {
		text, path string
		want       []int
	}{
		"nothing":            {table, "/mnt", nil},
		"one":                {table, "/", []int{22}},
		"escaped":            {table, "/mnt/a b\tc\\d", []int{30}},
		"a stack, top first": {table, "/mnt/stack", []int{33, 32, 31}},
		"its own parent":     {"1 1 0:1 / / rw - rootfs rootfs rw\n", "/", []int{1}},
		"a circle":           {"1 2 0:1 / /x rw - tmpfs a rw\n2 1 0:2 / /x rw - tmpfs b rw\n", "/x", []int{2, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			var got []int
			for _, m := range read(t, test.text).At(test.path) {
				got = append(got, m.ID)
			}
			if d := cmp.Diff(test.want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

func TestReadFails(t *testing.T) {
	name := filepath.Join(t.TempDir(), "none")
	if _, err := mountinfo.Read(name); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("error %v, want one that names %s", err, name)
	}
}

func TestReadSelf(t *testing.T) {
	got, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		t.Fatal(err)
	}
	if root := got.At("/"); len(root) == 0 || root[0].Type == "" {
		t.Errorf("nothing is mounted at / in %+v", got)
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		`plain`: "plain", `a\040b\054c\134d`: `a b,c\d`, `\303\251`: "é",
		// No escapes of the kernel's, so they stay.
		`a\`: `a\`, `a\04`: `a\04`, `\999`: `\999`, `\777`: `\777`,
	} {
		if got := mountinfo.Unescape(in); got != want {
			t.Errorf("%s: got %q, want %q", in, got, want)
		}
	}
}

// A mount is found by every path that leads to it.
func TestFind(t *testing.T) {
	top, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	point := filepath.Join(top, "dir", "mnt")
	if err := os.MkdirAll(point, 0o755); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{"above": "dir", "itself": "dir/mnt"} {
		if err := os.Symlink(target, filepath.Join(top, link)); err != nil {
			t.Fatal(err)
		}
	}
	mounts := read(t, "1 0 0:1 / "+point+" rw - tmpfs none rw\n")
	t.Chdir(top)
	for _, dir := range []string{point, "dir/mnt", "dir/../dir/mnt/", "above/mnt", "itself"} {
		if path, stack, err := mounts.Find(dir); err != nil || path != point || len(stack) != 1 {
			t.Errorf("%s: %s, %v, %v", dir, path, stack, err)
		}
	}
	if _, stack, err := mounts.Find("dir"); err != nil || stack != nil {
		t.Errorf("where nothing is mounted: %v, %v", stack, err)
	}
	if _, _, err := mounts.Find("missing"); err == nil {
		t.Error("a path that is not there: no error")
	}
}
