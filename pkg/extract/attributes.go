package extract

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// attributes sets owner, extended attributes and mode, in this order: a change of owner
// clears set-id bits and capabilities, and a mode may forbid to set attributes. Of what was there
// already it removes attributes that the image does not give it.
func (x *extractor) attributes(fd int, at place, attr image.Attr, wasThere bool) error {
	if x.isRoot {
		if err := unix.Fchownat(fd, "", int(attr.UID), int(attr.GID), unix.AT_EMPTY_PATH); err != nil {
			return at.error("chown", err)
		}
	}
	if attr.Kind == format.KindSymlink {
		return nil // it has no mode of its own
	}
	access := procPath(fd)
	if wasThere {
		if err := x.dropXattrs(access, at, attr); err != nil {
			return err
		}
	}
	if err := x.setXattrs(unix.Setxattr, access, at, attr); err != nil {
		return err
	}
	if err := unix.Chmod(access, uint32(attr.Perm)); err != nil {
		return at.error("chmod", err)
	}
	return nil
}

// setXattrs sets the extended attributes of what access leads to.
func (x *extractor) setXattrs(set func(string, string, []byte, int) error, access string, at place, attr image.Attr) error {
	xattrs, err := x.cfg.Image.Xattrs(attr.Ino)
	if err != nil {
		return err
	}
	for _, a := range xattrs {
		err := set(access, string(a.Key), a.Val, 0)
		switch {
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.E2BIG), errors.Is(err, unix.ERANGE):
			// ext4 says ENOSPC when it means one file, and not the disk.
			err = fmt.Errorf("%w (%w)", ErrXattrs, err)
		case err != nil:
			err = x.privilege(err)
		}
		if err != nil {
			return at.error("set "+string(a.Key), err)
		}
	}
	return nil
}

// dropXattrs removes the extended attributes that the image does not give.
func (x *extractor) dropXattrs(access string, at place, attr image.Attr) error {
	want, err := x.cfg.Image.Xattrs(attr.Ino)
	if err != nil {
		return err
	}
	keys, err := listXattrs(unix.Listxattr, access)
	if err != nil {
		return at.error("list attributes", err)
	}
	for _, key := range keys {
		if slices.ContainsFunc(want, func(a format.Xattr) bool { return string(a.Key) == key }) {
			continue
		}
		if err := unix.Removexattr(access, key); err != nil && !errors.Is(err, unix.ENODATA) {
			return at.error("remove "+key, x.privilege(err))
		}
	}
	return nil
}

// hasAttributes reports whether what is there has the owner, the mode and the extended
// attributes that it would get.
func (x *extractor) hasAttributes(old *existing, at place, attr image.Attr) (bool, error) {
	link := attr.Kind == format.KindSymlink
	uid := uint32(os.Geteuid())
	if x.isRoot {
		uid = attr.UID
	}
	if old.st.Uid != uid || x.isRoot && old.st.Gid != attr.GID || !link && old.perm() != attr.Perm {
		return false, nil
	}
	want, err := x.cfg.Image.Xattrs(attr.Ino)
	if err != nil {
		return false, err
	}
	list, get, path := unix.Listxattr, unix.Getxattr, old.path()
	if link {
		list, get, path = unix.Llistxattr, unix.Lgetxattr, procPath(int(at.parent.f.Fd()))+"/"+at.name
	}
	keys, err := listXattrs(list, path)
	if err != nil {
		return false, at.error("list attributes", err)
	}
	if len(keys) > len(want) {
		return false, nil
	}
	for _, a := range want {
		value, err := readXattrBy(get, path, string(a.Key))
		if err != nil {
			return false, at.error("get "+string(a.Key), err)
		}
		if value == nil || !bytes.Equal(value, a.Val) {
			return false, nil
		}
	}
	// All that are wanted are there, so that none more may be.
	return !slices.ContainsFunc(keys, func(key string) bool {
		return !slices.ContainsFunc(want, func(a format.Xattr) bool { return string(a.Key) == key })
	}), nil
}

// privileged reports whether a file gives privileges to who runs it.
func (x *extractor) privileged(attr image.Attr) (bool, error) {
	if attr.Perm&0o6000 != 0 {
		return true, nil
	}
	xattrs, err := x.cfg.Image.Xattrs(attr.Ino)
	return slices.ContainsFunc(xattrs, func(a format.Xattr) bool { return string(a.Key) == capability }), err
}

const capability = "security.capability"

// listXattrs returns the names of the extended attributes that are an image's business. Labels
// under security. are the machine's, which gives them to every file, but for capabilities.
func listXattrs(list func(string, []byte) (int, error), path string) ([]string, error) {
	b, err := sized(func(b []byte) (int, error) { return list(path, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var keys []string
	for key := range strings.SplitSeq(string(b), "\x00") {
		if key != "" && (key == capability || !strings.HasPrefix(key, "security.")) {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// readXattr returns the value of an extended attribute, or nil if there is none.
func readXattr(path, key string) ([]byte, error) { return readXattrBy(unix.Getxattr, path, key) }

func readXattrBy(get func(string, string, []byte) (int, error), path, key string) ([]byte, error) {
	b, err := sized(func(b []byte) (int, error) { return get(path, key, b) })
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	return b, err
}

// sized calls a system call that says how large its result is when it is given no buffer, again
// when that grew meanwhile.
func sized(call func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := call(nil)
		if err != nil || n == 0 {
			return []byte{}, err
		}
		b := make([]byte, n)
		n, err = call(b)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return b[:n], nil
	}
}

// privilege explains a refusal.
func (x *extractor) privilege(err error) error {
	if !x.isRoot && errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w (%w)", ErrPrivilege, err)
	}
	return err
}
