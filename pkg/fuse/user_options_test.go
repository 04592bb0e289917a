package fuse_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
)

// top returns the mount that is on top at a directory.
func top(t *testing.T, dir string) mountinfo.Mount {
	t.Helper()
	stack := at(t, dir)
	if len(stack) == 0 {
		t.Fatalf("nothing is mounted on %s", dir)
	}
	return stack[0]
}

// TestRootOnly: other users are kept out of the whole mount.
func TestRootOnly(t *testing.T) {
	_, dir := mount(t, awkward(t), func(c *fuse.Config) { c.RootOnly = true })
	if options := top(t, dir).SuperOptions; slices.Contains(options, "allow_other") {
		t.Errorf("options %v", options)
	}
	if got := runs(t, helper(t, nobody, "access", dir)); got != "EACCES\n" {
		t.Errorf("another user: %s, want EACCES", got)
	}
	if _, err := os.ReadDir(dir); err != nil {
		t.Errorf("root: %v", err)
	}
}

// TestNoAtime: the table of mounts shows it.
func TestNoAtime(t *testing.T) {
	_, dir := mount(t, awkward(t), func(c *fuse.Config) { c.NoAtime = true })
	if options := top(t, dir).Options; !slices.Contains(options, "noatime") {
		t.Errorf("options %v", options)
	}
}

// TestSubtype: the type is as asked for, and the mount is known as an image as long as its
// source is the image's digest.
func TestSubtype(t *testing.T) {
	img := awkward(t)
	s, dir := mount(t, img, func(c *fuse.Config) { c.Subtype, c.FSName = "own.type,x", "" })
	if m := top(t, dir); m.Type != "fuse.own.type,x" || m.Source != img.Digest().String() {
		t.Errorf("type %s, source %s", m.Type, m.Source)
	}
	if again, err := fuse.Mount(fuse.Config{Image: img, Dir: dir}); !errors.Is(err, fuse.ErrMounted) {
		if again != nil {
			err = errors.Join(err, again.Detach())
		}
		t.Errorf("mounted on top: %v, want ErrMounted", err)
	}
	if err := fuse.Unmount(dir, false); err != nil {
		t.Error(err)
	}
	s.Wait()

	s, dir = mount(t, img, func(c *fuse.Config) { c.Subtype, c.FSName = "own", "own" })
	if err := fuse.Unmount(dir, false); !errors.Is(err, fuse.ErrNotMounted) || !strings.Contains(err.Error(), "fuse.own") {
		t.Errorf("a mount that nothing tells from others: %v, want ErrNotMounted and its type", err)
	}
	if err := s.Unmount(); err != nil {
		t.Error(err)
	}
}

// TestUserOptionsRefused: what makes no sense never reaches the kernel.
func TestUserOptionsRefused(t *testing.T) {
	img := awkward(t)
	for name, change := range map[string]func(*fuse.Config){
		"space in the subtype":    func(c *fuse.Config) { c.Subtype = "a b" },
		"newline in the subtype":  func(c *fuse.Config) { c.Subtype = "a\n" },
		"long subtype":            func(c *fuse.Config) { c.Subtype = strings.Repeat("x", 100) },
		"contexts by fusermount3": func(c *fuse.Config) { c.AutoUnmount, c.SELinux = true, []string{"context=a:b:c:s0"} },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := fuse.Config{Image: img, Dir: tempDir(t), FSName: source()}
			change(&cfg)
			s, err := fuse.Mount(cfg)
			if err == nil {
				err = errors.Join(errors.New("mounted"), s.Detach())
			}
			if !errors.Is(err, fuse.ErrConfig) {
				t.Errorf("got %v, want ErrConfig", err)
			}
		})
	}
}

// TestAutoUnmount: the mount of a process that is killed goes away, and one that is unmounted
// leaves nothing behind either.
func TestAutoUnmount(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("fusermount3"); err != nil {
		t.Fatalf("%v: install fuse3", err)
	}
	img := awkward(t)
	s, dir := mount(t, img, func(c *fuse.Config) { c.AutoUnmount, c.Dev = true, true })
	m := top(t, dir)
	if m.Type != fuse.FSType || slices.Contains(m.Options, "nodev") || !slices.Contains(m.Options, "nosuid") || !slices.Contains(m.SuperOptions, "allow_other") {
		t.Errorf("mounted as %+v", m)
	}
	if err := s.Unmount(); err != nil {
		t.Error(err)
	}
	s.Wait() // for fusermount3, too

	dir = tempDir(t)
	store, root := build(t, tree(t, map[string]string{"file": "content"}))
	if err := store.Tag("test", root); err != nil {
		t.Fatal(err)
	}
	cmd := helper(t, 0, "autounmount", store.Dir()+":test", dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("the server did not mount: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(b) != "content" {
		t.Errorf("read %q, %v", b, err)
	}
	if err := cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		table, err := mountinfo.Read(mountinfo.Self)
		if err != nil {
			t.Fatal(err)
		}
		if len(table.At(dir)) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("still mounted 10 s after the server was killed; unmount: %v", fuse.Unmount(dir, true))
			return
		}
	}
}
