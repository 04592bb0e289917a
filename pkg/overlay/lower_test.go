package overlay_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/overlay"
)

// lowerTree makes a tree with what overlayfs treats differently.
func lowerTree(t *testing.T) string {
	t.Helper()
	needRoot(t)
	tree := t.TempDir()
	for _, dir := range []string{"dir/sub", "doomed"} {
		if err := os.MkdirAll(filepath.Join(tree, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{
		"read": "read", "changed": "old", "grown": "a", "renamed": "renamed", "removed": "removed",
		"dir/file": "in dir", "dir/sub/deep": "deep", "doomed/file": "doomed", "attrs": "attrs",
	} {
		write(t, filepath.Join(tree, name), content)
	}
	err := errors.Join(
		os.Link(filepath.Join(tree, "read"), filepath.Join(tree, "link")),
		os.Symlink("read", filepath.Join(tree, "symlink")),
		unix.Mknod(filepath.Join(tree, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Setxattr(filepath.Join(tree, "attrs"), "user.note", []byte("kept"), 0),
		unix.Setxattr(tree, "user.root", []byte("mine"), 0),
		os.Chown(tree, 12, 34),
		os.Chmod(tree, 0o751|os.ModeSetgid),
	)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// Everything that a user does with a file system works over a tree served by FUSE, and is still
// there when the tree and the overlay are mounted anew.
func TestOverImage(t *testing.T) {
	tree := lowerTree(t)
	dir := place(t, "mnt")
	upper := filepath.Join(place(t, "data"), "changes")
	in := func(name string) string { return filepath.Join(dir, name) }

	d := makeDirs(t, dir, upper)
	stop := serve(t, tree, d.Lower)
	o := mount(t, overlay.Config{Dirs: d})
	want(t, in("read"), "read")
	want(t, in("symlink"), "read")
	want(t, in("dir/sub/deep"), "deep")
	write(t, in("changed"), "new")
	write(t, in("made"), "made")
	f, err := os.OpenFile(in("grown"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("b"); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	err = errors.Join(
		os.Rename(in("renamed"), in("new name")),
		os.Rename(in("dir"), in("moved")), // a directory of the lower tree
		os.Remove(in("removed")),
		os.RemoveAll(in("doomed")),
		os.Mkdir(in("doomed"), 0o700), // opaque
		os.Chmod(in("attrs"), 0o600),  // copies it up, with its attributes
		os.Link(in("read"), in("another link")),
		unix.Setxattr(in("attrs"), "user.more", []byte("added"), 0),
	)
	if err != nil {
		t.Fatal(err)
	}

	check := func() {
		t.Helper()
		for name, content := range map[string]string{
			"read": "read", "another link": "read", "changed": "new", "made": "made", "grown": "ab",
			"new name": "renamed", "moved/file": "in dir", "moved/sub/deep": "deep", "attrs": "attrs",
		} {
			want(t, in(name), content)
		}
		gone(t, in("renamed"), in("removed"), in("dir"), in("doomed/file"))
		if got := names(t, in("doomed")); got != "[]" {
			t.Errorf("a directory made in the place of another has %s", got)
		}
		for name, value := range map[string]string{"user.note": "kept", "user.more": "added"} {
			b := make([]byte, 64)
			if n, err := unix.Getxattr(in("attrs"), name, b); err != nil || string(b[:n]) != value {
				t.Errorf("%s is %q, %v; want %q", name, b[:max(n, 0)], err, value)
			}
		}
		// The root is that of the image.
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil || st.Uid != 12 || st.Gid != 34 || st.Mode&0o7777 != 0o2751 {
			t.Errorf("root: uid %d, gid %d, mode %o, %v", st.Uid, st.Gid, st.Mode, err)
		}
		b := make([]byte, 64)
		if n, err := unix.Getxattr(dir, "user.root", b); err != nil || string(b[:n]) != "mine" {
			t.Errorf("extended attribute of the root: %q, %v", b[:max(n, 0)], err)
		}
	}
	check()
	if err := o.Unmount(false); err != nil {
		t.Fatal(err)
	}
	want(t, filepath.Join(d.Lower, "changed"), "old") // the image knows nothing of it
	stop()

	d = makeDirs(t, dir, upper)
	stop = serve(t, tree, d.Lower)
	o = mount(t, overlay.Config{Dirs: d})
	check()
	if err := o.Unmount(false); err != nil {
		t.Fatal(err)
	}
	stop()
}

// Which tree an upper directory was used with is known the next time.
func TestPreviousTree(t *testing.T) {
	dir := place(t, "mnt")
	for _, step := range []struct{ tree, want string }{{"one", ""}, {"one", "one"}, {"", ""}, {"two", "one"}, {"three", "two"}} {
		o := mount(t, overlay.Config{Dirs: makeDirs(t, dir, ""), Tree: step.tree})
		if o.PreviousTree != step.want {
			t.Errorf("mounted with tree %q: before it was %q, want %q", step.tree, o.PreviousTree, step.want)
		}
		if err := o.Unmount(false); err != nil {
			t.Fatal(err)
		}
	}
}

// An upper directory that was there keeps its owner and permissions.
func TestUpperKeepsItsOwn(t *testing.T) {
	tree := lowerTree(t)
	upper := place(t, "upper")
	if err := os.Chmod(upper, 0o700); err != nil {
		t.Fatal(err)
	}
	d := makeDirs(t, place(t, "mnt"), upper)
	defer serve(t, tree, d.Lower)()
	o := mount(t, overlay.Config{Dirs: d})
	info, err := os.Stat(o.Dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the root is %v, %v; want 0700", info, err)
	}
	if err := o.Unmount(false); err != nil {
		t.Error(err)
	}
}
