package extract_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/extract"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// writableACL is a default ACL that lets user 1000 write to what is made in a directory.
func writableACL() []byte {
	acl := []byte{2, 0, 0, 0}
	for _, e := range [][3]uint32{{1, 7, ^uint32(0)}, {2, 7, 1000}, {4, 5, ^uint32(0)}, {16, 7, ^uint32(0)}, {32, 5, ^uint32(0)}} {
		acl = append(acl, byte(e[0]), 0, byte(e[1]), 0, byte(e[2]), byte(e[2]>>8), byte(e[2]>>16), byte(e[2]>>24))
	}
	return acl
}

func force(t *testing.T, im *image.Image, dir string) (extract.Report, error) {
	t.Helper()
	return extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir, Force: true})
}

func inode(t *testing.T, name string) uint64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(name, &st))
	return st.Ino
}

// Whatever is wrong with what is there, it becomes the tree of the image, and nothing outside
// is touched.
func TestForceCorrects(t *testing.T) {
	needRoot(t)
	src := oddTree(t)
	im := build(t, src)
	// Beside the target.
	makeOutside := func(t *testing.T, dir string) {
		t.Helper()
		must(t, os.Mkdir(dir, 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600))
		must(t, os.WriteFile(filepath.Join(dir, "large"), []byte("outside"), 0o600))
		must(t, os.WriteFile(filepath.Join(dir, "same"), []byte("#!"), 0o600))
	}
	replace := func(t *testing.T, name string, with func() error) {
		t.Helper()
		must(t, os.RemoveAll(name))
		must(t, with())
	}
	for _, test := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		// rewritten is how many of the five files are not reused.
		rewritten int64
	}{
		{"nothing", func(*testing.T, string) {}, 0},
		{"everything missing", func(t *testing.T, dir string) {
			must(t, os.RemoveAll(dir))
			must(t, os.Mkdir(dir, 0o755))
		}, 5},
		{"the target missing", func(t *testing.T, dir string) { must(t, os.RemoveAll(dir)) }, 5},
		{"other content of the same size and time", func(t *testing.T, dir string) {
			name := filepath.Join(dir, "large")
			var st unix.Stat_t
			must(t, unix.Stat(name, &st))
			f, err := os.OpenFile(name, os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt([]byte("X"), 500_000)
			must(t, errors.Join(err, f.Close()))
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, name, []unix.Timespec{st.Atim, st.Mtim}, 0))
		}, 1},
		{"half-written", func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, "large"), 1000)) }, 1},
		{"too long", func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, "large"), 1<<20)) }, 1},
		{"mode", func(t *testing.T, dir string) { must(t, os.Chmod(filepath.Join(dir, "large"), 0)) }, 0},
		{"attributes too many", func(t *testing.T, dir string) {
			must(t, unix.Setxattr(filepath.Join(dir, "large"), "user.other", []byte("x"), 0))
			must(t, unix.Setxattr(filepath.Join(dir, "large"), "user.a", []byte("other"), 0))
			must(t, unix.Setxattr(filepath.Join(dir, "ro"), "user.other", []byte("x"), 0))
			must(t, unix.Lsetxattr(filepath.Join(dir, "link"), "trusted.other", []byte("x"), 0))
		}, 0},
		{"attributes missing", func(t *testing.T, dir string) {
			must(t, unix.Removexattr(filepath.Join(dir, "large"), "user.a"))
			must(t, unix.Lremovexattr(filepath.Join(dir, "link"), "trusted.t"))
		}, 0},
		{"privileges too many", func(t *testing.T, dir string) {
			must(t, unix.Setxattr(filepath.Join(dir, "large"), "security.capability", capability(), 0))
			must(t, os.Chmod(filepath.Join(dir, "large"), 0o755|os.ModeSetuid|os.ModeSetgid))
		}, 0},
		// What is to get privileges is written anew.
		{"privileges missing", func(t *testing.T, dir string) {
			must(t, os.Chown(filepath.Join(dir, "cap"), 7, 8)) // clears them
			must(t, os.Chown(filepath.Join(dir, "suid"), 0, 0))
		}, 2},
		// Its owner could have it open.
		{"file of another user", func(t *testing.T, dir string) { must(t, os.Chown(filepath.Join(dir, "large"), 1000, 1000)) }, 1},
		{"file that others may write to", func(t *testing.T, dir string) { must(t, os.Chmod(filepath.Join(dir, "large"), 0o666)) }, 1},
		{"hard link to outside", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "suid"), func() error {
				return os.Link(filepath.Join(dir, "..", "outside", "same"), filepath.Join(dir, "suid"))
			})
		}, 1},
		{"hard link to outside under all names", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "z"), func() error { return os.Link(filepath.Join(dir, "..", "outside", "f"), filepath.Join(dir, "z")) })
			replace(t, filepath.Join(dir, "ro", "sub", "f"), func() error { return os.Link(filepath.Join(dir, "z"), filepath.Join(dir, "ro", "sub", "f")) })
		}, 1},
		{"symlink to a file outside", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "large"), func() error {
				return os.Symlink(filepath.Join(dir, "..", "outside", "large"), filepath.Join(dir, "large"))
			})
		}, 1},
		{"symlink to a directory outside", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "d"), func() error { return os.Symlink(filepath.Join(dir, "..", "outside"), filepath.Join(dir, "d")) })
		}, 1},
		{"relative symlink up", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "d"), func() error { return os.Symlink("../outside", filepath.Join(dir, "d")) })
		}, 1},
		{"file for a directory", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "ro"), func() error { return os.WriteFile(filepath.Join(dir, "ro"), nil, 0o600) })
		}, 1},
		{"directory for a file", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "large"), func() error { return os.Mkdir(filepath.Join(dir, "large"), 0o755) })
		}, 1},
		{"directory for a symlink and for a second name", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "link"), func() error { return os.Mkdir(filepath.Join(dir, "link"), 0o755) })
			replace(t, filepath.Join(dir, "z"), func() error { return os.Mkdir(filepath.Join(dir, "z"), 0o755) })
		}, 0},
		{"fifo for a file and a file for a fifo", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "large"), func() error { return unix.Mkfifo(filepath.Join(dir, "large"), 0o600) })
			replace(t, filepath.Join(dir, "fifo"), func() error { return os.WriteFile(filepath.Join(dir, "fifo"), []byte("x"), 0o640) })
		}, 1},
		{"another device", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "null"), func() error {
				return unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5)))
			})
		}, 0},
		{"another target", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "link"), func() error { return os.Symlink("nowhere else", filepath.Join(dir, "link")) })
		}, 0},
		{"hard link missing", func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, "z"))) }, 0},
		{"first name missing", func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "ro", "sub", "f")))
			must(t, os.Remove(filepath.Join(dir, "fifo")))
		}, 1},
		{"hard link broken", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "z"), func() error { return os.WriteFile(filepath.Join(dir, "z"), []byte("x"), 0o444) })
			replace(t, filepath.Join(dir, "link2"), func() error { return os.Symlink("nowhere", filepath.Join(dir, "link2")) })
		}, 0},
		{"hard link too many", func(t *testing.T, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, "d", "f"), []byte("x"), 0o444))
			replace(t, filepath.Join(dir, "d", "f"), func() error { return os.Link(filepath.Join(dir, "z"), filepath.Join(dir, "d", "f")) })
		}, 1},
		{"directories without permissions", func(t *testing.T, dir string) {
			must(t, os.Chmod(filepath.Join(dir, "ro", "sub"), 0))
			must(t, os.Chmod(filepath.Join(dir, "ro"), 0))
			must(t, os.Chmod(dir, 0))
		}, 0},
		{"directories of others", func(t *testing.T, dir string) {
			must(t, os.Chown(filepath.Join(dir, "ro"), 1000, 1000))
			must(t, os.Chmod(filepath.Join(dir, "ro"), 0o777))
			must(t, os.Chown(dir, 1000, 1000))
			must(t, os.Chmod(dir, 0o777|os.ModeSticky))
		}, 0},
		{"inherited permissions", func(t *testing.T, dir string) {
			replace(t, filepath.Join(dir, "d"), func() error { return os.Mkdir(filepath.Join(dir, "d"), 0o755) })
			must(t, unix.Setxattr(filepath.Join(dir, "d"), "system.posix_acl_default", writableACL(), 0))
			must(t, unix.Setxattr(dir, "system.posix_acl_default", writableACL(), 0))
			must(t, os.Remove(filepath.Join(dir, "large")))
		}, 2},
		{"what a killed extraction leaves", func(t *testing.T, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, "d", ".puzzlefs-extract-ABCDEFGHIJKLMNOPQRSTUVWXYZ"), []byte("half"), 0o600))
			must(t, os.Symlink(filepath.Join(dir, "..", "outside"), filepath.Join(dir, ".puzzlefs-extract-234567ABCDEFGHIJKLMNOPQRST")))
			must(t, os.Link(filepath.Join(dir, "z"), filepath.Join(dir, ".puzzlefs-extract-ZZZZZZABCDEFGHIJKLMNOPQRST")))
		}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			base := t.TempDir()
			dir := filepath.Join(base, "dir")
			for _, name := range []string{"outside", "untouched"} {
				makeOutside(t, filepath.Join(base, name))
			}
			_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir})
			must(t, err)
			test.damage(t, dir)
			// With one worker names are dealt with in their order.
			report, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir, Force: true, Workers: 1})
			must(t, err)
			sameTree(t, src, dir)
			sameTree(t, filepath.Join(base, "untouched"), filepath.Join(base, "outside"))
			if report.Files != 5 || report.Bytes != 640_008 || report.ReusedFiles != 5-test.rewritten {
				t.Errorf("report %+v, want 5 files of 640008 bytes, %d reused", report, 5-test.rewritten)
			}
			if again, err := force(t, im, dir); err != nil || again.ReusedFiles != 5 || again.ReusedBytes != 640_008 {
				t.Errorf("again: report %+v, error %v; want everything reused", again, err)
			}
		})
	}
}

