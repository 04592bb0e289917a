package testtree

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// FromDir describes the tree at dir, sorted by path. Symlinks are not followed (dir itself may be
// one), mount points are crossed. Files are read whole, as many at a time as there are
// processors, and it is an error when one has another length than its inode says. Every xattr
// that the kernel lists is included.
func FromDir(dir string) ([]Entry, error) {
	paths, err := walk(dir, "/", []string{"/"})
	if err != nil {
		return nil, fmt.Errorf("describe %s: %w", dir, err)
	}
	entries := make([]Entry, len(paths))
	var g errgroup.Group
	workers := runtime.GOMAXPROCS(0)
	for w := range workers {
		g.Go(func() error {
			buf := make([]byte, 256<<10)
			for i := w; i < len(paths); i += workers {
				var err error
				if entries[i], err = describe(dir, paths[i], buf); err != nil {
					return fmt.Errorf("describe %s in %s: %w", paths[i], dir, err)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	Sort(entries)
	return entries, nil
}

// walk appends the paths below the directory at path, relative to dir, to paths.
func walk(dir, path string, paths []string) ([]string, error) {
	children, err := os.ReadDir(realPath(dir, path))
	if err != nil {
		return nil, err
	}
	if path == "/" {
		path = ""
	}
	for _, c := range children {
		p := path + "/" + c.Name()
		paths = append(paths, p)
		if c.IsDir() {
			if paths, err = walk(dir, p, paths); err != nil {
				return nil, err
			}
		}
	}
	return paths, nil
}

// realPath is where the path of an entry is. The root gets a dot, so that it is a directory
// even where dir is a symlink to one.
func realPath(dir, path string) string {
	if path == "/" {
		return dir + "/."
	}
	return dir + path
}

func describe(dir, path string, buf []byte) (Entry, error) {
	name := realPath(dir, path)
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return Entry{}, fmt.Errorf("lstat: %w", err)
	}
	e := Entry{Path: path, Perm: uint16(st.Mode & 0o7777), UID: st.Uid, GID: st.Gid}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Type = Dir
	case unix.S_IFREG:
		e.Type = File
		e.Size = st.Size
		e.Nlink = uint64(st.Nlink) //nolint:unconvert // has 32 bits on arm64
		e.SHA256, err = hashFile(name, st.Size, buf)
	case unix.S_IFLNK:
		e.Type = Symlink
		e.Target, err = os.Readlink(name)
	case unix.S_IFIFO:
		e.Type = Fifo
	case unix.S_IFSOCK:
		e.Type = Socket
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Type = Char
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			e.Type = Block
		}
		e.Major, e.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	default:
		err = fmt.Errorf("mode %o is of no known type", st.Mode)
	}
	if err != nil {
		return Entry{}, err
	}
	e.Xattrs, err = xattrs(name)
	return e, err
}

func hashFile(name string, size int64, buf []byte) (string, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	// The wrapper hides File.WriteTo, which would allocate a buffer of its own each time.
	n, err := io.CopyBuffer(h, struct{ io.Reader }{f}, buf)
	if err != nil {
		return "", err
	}
	if n != size {
		return "", fmt.Errorf("the inode says %d bytes, reading gave %d", size, n)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func xattrs(name string) ([]Xattr, error) {
	list, err := sized(func(b []byte) (int, error) { return unix.Llistxattr(name, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("llistxattr: %w", err)
	}
	var attrs []Xattr
	for key := range bytes.SplitSeq(list, []byte{0}) {
		if len(key) == 0 {
			continue // after the last terminator
		}
		k := string(key)
		value, err := sized(func(b []byte) (int, error) { return unix.Lgetxattr(name, k, b) })
		if errors.Is(err, unix.ENODATA) && strings.HasPrefix(k, "trusted.") {
			continue // FUSE shows the names to everybody, the kernel the values to those who may administer the machine
		}
		if err != nil {
			return nil, fmt.Errorf("lgetxattr %s: %w", k, err)
		}
		attrs = append(attrs, Xattr{Key: k, Value: value})
	}
	slices.SortFunc(attrs, func(a, b Xattr) int { return cmp.Compare(a.Key, b.Key) })
	return attrs, nil
}

// sized calls a system call that says how large its result is when it is given no buffer.
func sized(call func([]byte) (int, error)) ([]byte, error) {
	n, err := call(nil)
	if err != nil || n == 0 {
		return []byte{}, err
	}
	b := make([]byte, n)
	n, err = call(b)
	if err != nil {
		return nil, err
	}
	return b[:n], nil
}
