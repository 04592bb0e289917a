package builder

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// procPath returns a path to what a descriptor is open on. A name appended to it reaches a
// directory's child without the length limit of the path from the root.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// xattrsOf says how to get at the extended attributes of a file, as the system calls do.
type xattrsOf struct {
	list func(buf []byte) (int, error)
	get  func(name string, buf []byte) (int, error)
}

// namedXattrs are those of what has a path, which may be a symlink.
func namedXattrs(path string) xattrsOf {
	return xattrsOf{
		func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) },
		func(name string, buf []byte) (int, error) { return unix.Lgetxattr(path, name, buf) },
	}
}

// openXattrs are those of what a descriptor is open on.
func openXattrs(fd int) xattrsOf {
	return xattrsOf{
		func(buf []byte) (int, error) { return unix.Flistxattr(fd, buf) },
		func(name string, buf []byte) (int, error) { return unix.Fgetxattr(fd, name, buf) },
	}
}

// readXattrs returns extended attributes, sorted by name.
func readXattrs(of xattrsOf) ([]format.Xattr, error) {
	names, err := readSized(of.list)
	if errors.Is(err, unix.EOPNOTSUPP) || len(names) == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var xattrs []format.Xattr
	for name := range bytes.SplitSeq(bytes.TrimSuffix(names, []byte{0}), []byte{0}) {
		val, err := readSized(func(buf []byte) (int, error) { return of.get(string(name), buf) })
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		xattrs = append(xattrs, format.Xattr{Key: name, Val: val})
	}
	slices.SortFunc(xattrs, func(a, b format.Xattr) int { return bytes.Compare(a.Key, b.Key) })
	return xattrs, nil
}

// readSized calls a system call that fills a buffer, asking for the size first and again
// if that changes in between. The result is empty but not nil where there is nothing.
func readSized(call func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := call(nil)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return []byte{}, nil
		}
		buf := make([]byte, n)
		n, err = call(buf)
		if err == nil {
			return buf[:n], nil
		}
		if !errors.Is(err, unix.ERANGE) {
			return nil, err
		}
	}
}

// readlink returns the target of the symlink at path.
func readlink(path string) ([]byte, error) {
	buf := make([]byte, format.MaxSymlinkLen+1)
	n, err := unix.Readlink(path, buf)
	if err != nil {
		return nil, err
	}
	return slices.Clone(buf[:n]), nil
}