// What is right stays: not a new file with the same content, but the same one.
func TestForceKeepsInodes(t *testing.T) {
	needRoot(t)
	src := oddTree(t)
	im := build(t, src)
	dir := filepath.Join(t.TempDir(), "dir")
	_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir})
	must(t, err)
	must(t, os.Chmod(filepath.Join(dir, "large"), 0o644))
	names, err := testtree.FromDir(dir)
	must(t, err)
	before := make(map[string]uint64)
	for _, e := range names {
		before[e.Path] = inode(t, dir+e.Path)
	}
	_, err = force(t, im, dir)
	must(t, err)
	sameTree(t, src, dir)
	for path, ino := range before {
		if got := inode(t, dir+path); got != ino {
			t.Errorf("%s is another inode than before", path)
		}
	}
}

// What the image does not have is named, before anything is changed.
func TestForceRefuses(t *testing.T) {
	needRoot(t)
	im := build(t, oddTree(t))
	for _, test := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		want   error
		text   string
	}{
		{"one name", func(t *testing.T, dir string) { must(t, os.WriteFile(filepath.Join(dir, "d", "mine"), nil, 0o600)) }, extract.ErrStray, ": d/mine: "},
		{"many names", func(t *testing.T, dir string) {
			for i := range 9 {
				must(t, os.WriteFile(filepath.Join(dir, strings.Repeat("m", i+1)), nil, 0o600))
			}
		}, extract.ErrStray, " and 4 more: "},
		{"a full directory for a file", func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, "large")))
			must(t, os.Mkdir(filepath.Join(dir, "large"), 0o755))
			must(t, os.WriteFile(filepath.Join(dir, "large", "mine"), nil, 0o600))
		}, extract.ErrStray, ": large/mine: "},
		{"almost a temporary name", func(t *testing.T, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, ".puzzlefs-extract-notes"), nil, 0o600))
		}, extract.ErrStray, "-notes: "},
		{"a mounted directory", func(t *testing.T, dir string) {
			must(t, unix.Mount("none", filepath.Join(dir, "d"), "tmpfs", 0, ""))
			t.Cleanup(func() { _ = unix.Unmount(filepath.Join(dir, "d"), unix.MNT_DETACH) })
		}, extract.ErrMount, "/d: "},
		{"a mounted file", func(t *testing.T, dir string) {
			must(t, unix.Mount("/proc/version", filepath.Join(dir, "large"), "", unix.MS_BIND, ""))
			t.Cleanup(func() { _ = unix.Unmount(filepath.Join(dir, "large"), unix.MNT_DETACH) })
		}, extract.ErrMount, "/large: "},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "dir")
			_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir})
			must(t, err)
			must(t, os.Remove(filepath.Join(dir, "z")))
			must(t, os.Chown(filepath.Join(dir, "ro"), 1000, 1000))
			test.damage(t, dir)
			before, err := testtree.FromDir(dir)
			if test.name != "a mounted file" { // whose size is not what it says
				must(t, err)
			}
			_, err = force(t, im, dir)
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("error %v, want %v with %q", err, test.want, test.text)
			}
			if after, _ := testtree.FromDir(dir); testtree.Diff(before, after) != "" {
				t.Errorf("changed: %s", testtree.Diff(before, after))
			}
		})
	}
}

