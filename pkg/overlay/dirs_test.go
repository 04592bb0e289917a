package overlay_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/overlay"
)

// The work directory is on the file system of the upper one, wherever that is.
func TestMakeDirs(t *testing.T) {
	for name, test := range map[string]struct{ upper, wantUpper, wantWork string }{
		"default":           {"", "mnt/upper", "mnt/work"},
		"below the mount":   {"mnt/changes", "mnt/changes", "mnt/work"},
		"elsewhere":         {"data/changes", "data/changes", "data/changes.overlay-work"},
		"several to make":   {"a/b/c", "a/b/c", "a/b/c.overlay-work"},
		"there already":     {"data", "data", "data.overlay-work"},
		"through a symlink": {"link/changes", "data/changes", "data/changes.overlay-work"},
	} {
		t.Run(name, func(t *testing.T) {
			top := place(t, "top")
			if err := errors.Join(os.Mkdir(filepath.Join(top, "mnt"), 0o755), os.Mkdir(filepath.Join(top, "data"), 0o755), os.Symlink("data", filepath.Join(top, "link"))); err != nil {
				t.Fatal(err)
			}
			upper := test.upper
			if upper != "" {
				upper = filepath.Join(top, upper)
			}
			before := names(t, top)
			d, undo, err := overlay.MakeDirs(filepath.Join(top, "mnt"), upper)
			if err != nil {
				t.Fatal(err)
			}
			if d.Lower != top+"/mnt/ro" || d.Upper != filepath.Join(top, test.wantUpper) || d.Work != filepath.Join(top, test.wantWork) {
				t.Errorf("got %+v", d)
			}
			o := mount(t, overlay.Config{Dirs: d})
			if err := o.Unmount(false); err != nil {
				t.Fatal(err)
			}
			if err := undo(); err != nil {
				t.Fatal(err)
			}
			if after := names(t, top); after != before {
				t.Errorf("left are %s, before there were %s", after, before)
			}
			if left := names(t, top+"/mnt") + names(t, top+"/data"); left != "[][]" {
				t.Errorf("left below are %s", left)
			}
		})
	}
}

// What cannot be is refused, and nothing is left of it.
func TestMakeDirsRefused(t *testing.T) {
	for name, test := range map[string]struct{ dir, upper, want string }{
		"no directory":         {"missing", "", "no such file"},
		"a file":               {"file", "", "not a directory"},
		"upper is a file":      {"mnt", "file", "not a directory"},
		"upper in a file":      {"mnt", "file/x", "not a directory"},
		"ro is a symlink":      {"sly", "", "not a directory"},
		"upper is the mount":   {"mnt", "mnt", "choose another"},
		"upper has the mount":  {"mnt", ".", "choose another"},
		"upper is ro":          {"mnt", "mnt/ro", "choose another"},
		"upper is below ro":    {"mnt", "mnt/ro/x", "choose another"},
		"upper is work":        {"mnt", "mnt/work", "choose another"},
		"upper has odd spaces": {"mnt", "a\u00a0b", "choose another"},
	} {
		t.Run(name, func(t *testing.T) {
			top := place(t, "top")
			write(t, filepath.Join(top, "file"), "")
			if err := errors.Join(os.Mkdir(filepath.Join(top, "mnt"), 0o755), os.Mkdir(filepath.Join(top, "sly"), 0o755), os.Symlink("/etc", filepath.Join(top, "sly/ro"))); err != nil {
				t.Fatal(err)
			}
			upper := test.upper
			if upper != "" {
				upper = filepath.Join(top, upper)
			}
			_, _, err := overlay.MakeDirs(filepath.Join(top, test.dir), upper)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if left := names(t, top) + names(t, top+"/mnt") + names(t, top+"/sly"); left != "[file mnt sly][][ro]" {
				t.Errorf("left are %s", left)
			}
		})
	}
}

// File systems that overlayfs cannot keep changes on are named, and nothing stays mounted.
func TestUnusableUpper(t *testing.T) {
	needRoot(t)
	tree := t.TempDir()
	if err := os.MkdirAll(filepath.Join(tree, "changes"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(tree, "changes.overlay-work"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		prepare func(t *testing.T, dir string)
		want    string
	}{
		"overlayfs": {func(t *testing.T, dir string) {
			mount(t, overlay.Config{Dirs: makeDirs(t, dir, "")})
		}, "an overlay itself"},
		"FUSE": {func(t *testing.T, dir string) { serve(t, tree, dir) }, "a FUSE file system"},
	} {
		t.Run(name, func(t *testing.T) {
			on := place(t, "on")
			test.prepare(t, on)
			dir := place(t, "mnt")
			d, undo, err := overlay.MakeDirs(dir, filepath.Join(on, "changes"))
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(d.Lower, "file"), "x")
			o, err := overlay.Mount(overlay.Config{Dirs: d})
			if err == nil {
				err = errors.Join(errors.New("mounted"), o.Unmount(true))
			}
			if !errors.Is(err, overlay.ErrUpper) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want ErrUpper and %q", err, test.want)
			}
			if err := undo(); err != nil {
				t.Error(err)
			}
			if left := mountsBelow(t, dir); len(left) > 0 {
				t.Errorf("left mounted: %v", left)
			}
		})
	}
	// Beside a mount point is another file system.
	dir := place(t, "mnt")
	on := place(t, "on")
	if err := unix.Mount("none", on, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(on, 0); err != nil {
			t.Error(err)
		}
	}()
	if _, err := overlay.Mount(overlay.Config{Dirs: makeDirs(t, dir, on)}); !errors.Is(err, overlay.ErrUpper) {
		t.Errorf("the root of a file system: %v, want ErrUpper", err)
	}
}
