package testtree

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// xattrRecord begins the names of the PAX records that hold xattrs.
const xattrRecord = "SCHILY.xattr."

// UnpackTar unpacks the tar file at path into a temporary directory, which goes with the test,
// and returns the root of the tree. Owners, modes, hard links, devices and xattrs are restored,
// times are not. That takes root; without, the test is skipped and says so.
func UnpackTar(t testing.TB, path string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("unpacking %s with its owners and devices takes root", filepath.Base(path))
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := filepath.Join(t.TempDir(), "tree")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Unpack(dir, f); err != nil {
		t.Fatalf("unpack %s: %v", path, err)
	}
	return dir
}

// Golden returns the path of a file in the repository's testdata directory, which is looked for
// from the working directory of the test upwards.
func Golden(t testing.TB, elem ...string) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(elem...)
	for {
		p := filepath.Join(dir, "testdata", name)
		_, err := os.Stat(p)
		if err == nil {
			return p
		}
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatalf("find testdata/%s above the test's directory: %v", name, err)
		}
		dir = up
	}
}

// ReadGolden parses the description of a golden tree: "small", "changed" or "segments".
func ReadGolden(t testing.TB, tree string) []Entry {
	t.Helper()
	f, err := os.Open(Golden(t, tree+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	entries, err := Parse(f)
	if err != nil {
		t.Fatalf("%s: %v", f.Name(), err)
	}
	if len(entries) == 0 {
		t.Fatalf("%s: empty", f.Name())
	}
	return entries
}

// Unpack unpacks a tar stream into the existing directory dir, as UnpackTar does. Names that
// lead out of dir are an error.
func Unpack(dir string, r io.Reader) error {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		if err := unpackEntry(dir, h, tr); err != nil {
			return fmt.Errorf("unpack %q: %w", h.Name, err)
		}
	}
}

func unpackEntry(dir string, h *tar.Header, content io.Reader) error {
	name, err := inside(dir, h.Name)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		old, err := inside(dir, h.Linkname)
		if err != nil {
			return err
		}
		return os.Link(old, name) // owner, mode and xattrs are the first link's
	}
	if err := create(name, h, content); err != nil {
		return err
	}
	if err := os.Lchown(name, h.Uid, h.Gid); err != nil {
		return err
	}
	// After the owner, whose change clears the set-id bits. Linux has no modes for symlinks.
	if h.Typeflag != tar.TypeSymlink {
		if err := unix.Chmod(name, uint32(h.Mode&0o7777)); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	for k, v := range h.PAXRecords {
		if key, ok := strings.CutPrefix(k, xattrRecord); ok {
			if err := unix.Lsetxattr(name, key, []byte(v), 0); err != nil {
				return fmt.Errorf("lsetxattr %s: %w", key, err)
			}
		}
	}
	return nil
}

func create(name string, h *tar.Header, content io.Reader) error {
	device := int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))
	switch h.Typeflag {
	case tar.TypeDir:
		if err := os.Mkdir(name, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		return nil
	case tar.TypeReg:
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, content)
		return errors.Join(err, f.Close())
	case tar.TypeSymlink:
		return os.Symlink(h.Linkname, name)
	case tar.TypeFifo:
		return mknod(name, unix.S_IFIFO, 0)
	case tar.TypeChar:
		return mknod(name, unix.S_IFCHR, device)
	case tar.TypeBlock:
		return mknod(name, unix.S_IFBLK, device)
	default:
		return fmt.Errorf("tar entries of type %q are not known here", h.Typeflag)
	}
}

func mknod(name string, mode uint32, device int) error {
	if err := unix.Mknod(name, mode|0o600, device); err != nil {
		return fmt.Errorf("mknod: %w", err)
	}
	return nil
}

// inside joins dir and a name from the tar.
func inside(dir, name string) (string, error) {
	if !filepath.IsLocal(name) {
		return "", fmt.Errorf("the name %q leads out of the tree", name)
	}
	return filepath.Join(dir, name), nil
}
