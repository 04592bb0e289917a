package fuse_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
)

// TestModTime: all files have the one time of the mount, however the kernel came to ask.
func TestModTime(t *testing.T) {
	want := time.Date(2026, 11, 22, 8, 30, 15, 123456789, time.UTC)
	for name, modTime := range map[string]time.Time{"given": want, "1970": {}} {
		t.Run(name, func(t *testing.T) {
			_, dir := mount(t, awkward(t), func(c *fuse.Config) { c.ModTime = modTime })
			want := modTime
			if want.IsZero() {
				want = time.Unix(0, 0)
			}
			// By READDIRPLUS, then by LOOKUP of what the list did not bring, then the root's own.
			entries, err := os.ReadDir(dir)
			if err != nil || len(entries) == 0 {
				t.Fatalf("list: %v, %v", entries, err)
			}
			paths := []string{dir}
			for _, e := range entries {
				paths = append(paths, filepath.Join(dir, e.Name()))
			}
			for _, path := range paths {
				var st unix.Stat_t
				if err := unix.Lstat(path, &st); err != nil {
					t.Fatal(err)
				}
				for which, ts := range map[string]unix.Timespec{"atime": st.Atim, "mtime": st.Mtim, "ctime": st.Ctim} {
					if got := time.Unix(ts.Unix()); !got.Equal(want) {
						t.Errorf("%s of %s is %v, want %v", which, path, got.UTC(), want.UTC())
					}
				}
			}
		})
	}
}

// TestMountFlags: the table of mounts shows what was asked for.
func TestMountFlags(t *testing.T) {
	img := awkward(t)
	for _, tt := range []struct {
		name   string
		change func(*fuse.Config)
		want   []string
	}{
		{"default", func(*fuse.Config) {}, []string{"nodev", "nosuid"}},
		{"noexec", func(c *fuse.Config) { c.NoExec = true }, []string{"nodev", "noexec", "nosuid"}},
		{"dev", func(c *fuse.Config) { c.Dev = true }, []string{"nosuid"}},
		{"suid", func(c *fuse.Config) { c.Suid = true }, []string{"nodev"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, dir := mount(t, img, tt.change)
			table, err := mountinfo.Read(mountinfo.Self)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, o := range table.At(dir)[0].Options {
				if slices.Contains([]string{"nodev", "nosuid", "noexec"}, o) {
					got = append(got, o)
				}
			}
			slices.Sort(got)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("flags (-want +got):\n%s", diff)
			}
		})
	}
}