// Nobody else can write to a directory while there is work to do in it, and when that fails the
// directory is as it was.
func TestForceTakesDirectories(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "dir")
	must(t, os.MkdirAll(filepath.Join(dir, "d"), 0o755))
	for _, name := range []string{dir, filepath.Join(dir, "d")} {
		must(t, unix.Setxattr(name, "system.posix_acl_default", writableACL(), 0))
		must(t, os.Chown(name, 1000, 1001))
		must(t, os.Chmod(name, 0o777|os.ModeSticky))
	}
	before, err := testtree.FromDir(dir)
	must(t, err)
	looked := 0
	_, err = extract.Extract(t.Context(), extract.Config{Image: build(t, oddTree(t)), Dir: dir, Force: true, Workers: 1, Fault: func(step extract.Step) error {
		switch step {
		case extract.StepFileWritten:
			looked++
			var st unix.Stat_t
			must(t, unix.Stat(dir, &st))
			if st.Uid != 0 || st.Mode&0o022 != 0 {
				t.Errorf("during the extraction the directory has owner %d, mode %o", st.Uid, st.Mode)
			}
		case extract.StepDirFinished:
			return errors.New("failure")
		default:
		}
		return nil
	}})
	if err == nil || looked == 0 {
		t.Fatalf("error %v after %d looks", err, looked)
	}
	after, err := testtree.FromDir(dir)
	must(t, err)
	if diff := testtree.Diff(before[:1], after[:1]); diff != "" {
		t.Error(diff)
	}
}

