package overlay_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/overlay"
)

// What is mounted is found again, whatever the directories are called, by either way to tell
// the kernel.
func TestMountAndFind(t *testing.T) {
	long := strings.Repeat("long", 60)
	for name, test := range map[string]struct {
		dir    string
		mount  func(overlay.Config) (*overlay.Overlay, error)
		refuse string
	}{
		"plain":               {"plain", overlay.Mount, ""},
		"commas and colons":   {"a,b:c=d", overlay.Mount, ""},
		"spaces and octal":    {"a b\t\\054#\nc\\", overlay.Mount, ""},
		"long":                {filepath.Join(long, long, long), overlay.Mount, ""},
		"by name":             {"plain", overlay.MountByName, ""},
		"by name, colons":     {"a,b:c=d e::f", overlay.MountByName, ""},
		"by name, backslash":  {`a\b`, overlay.MountByName, "Linux 6.13"},
		"by name, long":       {filepath.Join(long, long), overlay.MountByName, "Linux 6.13"},
		"white space of Unix": {"a\u00a0b", overlay.Mount, "white space"},
		"quotes":              {`a"b`, overlay.Mount, "quotes"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := place(t, test.dir)
			d, undo, err := overlay.MakeDirs(dir, "")
			var o *overlay.Overlay
			if err == nil {
				write(t, filepath.Join(d.Lower, "file"), "lower")
				o, err = test.mount(overlay.Config{Dirs: d})
			}
			if test.refuse != "" {
				if err == nil || !strings.Contains(err.Error(), test.refuse) {
					t.Errorf("got %v, want a refusal with %q", err, test.refuse)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want(t, filepath.Join(dir, "file"), "lower")
			expected := &overlay.Overlay{
				Dir: dir, Lower: []string{dir + "/ro"}, Upper: dir + "/upper", Work: dir + "/work", Source: "puzzlefs",
			}
			found, err := overlay.Find(dir)
			if err != nil {
				t.Fatal(err)
			}
			for which, got := range map[string]*overlay.Overlay{"mounted": o, "found": found} {
				if diff := cmp.Diff(expected, got, cmpopts.IgnoreUnexported(overlay.Overlay{})); diff != "" {
					t.Errorf("%s (-want +got):\n%s", which, diff)
				}
			}
			if !found.Ours() {
				t.Error("it is not known as ours")
			}
			if err := found.Unmount(false); err != nil {
				t.Error(err)
			}
			if _, err := overlay.Find(dir); !errors.Is(err, overlay.ErrNotMounted) {
				t.Errorf("found after unmounting: %v", err)
			}
			if err := found.Unmount(false); err != nil {
				t.Errorf("unmount again: %v", err)
			}
			// The directories stay until they are asked to go, and what is in them stays then.
			if err := undo(); err != nil {
				t.Error(err)
			}
			if got := names(t, dir); got != "[ro]" {
				t.Errorf("left is %s, want only ro, which has a file", got)
			}
		})
	}
}

func TestSplitLower(t *testing.T) {
	for list, want := range map[string][]string{
		"/a":            {"/a"},
		"/a:/b":         {"/a", "/b"},
		`/a\:b:/c\\d`:   {"/a:b", `/c\d`},
		"/a:/b::/data1": {"/a", "/b", "/data1"},
		`/a\`:           {`/a\`},
		"":              nil,
	} {
		if got := overlay.SplitLower(list); !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", list, got, want)
		}
	}
}

// TestFlags: the table of mounts shows what was asked for.
func TestFlags(t *testing.T) {
	for name, test := range map[string]struct {
		cfg  overlay.Config
		want string
	}{
		"default": {overlay.Config{}, "nodev nosuid"},
		"all":     {overlay.Config{Dev: true, Suid: true, NoExec: true, NoAtime: true}, "noatime noexec"},
	} {
		t.Run(name, func(t *testing.T) {
			test.cfg.Dirs = makeDirs(t, place(t, "mnt"), "")
			o := mount(t, test.cfg)
			table, err := mountinfo.Read(mountinfo.Self)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, option := range table.At(o.Dir)[0].Options {
				if slices.Contains([]string{"nodev", "nosuid", "noexec", "noatime"}, option) {
					got = append(got, option)
				}
			}
			slices.Sort(got)
			if text := strings.Join(got, " "); text != test.want {
				t.Errorf("options %s, want %s", text, test.want)
			}
		})
	}
}

// Somebody else's overlay is left alone.
func TestForeign(t *testing.T) {
	dir := place(t, "mnt")
	for _, name := range []string{"ro", "upper", "work", "other"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct{ source, options string }{
		"another source": {"overlay", "lowerdir=DIR/ro,upperdir=DIR/upper,workdir=DIR/work"},
		"another lower":  {"puzzlefs", "lowerdir=DIR/other,upperdir=DIR/upper,workdir=DIR/work"},
		"two lowers":     {"puzzlefs", "lowerdir=DIR/ro:DIR/other"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := unix.Mount(test.source, dir, "overlay", 0, strings.ReplaceAll(test.options, "DIR", dir)); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			}()
			o, err := overlay.Find(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := o.Unmount(true); o.Ours() || !errors.Is(err, overlay.ErrForeign) {
				t.Errorf("ours: %t; unmount: %v, want ErrForeign", o.Ours(), err)
			}
			if _, _, err := overlay.MakeDirs(dir, ""); !errors.Is(err, overlay.ErrMounted) {
				t.Errorf("directories on top of it: %v, want ErrMounted", err)
			}
		})
	}
	if _, err := overlay.Find(filepath.Join(dir, "ro")); !errors.Is(err, overlay.ErrNotMounted) {
		t.Errorf("found where nothing is mounted: %v", err)
	}
	if _, err := overlay.Find("/proc"); !errors.Is(err, overlay.ErrNotMounted) || !strings.Contains(err.Error(), "type proc") {
		t.Errorf("found where something else is mounted: %v", err)
	}
}

// An overlay in use stays, unless it is unmounted lazily.
func TestBusy(t *testing.T) {
	o := mount(t, overlay.Config{Dirs: makeDirs(t, place(t, "mnt"), "")})
	f, err := os.Create(filepath.Join(o.Dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := o.Unmount(false); !errors.Is(err, overlay.ErrBusy) {
		t.Errorf("got %v, want ErrBusy", err)
	}
	if err := o.Unmount(true); err != nil {
		t.Error(err)
	}
	if _, err := f.WriteString("more"); err != nil {
		t.Errorf("the user of a lazily unmounted overlay: %v", err)
	}
	want(t, filepath.Join(o.Upper, "file"), "more")
}

// What lies on top of an overlay is not unmounted in its place.
func TestCovered(t *testing.T) {
	o := mount(t, overlay.Config{Dirs: makeDirs(t, place(t, "mnt"), "")})
	if err := unix.Mount("cover", o.Dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := o.Unmount(true); err == nil || !strings.Contains(err.Error(), "cover, type tmpfs") {
		t.Errorf("got %v, want what lies on top", err)
	}
	if err := unix.Unmount(o.Dir, 0); err != nil {
		t.Fatal(err)
	}
}

// Two overlays must not write to the same directories.
func TestUpperInUse(t *testing.T) {
	upper := filepath.Join(place(t, "data"), "upper")
	o := mount(t, overlay.Config{Dirs: makeDirs(t, place(t, "mnt"), upper)})
	_, _, err := overlay.MakeDirs(place(t, "other"), upper)
	if !errors.Is(err, overlay.ErrMounted) || !strings.Contains(err.Error(), o.Dir) {
		t.Errorf("got %v, want ErrMounted and where", err)
	}
}

// Wait returns when the overlay is unmounted by whomever, or the context is done.
func TestWait(t *testing.T) {
	o := mount(t, overlay.Config{Dirs: makeDirs(t, place(t, "mnt"), "")})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- o.Wait(ctx) }()
	// Another change of the table does not end it.
	if err := unix.Mount("cover", o.Dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(o.Dir, 0); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		t.Fatalf("it ended: %v", err)
	default:
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that the context is done", err)
	}
	go func() { done <- o.Wait(context.Background()) }()
	if err := unix.Unmount(o.Dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