// TestConfigRefused: options that nobody may give never reach the kernel.
func TestConfigRefused(t *testing.T) {
	img := awkward(t)
	for name, change := range map[string]func(*fuse.Config){
		"before 1970":       func(c *fuse.Config) { c.ModTime = time.Date(1969, 12, 31, 0, 0, 0, 0, time.UTC) },
		"another option":    func(c *fuse.Config) { c.SELinux = []string{"user_id=1000"} },
		"no label":          func(c *fuse.Config) { c.SELinux = []string{"context="} },
		"no value":          func(c *fuse.Config) { c.SELinux = []string{"context"} },
		"quote":             func(c *fuse.Config) { c.SELinux = []string{`context=a",fd="3`} },
		"backslash":         func(c *fuse.Config) { c.SELinux = []string{`context=a\`} },
		"space":             func(c *fuse.Config) { c.SELinux = []string{"context=a b"} },
		"control character": func(c *fuse.Config) { c.SELinux = []string{"context=a\x00,fd=3"} },
		"too long":          func(c *fuse.Config) { c.SELinux = []string{"context=" + strings.Repeat("x", 2000)} },
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

// TestSELinux mounts with a context. Where the kernel has no SELinux it refuses that by
// itself, and the error says what is the matter; nothing is left mounted.
func TestSELinux(t *testing.T) {
	needRoot(t)
	const label = "system_u:object_r:container_file_t:s0:c1,c2"
	if got, want := fuse.QuoteSELinux("context="+label), `context="`+label+`"`; got != want {
		t.Errorf("the kernel is given %s, want %s", got, want)
	}
	dir := tempDir(t)
	s, err := fuse.Mount(fuse.Config{Image: awkward(t), Dir: dir, FSName: source(), SELinux: []string{"context=" + label}})
	if err == nil {
		defer s.Wait()
		defer func() {
			if err := s.Detach(); err != nil {
				t.Error(err)
			}
		}()
		value := make([]byte, 256)
		n, err := unix.Getxattr(dir, "security.selinux", value)
		if err != nil || strings.TrimRight(string(value[:n]), "\x00") != label {
			t.Errorf("the label is %q, %v; want %s", value[:max(n, 0)], err, label)
		}
		return
	}
	if _, statErr := os.Stat("/sys/fs/selinux/enforce"); statErr == nil {
		t.Fatalf("this kernel has SELinux: %v", err)
	}
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "the kernel has no SELinux") {
		t.Errorf("got %v, want EINVAL and the reason", err)
	}
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		t.Fatal(err)
	}
	if left := table.At(dir); len(left) > 0 {
		t.Errorf("left mounted: %+v", left)
	}
}

// TestIDMappedKept binds a mount with the IDs of a user namespace, as kubelet and the runtime do
// for a pod with hostUsers: false. Owners are shifted there, and only there, whether the
// kernel asked us or had the attributes already.
func TestIDMappedKept(t *testing.T) {
	const shift = 100000
	needRoot(t)
	im := new(memory).image(t, format.InodeVector{
		{Ino: 1, Kind: format.KindDir, Perm: 0o755, Entries: entries(2, "known", "later", "others")},
		{Ino: 2, Kind: format.KindFile, Perm: 0o640, UID: 0, GID: 7},
		{Ino: 3, Kind: format.KindFile, Perm: 0o640, UID: 1000, GID: 1000},
		{Ino: 4, Kind: format.KindFile, Perm: 0o644, UID: 70000, GID: 70000},
	})
	_, dir := mount(t, im)
	owner := func(path string) string {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
	}
	if got := owner(filepath.Join(dir, "known")); got != "0:7" {
		t.Errorf("owner of known is %s, want 0:7", got)
	}
	bound := tempDir(t)
	bindMapped(t, dir, bound, userNamespace(t, shift))
	const overflow = "65534:65534" // an ID that the namespace does not have
	for name, want := range map[string]string{
		"": "100000:100000", "known": "100000:100007", "later": "101000:101000", "others": overflow,
	} {
		if got := owner(filepath.Join(bound, name)); got != want {
			t.Errorf("owner of %q through the ID-mapped bind is %s, want %s", name, got, want)
		}
	}
	for name, want := range map[string]string{"": "0:0", "known": "0:7", "later": "1000:1000", "others": "70000:70000"} {
		if got := owner(filepath.Join(dir, name)); got != want {
			t.Errorf("owner of %q is %s, want %s", name, got, want)
		}
	}
	// The namespace's user 1000 may read what belongs to 1000 in the image, and nobody else.
	read := func(uid uint32, name string) error {
		cmd := exec.Command("cat", filepath.Join(bound, name))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		return cmd.Run()
	}
	if err := read(shift+1000, "later"); err != nil {
		t.Errorf("the owner cannot read: %v", err)
	}
	for _, uid := range []uint32{1000, shift + 1001} {
		if err := read(uid, "later"); err == nil {
			t.Errorf("user %d, who is not the owner, can read", uid)
		}
	}
}

// userNamespace returns a user namespace that maps the first 65536 IDs to those from first on.
func userNamespace(t *testing.T, first int) *os.File {
	t.Helper()
	mapping := []syscall.SysProcIDMap{{ContainerID: 0, HostID: first, Size: 65536}}
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: mapping, GidMappings: mapping, Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("make a user namespace: %v", err)
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	if killErr := cmd.Process.Kill(); killErr != nil {
		t.Error(killErr)
	}
	if waitErr := cmd.Wait(); waitErr == nil {
		t.Error("the process was to be killed")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// bindMapped binds from to to with the IDs of a user namespace until the test ends.
func bindMapped(t *testing.T, from, to string, ns *os.File) {
	t.Helper()
	tree, err := unix.OpenTree(unix.AT_FDCWD, from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		t.Fatalf("map IDs (Linux 6.12 or later does that for FUSE): %v", err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, to, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(to, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}
