package overlay_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/overlay"
)

// The upper directory opens though the overlay hides it, and what is read is not the
// overlay's directory of that name.
func TestOpenUpper(t *testing.T) {
	for _, where := range []string{"", "elsewhere"} {
		dir := place(t, "m n,t")
		upper := ""
		if where != "" {
			upper = filepath.Join(filepath.Dir(dir), where)
		}
		tree := t.TempDir()
		if err := os.Mkdir(filepath.Join(tree, "upper"), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(tree, "upper", "in the tree"), "")
		d := makeDirs(t, dir, upper)
		serve(t, tree, d.Lower)
		o := mount(t, overlay.Config{Dirs: d})
		write(t, filepath.Join(dir, "changed"), "")
		f, err := o.OpenUpper()
		if err != nil {
			t.Fatal(err)
		}
		all, err := f.Readdirnames(-1)
		if err != nil || len(all) != 1 || all[0] != "changed" {
			t.Errorf("upper directory %q: %q, %v", where, all, err)
		}
		if f.Name() != o.Upper {
			t.Errorf("it is called %s, want %s", f.Name(), o.Upper)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Where nothing leads to the upper directory, the error says so.
func TestOpenUpperRefuses(t *testing.T) {
	dir := place(t, "mnt")
	// A file system that is mounted just where the overlay goes.
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	d := makeDirs(t, dir, "")
	o := mount(t, overlay.Config{Dirs: d})
	if f, err := o.OpenUpper(); err == nil || !strings.Contains(err.Error(), "which hides "+d.Upper) {
		t.Errorf("got %v, %v", f, err)
	}

	// One that can only be read, and one with relative paths.
	top := place(t, "relative")
	for _, name := range []string{"lower", "lower2", "upper", "work", "mnt"} {
		if err := os.Mkdir(filepath.Join(top, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(top)
	for options, want := range map[string]string{
		"lowerdir=lower:lower2":                      "it has none",
		"lowerdir=lower,upperdir=upper,workdir=work": "relative path upper",
	} {
		if err := unix.Mount("overlay", "mnt", "overlay", 0, options); err != nil {
			t.Fatal(err)
		}
		o, err := overlay.Find("mnt")
		if err != nil {
			t.Fatal(err)
		}
		if f, err := o.OpenUpper(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, %v", options, f, err)
		}
		if err := unix.Unmount("mnt", 0); err != nil {
			t.Fatal(err)
		}
	}
}