func TestForceTakesTurns(t *testing.T) {
	needRoot(t)
	im := build(t, oddTree(t))
	dir := filepath.Join(t.TempDir(), "dir")
	_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir, Force: true, Fault: func(step extract.Step) error {
		if step == extract.StepSurveyed {
			if _, err := force(t, im, dir); !errors.Is(err, extract.ErrBusy) {
				t.Errorf("error %v, want ErrBusy", err)
			}
		}
		return nil
	}})
	must(t, err)
}

// Flags that chattr sets.
const (
	immutable  = 0x10
	appendOnly = 0x20
)

func setFlags(name string, flags int) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	others, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return err
	}
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, others&^(immutable|appendOnly)|flags)
}

func TestForceImmutable(t *testing.T) {
	needRoot(t)
	src := oddTree(t)
	im := build(t, src)
	dir := filepath.Join(t.TempDir(), "dir")
	_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir})
	must(t, err)
	large := filepath.Join(dir, "large")
	if err := setFlags(large, immutable); errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("the file system of %s has no immutable files: %v", dir, err)
	} else if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = setFlags(large, 0) }()
	if report, err := force(t, im, dir); err != nil || report.ReusedFiles != 5 {
		t.Errorf("an immutable file that is right: report %+v, error %v", report, err)
	}
	for _, flags := range []int{immutable, appendOnly} {
		must(t, setFlags(large, 0))
		must(t, os.WriteFile(large, []byte("mine"), 0o600))
		must(t, setFlags(large, flags))
		if _, err := force(t, im, dir); !errors.Is(err, extract.ErrImmutable) || !strings.Contains(err.Error(), large) {
			t.Errorf("flags %#x: error %v, want ErrImmutable for %s", flags, err, large)
		}
		if b, err := os.ReadFile(large); string(b) != "mine" {
			t.Errorf("the file became %q (%v)", b, err)
		}
	}
	must(t, setFlags(large, 0))
	_, err = force(t, im, dir)
	must(t, err)
	sameTree(t, src, dir)
	// A directory, too.
	ro := filepath.Join(dir, "d")
	must(t, os.Chmod(ro, 0o755))
	must(t, setFlags(ro, immutable))
	defer func() { _ = setFlags(ro, 0) }()
	if _, err := force(t, im, dir); !errors.Is(err, extract.ErrImmutable) {
		t.Errorf("an immutable directory: error %v, want ErrImmutable", err)
	}
}

