package extract_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/imagetree"
	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/extract"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// damage does something to one of the names in a tree, and adds no other name.
func damage(t *testing.T, rng *rand.Rand, dir string, paths []string) error {
	t.Helper()
	at := paths[rng.IntN(len(paths))]
	name := filepath.Join(dir, at)
	other := filepath.Join(dir, paths[rng.IntN(len(paths))])
	// Through a symlink that was made before, something would be put where it is no name of
	// the image.
	top, err := os.Open(dir)
	must(t, err)
	defer top.Close()
	fd, err := unix.Openat2(int(top.Fd()), "."+path.Dir(at), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil // what is above it is gone or a symlink
	}
	must(t, unix.Close(fd))
	fi, err := os.Lstat(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil // gone already
	}
	if err != nil {
		return err
	}
	isLink := fi.Mode()&os.ModeSymlink != 0
	replace := func(with func() error) error {
		if name == dir {
			return nil
		}
		return errors.Join(os.RemoveAll(name), with())
	}
	switch rng.IntN(10) {
	case 0:
		return replace(func() error { return nil })
	case 1:
		return replace(func() error { return os.WriteFile(name, []byte("mine"), os.FileMode(rng.IntN(0o1000))) })
	case 2:
		return replace(func() error { return os.Mkdir(name, os.FileMode(rng.IntN(0o1000))) })
	case 3:
		return replace(func() error { return os.Symlink(other, name) })
	case 4:
		return replace(func() error { return unix.Mkfifo(name, uint32(rng.IntN(0o1000))) })
	case 5:
		// Two names of the tree become one inode.
		if fi, err := os.Lstat(other); err != nil || fi.IsDir() || name == other {
			return nil // gone already
		}
		return replace(func() error {
			if err := os.Link(other, name); !errors.Is(err, os.ErrNotExist) {
				return err
			}
			return nil // it was below name
		})
	case 6:
		if isLink {
			return nil
		}
		return unix.Chmod(name, uint32(rng.IntN(0o10000)))
	case 7:
		return os.Lchown(name, rng.IntN(2)*1000, rng.IntN(2)*1000)
	case 8:
		if isLink {
			return nil
		}
		return unix.Setxattr(name, "trusted.damage", []byte("x"), 0)
	default:
		if !fi.Mode().IsRegular() || fi.Size() == 0 {
			return nil
		}
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt([]byte{byte(rng.Uint32())}, rng.Int64N(fi.Size()))
		return errors.Join(err, f.Close())
	}
}

// However a tree was damaged, it becomes that of the image.
func TestForceRepairsAtRandom(t *testing.T) {
	needRoot(t)
	im := open(t, testtree.Golden(t, "images", "v3-master"), "small")
	want, err := imagetree.FromImage(t.Context(), im)
	must(t, err)
	var paths []string
	for _, e := range want {
		paths = append(paths, e.Path)
	}
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 6))
			dir := filepath.Join(t.TempDir(), "dir")
			_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir})
			must(t, err)
			for range 1 + rng.IntN(30) {
				must(t, damage(t, rng, dir, paths))
			}
			_, err = force(t, im, dir)
			must(t, err)
			got, err := testtree.FromDir(dir)
			must(t, err)
			if diff := testtree.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A disk that is full leaves no file half-written, and the same again completes when there is room.
func TestForceResumesOnFullDisk(t *testing.T) {
	needRoot(t)
	src := oddTree(t)
	im := build(t, src)
	dir := t.TempDir()
	must(t, unix.Mount("none", dir, "tmpfs", 0, "size=300k"))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if _, err := force(t, im, dir); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("error %v, want ENOSPC", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "large")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that does not fit: %v, want none", err)
	}
	must(t, unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT, "size=10M"))
	_, err := force(t, im, dir)
	must(t, err)
	sameTree(t, src, dir)
}

// What is to be replaced stays until there is what replaces it: an image that lacks a blob takes
// nothing away.
func TestForceKeepsWhatItCannotReplace(t *testing.T) {
	m := &memory{blobs: make(map[format.Digest][]byte)}
	im := m.open(t, format.InodeVector{dir(1, entry("a", 2), entry("b", 3)), file(2, m.put([]byte("x"))), file(3, format.DigestOf([]byte("y")))})
	target := filepath.Join(t.TempDir(), "out")
	must(t, os.Mkdir(target, 0o700))
	for name, content := range map[string]string{"a": "old", "b": "-"} { // of b the size is right
		must(t, os.WriteFile(filepath.Join(target, name), []byte(content), 0o600))
	}
	if _, err := force(t, im, target); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("error %v, want ErrNotFound", err)
	}
	if b, err := os.ReadFile(filepath.Join(target, "b")); string(b) != "-" {
		t.Errorf("b became %q (%v)", b, err)
	}
	if b, err := os.ReadFile(filepath.Join(target, "a")); string(b) != "old" && string(b) != "x" {
		t.Errorf("a became %q (%v)", b, err)
	}
	m.put([]byte("y"))
	_, err := force(t, im, target)
	must(t, err)
	names, err := os.ReadDir(target)
	must(t, err)
	var list []string
	for _, n := range names {
		list = append(list, n.Name())
	}
	if !slices.Equal(list, []string{"a", "b"}) {
		t.Errorf("names %s, want a and b", strings.Join(list, " "))
	}
}
