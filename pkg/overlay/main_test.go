package overlay_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/overlay"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// needRoot skips what only root can do, and says so.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting overlays takes root")
	}
}

// place returns a new directory, with whatever it is called, on the file system of temporary
// files. What is mounted in it after the test is a failure, and unmounted.
func place(t *testing.T, name string) string {
	t.Helper()
	needRoot(t)
	root := t.TempDir()
	t.Cleanup(func() {
		for _, m := range mountsBelow(t, root) {
			t.Errorf("left mounted: %s on %s", m.Type, m.Point)
			if err := unix.Unmount(m.Point, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	})
	dir := filepath.Join(root, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func mountsBelow(t *testing.T, dir string) []mountinfo.Mount {
	t.Helper()
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		t.Fatal(err)
	}
	var found []mountinfo.Mount
	for _, m := range table {
		if m.Point == dir || strings.HasPrefix(m.Point, dir+"/") {
			found = append(found, m)
		}
	}
	return found
}

// makeDirs makes the directories, for the time of the test.
func makeDirs(t *testing.T, dir, upper string) overlay.Dirs {
	t.Helper()
	d, _, err := overlay.MakeDirs(dir, upper)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// mount mounts an overlay, and unmounts it after the test if it is still there.
func mount(t *testing.T, cfg overlay.Config) *overlay.Overlay {
	t.Helper()
	o, err := overlay.Mount(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := o.Unmount(true); err != nil {
			t.Error(err)
		}
	})
	return o
}

// serve mounts an image of a tree by FUSE, until the test or stop ends.
func serve(t *testing.T, tree, dir string) (stop func()) {
	t.Helper()
	s, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "layout"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	r, err := builder.Build(context.Background(), builder.Config{Dir: tree, Store: s, Tag: "test"})
	if err != nil {
		t.Fatal(err)
	}
	img, err := image.Open(context.Background(), image.Config{Source: s, Root: r.Manifest})
	if err != nil {
		t.Fatal(err)
	}
	srv, err := fuse.Mount(fuse.Config{Image: img, Dir: dir, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		if err := errors.Join(srv.Detach(), s.Close()); err != nil {
			t.Error(err)
		}
		srv.Wait()
	}
	t.Cleanup(stop)
	return stop
}

// write writes a file.
func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// want compares the content of a file.
func want(t *testing.T, path, content string) {
	t.Helper()
	if b, err := os.ReadFile(path); err != nil || string(b) != content {
		t.Errorf("%s: %q, %v; want %q", path, b, err, content)
	}
}

// gone makes sure that a path does not exist.
func gone(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", path, err)
		}
	}
}

// names lists a directory.
func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return fmt.Sprint(all)
}
