package fuse_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
)

// at returns what the table of mounts shows at a path.
func at(t testing.TB, path string) []mountinfo.Mount {
	t.Helper()
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		t.Fatal(err)
	}
	return table.At(path)
}

// TestFlags looks at what root's mounts are in the table of mounts.
func TestFlags(t *testing.T) {
	img := awkward(t)
	_, dir := mount(t, img)
	m := at(t, dir)[0]
	if m.Type != "fuse.puzzlefs" || m.Source != source() {
		t.Errorf("type %q, source %q", m.Type, m.Source)
	}
	for _, o := range []string{"ro", "nosuid", "nodev"} {
		if !slices.Contains(m.Options, o) {
			t.Errorf("the mount is not %s: %q", o, m.Options)
		}
	}
	for _, o := range []string{"ro", "allow_other", "default_permissions", "user_id=0", "group_id=0"} {
		if !slices.Contains(m.SuperOptions, o) {
			t.Errorf("the file system is not %s: %q", o, m.SuperOptions)
		}
	}
}

func TestSource(t *testing.T) {
	img := awkward(t)
	for name, test := range map[string]struct{ source, want string }{
		"default":    {"", img.Digest().String()},
		"characters": {`a b,c\d#` + source(), `a b,c\d#` + source()},
	} {
		t.Run(name, func(t *testing.T) {
			_, dir := mount(t, img, func(c *fuse.Config) { c.FSName = test.source })
			if got := at(t, dir)[0].Source; got != test.want {
				t.Errorf("source %q, want %q", got, test.want)
			}
		})
	}
}

