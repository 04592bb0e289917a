package driver_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
)

// tmpfs mounts a tmpfs for a test, optionally with shared propagation as in a cluster.
func tmpfs(t *testing.T, shared bool) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatalf("mount tmpfs (this test needs root): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if shared {
		if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestBind(t *testing.T) {
	for name, bind := range map[string]func(from, subPath, to string) error{"tree": driver.Bind, "classic": driver.BindClassic} {
		for _, shared := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				source, parent := tmpfs(t, shared), tmpfs(t, shared)
				if err := os.MkdirAll(filepath.Join(source, "a/b"), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(source, "a/b/f"), []byte("x"), 0o644); err != nil {
					t.Fatal(err)
				}
				target := filepath.Join(parent, "with space")
				if err := os.Mkdir(target, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := bind(source, "a/b", target); err != nil {
					t.Fatal(err)
				}
				if b, err := os.ReadFile(filepath.Join(target, "f")); err != nil || string(b) != "x" {
					t.Errorf("read through the bind: %q, %v", b, err)
				}
				if err := os.WriteFile(filepath.Join(target, "f"), nil, 0o644); !errors.Is(err, unix.EROFS) {
					t.Errorf("write through the bind: %v, want EROFS", err)
				}
				var st unix.Statfs_t
				if err := unix.Statfs(target, &st); err != nil {
					t.Fatal(err)
				}
				if want := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC); st.Flags&want != want {
					t.Errorf("flags are %#x, want %#x in them", st.Flags, want)
				}
				// The source stays writable.
				if err := os.WriteFile(filepath.Join(source, "g"), nil, 0o644); err != nil {
					t.Error(err)
				}
				if err := unix.Unmount(target, 0); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestBindStaysBeneath: no path leads out of the source, whatever symlinks are in it.
func TestBindStaysBeneath(t *testing.T) {
	source := tmpfs(t, false)
	if err := os.MkdirAll(filepath.Join(source, "dir/sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"up": "..", "out": "/etc", "same": "dir", "proc": "/proc/self/root"} {
		if err := os.Symlink(to, filepath.Join(source, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(source, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	target := t.TempDir()
	for _, subPath := range []string{"..", "dir/../..", "up", "up/etc", "out", "same", "same/sub", "proc/etc", "file", "missing", "/etc"} {
		if err := driver.Bind(source, subPath, target); err == nil {
			t.Errorf("bind of %q succeeded", subPath)
			if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestDetachAllLeavesOthers: only our mounts are unmounted.
func TestDetachAllLeavesOthers(t *testing.T) {
	dir := tmpfs(t, false)
	if err := driver.DetachAll(dir); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || !strings.Contains(string(b), dir) {
		t.Errorf("somebody else's mount at %s is gone (%v)", dir, err)
	}
}

func TestRemoveTarget(t *testing.T) {
	dir := t.TempDir()
	write := func(name string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	mkdir := func(name string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mkdir("empty")
	mkdir("full")
	write("full/precious")
	write("file")
	if err := os.Symlink("full", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name     string
		ok, gone bool
	}{
		{"empty", true, true},
		{"file", true, true},
		{"missing", true, true},
		{"no/parent", true, true},
		{"full", false, false},
		{"link", false, false},
		{"full/precious/below", true, true},
	}
	for _, tt := range tests {
		path := filepath.Join(dir, tt.name)
		if err := driver.RemoveTarget(path); (err == nil) != tt.ok {
			t.Errorf("%s: got %v, want ok %t", tt.name, err, tt.ok)
		}
		if _, err := os.Lstat(path); (err != nil) != tt.gone {
			t.Errorf("%s: afterwards: %v, want gone %t", tt.name, err, tt.gone)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "full/precious")); err != nil {
		t.Error(err)
	}
}
