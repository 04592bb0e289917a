package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/overlay"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// mustRun runs a command line that has to succeed and returns what it printed.
func mustRun(t testing.TB, args ...string) string {
	t.Helper()
	var out, errs strings.Builder
	if code := run(args, &out, &errs); code != exitOK {
		t.Fatalf("%q: exit code %d: %s", args, code, errs.String())
	}
	return out.String()
}

// mustFail runs a command line that has to fail with a message.
func mustFail(t testing.TB, code int, message string, args ...string) {
	t.Helper()
	var out, errs strings.Builder
	if got := run(args, &out, &errs); got != code || !strings.Contains(errs.String(), message) {
		t.Errorf("%q: exit code %d, want %d: %s", args, got, code, errs.String())
	}
}

// mountWritable mounts an image, and an overlay over it, as mount -w does.
func mountWritable(t testing.TB, layout, tag, dir, upper, fsname string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts overlays, which takes root")
	}
	s, err := store.Open(store.Config{Dir: layout})
	if err != nil {
		t.Fatal(err)
	}
	root, err := s.Resolve(tag)
	if err != nil {
		t.Fatal(err)
	}
	im, err := image.Open(t.Context(), image.Config{Source: s, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	dirs, _, err := overlay.MakeDirs(dir, upper)
	if err != nil {
		t.Fatal(err)
	}
	server, err := fuse.Mount(fuse.Config{Image: im, Dir: dirs.Lower, FSName: fsname})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := overlay.Mount(overlay.Config{Dirs: dirs}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
		if err := server.Unmount(); err != nil {
			t.Error(err)
		}
		server.Wait()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

func writeFile(t testing.TB, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// treeOf returns the tree of an image.
func treeOf(t testing.TB, ref string) []testtree.Entry {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	mustRun(t, "extract", ref, out)
	mustRun(t, "verify", ref)
	return entriesOf(t, out)
}

func entriesOf(t testing.TB, dir string) []testtree.Entry {
	t.Helper()
	entries, err := testtree.FromDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func sameTree(t testing.TB, want, got []testtree.Entry) {
	t.Helper()
	if diff := testtree.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// A writable mount is committed, and again after more changes, wherever its upper directory is.
func TestCommit(t *testing.T) {
	for _, where := range []string{"hidden", "elsewhere"} {
		t.Run(where, func(t *testing.T) {
			dir := t.TempDir()
			tree, layout, mnt := dir+"/tree", dir+"/images", dir+"/mnt"
			upper := ""
			if where == "elsewhere" {
				upper = dir + "/changes"
			}
			for _, d := range []string{tree, mnt, tree + "/d"} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			writeFile(t, tree+"/a", "a")
			writeFile(t, tree+"/d/b", "b")
			mustRun(t, "build", tree, layout+":v1")
			mountWritable(t, layout, "v1", mnt, upper, "")

			mustRun(t, "commit", mnt, layout+":same")
			if v1, same := mustRun(t, "inspect", layout, "v1"), mustRun(t, "inspect", layout, "same"); v1 != same {
				t.Error("a commit without changes gives another image")
			}
			writeFile(t, mnt+"/a", "changed")
			if err := os.Rename(mnt+"/d", mnt+"/e"); err != nil {
				t.Fatal(err)
			}
			out := mustRun(t, "commit", mnt, layout, "v2", "--json")
			if !strings.Contains(out, `"bytes":7,`) {
				t.Errorf("more was read than what changed: %s", out)
			}
			sameTree(t, entriesOf(t, mnt), treeOf(t, layout+":v2"))
			writeFile(t, mnt+"/e/c", "c")
			mustRun(t, "commit", mnt, layout+":v3", "-b", "v1", "--owner", "7:8")
			want := entriesOf(t, mnt)
			for i := range want {
				if p := want[i].Path; p != "/e/b" { // which is the base's
					want[i].UID, want[i].GID = 7, 8
				}
			}
			sameTree(t, want, treeOf(t, layout+":v3"))

			other := dir + "/other"
			mustRun(t, "build", tree, other+":x", "--no-xattrs")
			mustFail(t, exitError, "is not in "+other, "commit", mnt, other+":y")
			mustFail(t, exitError, "there is no such directory", "commit", mnt, dir+"/none:y")
			mustRun(t, "commit", mnt, other+":y", "--base-layer", "x")
			sameTree(t, entriesOf(t, mnt), treeOf(t, other+":y"))
		})
	}
}

// What cannot be committed says why.
func TestCommitRefuses(t *testing.T) {
	dir := t.TempDir()
	mnt, layout := dir+"/mnt", dir+"/images"
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "build", mnt, layout+":v1")
	mustFail(t, exitError, "commit is for what 'csi-puzzlefs mount -w' mounts", "commit", mnt, layout+":v2")
	mustFail(t, exitUsage, "takes DIR LAYOUT:TAG", "commit", mnt)
	mountWritable(t, layout, "v1", mnt, "", "a name")
	mustFail(t, exitError, `"a name": name its tag in the layout with --base-layer`, "commit", mnt, layout+":v2")
	mustRun(t, "commit", mnt, layout+":v2", "-b", "v1")
	// The directory that the table names is not there, but below the overlay.
	mustFail(t, exitError, "no such file", "build", "--overlay-upper", mnt+"/upper", layout+":v3", "-b", "v1")
}