// TestMountPoint mounts on paths that are written in odd ways.
func TestMountPoint(t *testing.T) {
	needRoot(t)
	dir := tempDir(t)
	real := filepath.Join(dir, "a b\tc\nd\\040#,é\xff")
	if err := os.Mkdir(real, 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for name, path := range map[string]string{"itself": real, "not clean": dir + "//link/../" + filepath.Base(real) + "/.", "symlink": link, "relative": "link"} {
		t.Run(name, func(t *testing.T) {
			_, got := mount(t, awkward(t), func(c *fuse.Config) { c.Dir = path })
			if got != real {
				t.Errorf("mounted on %q, want %q", got, real)
			}
			if lstat(t, filepath.Join(real, "a")).Size != 5000 {
				t.Error("the image is not there")
			}
			if err := fuse.Unmount(path, false); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestMountFails(t *testing.T) {
	needRoot(t)
	img := awkward(t)
	dir := tempDir(t)
	file, none := filepath.Join(dir, "file"), filepath.Join(dir, "none")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	_, mounted := mount(t, img)
	for name, test := range map[string]struct {
		cfg  fuse.Config
		want error
		says string
	}{
		"no image":             {fuse.Config{Dir: dir}, fuse.ErrConfig, "no image"},
		"no directory":         {fuse.Config{Image: img}, fuse.ErrConfig, "no directory"},
		"newline in source":    {fuse.Config{Image: img, Dir: dir, FSName: "a\nb"}, fuse.ErrConfig, `"a\nb"`},
		"space in source":      {fuse.Config{Image: img, Dir: dir, FSName: "a\u00a0b"}, fuse.ErrConfig, "space"},
		"endless source":       {fuse.Config{Image: img, Dir: dir, FSName: strings.Repeat("x", 5000)}, fuse.ErrConfig, "5000"},
		"space in directory":   {fuse.Config{Image: img, Dir: dir + "\u2003"}, fuse.ErrConfig, "space"},
		"does not exist":       {fuse.Config{Image: img, Dir: none}, fs.ErrNotExist, none + ": no such file or directory: make the directory first"},
		"is a file":            {fuse.Config{Image: img, Dir: file}, fuse.ErrNotDir, file},
		"has an image already": {fuse.Config{Image: img, Dir: mounted}, fuse.ErrMounted, "unmount it first"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := fuse.Mount(test.cfg)
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v, want %v that says %q", err, test.want, test.says)
			}
			if s != nil {
				t.Error("there is a server")
			}
		})
	}
	if left := at(t, dir); len(left) != 0 {
		t.Errorf("left mounted: %+v", left)
	}
	if n := len(at(t, mounted)); n != 1 {
		t.Errorf("%d mounts on %s, want 1", n, mounted)
	}
}

// TestMountForbidden mounts where the system does not let us: the message says what to do.
func TestMountForbidden(t *testing.T) {
	needRoot(t)
	s, _ := build(t, tree(t, map[string]string{"file": "content"}))
	dir := tempDir(t)
	for name, test := range map[string]struct {
		helper string
		says   string
	}{
		"no device":     {"nodevice", "modprobe fuse"},
		"no capability": {"powerless", "CAP_SYS_ADMIN"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := helper(t, 0, test.helper, s.Dir()+":test", dir)
			cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
			if got := runs(t, cmd); !strings.Contains(got, test.says) || !strings.Contains(got, dir) {
				t.Errorf("%q does not say %q of %s", got, test.says, dir)
			}
		})
	}
}

// TestDiscard undoes a mount, as Mount does when a later step fails.
func TestDiscard(t *testing.T) {
	s, dir := mount(t, awkward(t))
	if err := fuse.Discard(dir); err != nil {
		t.Fatal(err)
	}
	s.Wait()
	if err := fuse.Discard(dir); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

// TestUnmounted ends mounts from inside and from outside. Every time Wait returns, and
// unmounting again is fine.
func TestUnmounted(t *testing.T) {
	for name, unmount := range map[string]func(s *fuse.Server, dir string) error{
		"method":       func(s *fuse.Server, _ string) error { return s.Unmount() },
		"detached":     func(s *fuse.Server, _ string) error { return s.Detach() },
		"function":     func(_ *fuse.Server, dir string) error { return fuse.Unmount(dir, false) },
		"lazily":       func(_ *fuse.Server, dir string) error { return fuse.Unmount(dir, true) },
		"from outside": func(_ *fuse.Server, dir string) error { return unix.Unmount(dir, 0) },
		"by force":     func(_ *fuse.Server, dir string) error { return unix.Unmount(dir, unix.MNT_FORCE) },
	} {
		t.Run(name, func(t *testing.T) {
			s, dir := mount(t, awkward(t))
			if _, err := os.ReadFile(filepath.Join(dir, "b")); err != nil {
				t.Fatal(err)
			}
			if err := unmount(s, dir); err != nil {
				t.Fatal(err)
			}
			s.Wait()
			<-s.Done()
			if left := at(t, dir); len(left) > 0 {
				t.Errorf("still mounted: %+v", left)
			}
			if err := errors.Join(s.Unmount(), s.Detach()); err != nil {
				t.Errorf("again: %v", err)
			}
			if err := fuse.Unmount(dir, false); !errors.Is(err, fuse.ErrNotMounted) {
				t.Errorf("the function again: %v, want %v", err, fuse.ErrNotMounted)
			}
		})
	}
}

// TestBusy unmounts while a file is open.
func TestBusy(t *testing.T) {
	for name, test := range map[string]struct {
		unmount, detach func(s *fuse.Server, dir string) error
	}{
		"method":   {func(s *fuse.Server, _ string) error { return s.Unmount() }, func(s *fuse.Server, _ string) error { return s.Detach() }},
		"function": {func(_ *fuse.Server, dir string) error { return fuse.Unmount(dir, false) }, func(_ *fuse.Server, dir string) error { return fuse.Unmount(dir, true) }},
	} {
		t.Run(name, func(t *testing.T) {
			s, dir := mount(t, awkward(t))
			f, err := os.Open(filepath.Join(dir, "a"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := test.unmount(s, dir); !errors.Is(err, fuse.ErrBusy) || !strings.Contains(err.Error(), dir) {
				t.Fatalf("%v, want %v of %s", err, fuse.ErrBusy, dir)
			}
			if len(at(t, dir)) != 1 {
				t.Error("not mounted any longer")
			}
			if err := test.detach(s, dir); err != nil {
				t.Fatal(err)
			}
			if len(at(t, dir)) != 0 {
				t.Error("still mounted")
			}
			if n, err := f.Read(make([]byte, 5000)); n != 5000 || err != nil {
				t.Errorf("read after that: %d, %v", n, err)
			}
			select {
			case <-s.Done():
				t.Error("the server ended while a file is open")
			default:
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			s.Wait()
		})
	}
}

// TestBound binds a mount to another directory: it is served until that is unmounted, too.
func TestBound(t *testing.T) {
	s, dir := mount(t, awkward(t))
	target := tempDir(t)
	if err := unix.Mount(dir, target, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := s.Unmount(); err != nil {
		t.Error(err)
	}
	if got := lstat(t, filepath.Join(target, "a")).Size; got != 5000 {
		t.Errorf("size %d through the bind", got)
	}
	if err := s.Unmount(); err != nil {
		t.Errorf("again: %v", err)
	}
	if err := fuse.Unmount(target, false); err != nil {
		t.Error(err)
	}
	s.Wait()
}

// TestUnmountNotOurs leaves alone what is not ours.
func TestUnmountNotOurs(t *testing.T) {
	s, covered := mount(t, awkward(t))
	dir := tempDir(t)
	for _, d := range []string{dir, covered} {
		if err := unix.Mount("someone-elses", d, "tmpfs", 0, "size=4k"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(d, 0) })
	}
	for name, test := range map[string]struct {
		dir  string
		want error
		says string
	}{
		"another file system": {dir, fuse.ErrNotMounted, "type tmpfs"},
		"one on top of ours":  {covered, fuse.ErrNotMounted, "type tmpfs"},
		"no mount":            {tempDir(t), fuse.ErrNotMounted, "nothing"},
		"no directory":        {filepath.Join(dir, "none"), fs.ErrNotExist, ""},
		"no name":             {"", fuse.ErrConfig, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if err := fuse.Unmount(test.dir, true); !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v, want %v that says %q", err, test.want, test.says)
			}
		})
	}
	for name, unmount := range map[string]func() error{"unmount": s.Unmount, "detach": s.Detach} {
		if err := unmount(); err == nil || !strings.Contains(err.Error(), "someone-elses") {
			t.Errorf("%s: %v, want an error that names what is on top", name, err)
		}
	}
	if got := len(at(t, covered)); got != 2 {
		t.Errorf("%d mounts, want 2", got)
	}
	if err := unix.Unmount(covered, 0); err != nil {
		t.Fatal(err)
	}
}

// TestUnmountDead unmounts what nobody serves any longer.
func TestUnmountDead(t *testing.T) {
	needRoot(t)
	dir := tempDir(t)
	parent := filepath.Join(tempDir(t), "link")
	if err := os.Symlink(filepath.Dir(dir), parent); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(source(), dir, fuse.FSType, unix.MS_RDONLY, "rootmode=40000,user_id=0,group_id=0,fd="+itoa(fd)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadDir(dir); !errors.Is(err, unix.ENOTCONN) {
		t.Fatalf("%v, want ENOTCONN", err)
	}
	if _, err := fuse.Mount(fuse.Config{Image: awkward(t), Dir: dir}); err == nil || !strings.Contains(err.Error(), "unmount it first") {
		t.Errorf("mount on it: %v", err)
	}
	if err := fuse.Unmount(filepath.Join(parent, filepath.Base(dir)), false); err != nil {
		t.Error(err)
	}
	if left := at(t, dir); len(left) > 0 {
		t.Errorf("still mounted: %+v", left)
	}
}

// TestUser mounts and unmounts as somebody who is not root, with fusermount3.
func TestUser(t *testing.T) {
	needRoot(t)
	dir := tree(t, map[string]string{"file": "content", "closed": "secret"})
	if err := os.Chmod(filepath.Join(dir, "closed"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ := build(t, dir)
	mountPoint := tempDir(t)
	if err := os.Chown(mountPoint, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	// /dev/fuse may be for root only. The helper makes another where only it sees it.
	cmd := helper(t, 0, "namespace", tempDir(t), s.Dir()+":test", mountPoint)
	cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	lines := strings.Split(strings.TrimSpace(runs(t, cmd)), "\n")
	if len(lines) != 7 {
		t.Fatalf("the helper said %q", lines)
	}
	if !strings.Contains(lines[0], "user_allow_other") || !strings.Contains(lines[0], "/etc/fuse.conf") {
		t.Errorf("letting others in: %q", lines[0])
	}
	fields := strings.Fields(lines[1])
	if want := []string{"mount:", "fuse.puzzlefs", `a,b\c`, "ro,nosuid,nodev,relatime"}; !slices.Equal(fields[:4], want) {
		t.Errorf("%q, want %q", fields[:4], want)
	}
	if super := strings.Split(fields[4], ","); !slices.Contains(super, "default_permissions") || !slices.Contains(super, "user_id=65534") || slices.Contains(super, "allow_other") {
		t.Errorf("file system options %q", super)
	}
	if d := cmp.Diff([]string{"read: content", "closed: true", "busy: true true", "again: true", "done"}, lines[2:]); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// TestUserWithoutHelper tries to mount as somebody who is not root without fusermount3.
func TestUserWithoutHelper(t *testing.T) {
	needRoot(t)
	s, _ := build(t, tree(t, map[string]string{"file": "content"}))
	dir := tempDir(t)
	cmd := helper(t, nobody, "forbidden", s.Dir()+":test", dir)
	cmd.Env = append(cmd.Env, "PATH=/nonexistent")
	if got := runs(t, cmd); !strings.Contains(got, "install the package fuse3") {
		t.Errorf("%q does not say what to install", got)
	}
	if left := at(t, dir); len(left) > 0 {
		t.Errorf("left mounted: %+v", left)
	}
}