// Attributes that no file system has room for are an error, and no half-made file is left.
func TestTooManyXattrs(t *testing.T) {
	needRoot(t)
	shm, err := os.MkdirTemp("/dev/shm", "extract-")
	must(t, err)
	defer os.RemoveAll(shm)
	src := filepath.Join(shm, "src")
	must(t, os.Mkdir(src, 0o755))
	must(t, os.WriteFile(filepath.Join(src, "f"), []byte("new"), 0o644))
	for _, key := range []string{"trusted.a", "trusted.b", "trusted.c"} {
		must(t, unix.Setxattr(filepath.Join(src, "f"), key, bytes.Repeat([]byte{1}, 60_000), 0))
	}
	im := build(t, src)
	dir := filepath.Join(t.TempDir(), "dir")
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "f"), []byte("old"), 0o644))
	switch _, err = force(t, im, dir); {
	case err == nil: // xfs takes them
		sameTree(t, src, dir)
	case !errors.Is(err, extract.ErrXattrs) || !strings.Contains(err.Error(), filepath.Join(dir, "f")):
		t.Errorf("error %v, want ErrXattrs", err)
	default:
		names, err := os.ReadDir(dir)
		must(t, err)
		if b, _ := os.ReadFile(filepath.Join(dir, "f")); len(names) != 1 || string(b) != "old" {
			t.Errorf("left are %v, with %q", names, b)
		}
	}
	// Large ones in the place of other large ones.
	room := bytes.Repeat([]byte{1}, 2500)
	for _, key := range []string{"trusted.a", "trusted.b", "trusted.c"} {
		must(t, unix.Removexattr(filepath.Join(src, "f"), key))
	}
	must(t, unix.Setxattr(filepath.Join(src, "f"), "trusted.a", room, 0))
	im = build(t, src)
	other := filepath.Join(t.TempDir(), "dir")
	_, err = extract.Extract(t.Context(), extract.Config{Image: im, Dir: other})
	must(t, err)
	must(t, unix.Removexattr(filepath.Join(other, "f"), "trusted.a"))
	must(t, unix.Setxattr(filepath.Join(other, "f"), "trusted.z", room, 0))
	if report, err := force(t, im, other); err != nil || report.ReusedFiles != 1 {
		t.Errorf("report %+v, error %v", report, err)
	}
	sameTree(t, src, other)
}

// Somebody who owns the target moves things about in it and puts symlinks in their place all the
// while. Whatever comes of it, nothing outside is touched.
func TestForceAgainstMovingTargets(t *testing.T) {
	needRoot(t)
	im := build(t, oddTree(t))
	base := t.TempDir()
	must(t, os.Chmod(filepath.Dir(base), 0o755))
	dir, outside := filepath.Join(base, "dir"), filepath.Join(base, "outside")
	must(t, os.MkdirAll(filepath.Join(outside, "sub"), 0o755))
	for _, name := range []string{"f", "large", "sub/f"} {
		must(t, os.WriteFile(filepath.Join(outside, name), []byte("outside"), 0o644))
	}
	want, err := testtree.FromDir(outside)
	must(t, err)
	must(t, os.Mkdir(dir, 0o755))
	attack := `while :; do
		mkdir ro d other; touch ro/f large other/f
		mv ro other2; ln -s ../outside ro; rm -f ro; mv other2 ro
		mv d other3; ln -s "$PWD/../outside" d; rm -f d; mv other3 d
		rm -f large; ln -s ../outside/large large; rm -f large
		mv other/f ro/sub; rm -rf ro d other other2 other3 large
	done`
	cmd := exec.Command("sh", "-c", attack)
	cmd.Dir = dir
	const attacker = 65533
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: attacker, Gid: attacker}, Setpgid: true}
	must(t, os.Chown(dir, attacker, attacker))
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		_ = cmd.Wait()
	})
	done, refused := 0, 0
	for range 150 {
		if _, err := force(t, im, dir); err != nil {
			refused++
		} else {
			done++
		}
		must(t, os.RemoveAll(filepath.Join(dir, "suid")))
		must(t, os.Chown(dir, attacker, attacker))
		must(t, os.Chmod(dir, 0o755))
	}
	got, err := testtree.FromDir(outside)
	must(t, err)
	if diff := testtree.Diff(want, got); diff != "" {
		t.Errorf("outside: %s", diff)
	}
	t.Logf("%d extractions were done, %d refused", done, refused)
}
