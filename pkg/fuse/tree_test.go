package fuse_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// TestGolden mounts what the reference made, and looks at every path.
func TestGolden(t *testing.T) {
	for _, layout := range []string{"v1-git", "v2-0.1.0", "v3-0.2.0", "v3-master"} {
		for tag, tree := range map[string]string{"small": "small", "changed": "changed", "small-zstd": "small", "segments": "segments"} {
			t.Run(layout+"/"+tag, func(t *testing.T) {
				_, dir := mount(t, golden(t, layout, tag))
				got, err := testtree.FromDir(dir)
				if err != nil {
					t.Fatal(err)
				}
				if d := testtree.Diff(testtree.ReadGolden(t, tree), got); d != "" {
					t.Error(d)
				}
			})
		}
	}
}

// TestBuilt builds, mounts and compares a tree with what the golden ones lack.
func TestBuilt(t *testing.T) {
	needRoot(t)
	dir := tree(t, map[string]string{"file": "content", "setgid": "x", "d/": "", "d/\xff\xfe": "not UTF-8", "d/" + strings.Repeat("n", 255): "long name"})
	socket, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "socket"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	socket.SetUnlinkOnClose(false)
	if err := socket.Close(); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(dir, "large")
	for what, err := range map[string]error{
		"mode":   os.Chmod(filepath.Join(dir, "setgid"), os.ModeSetgid|0o755),
		"owner":  os.Lchown(filepath.Join(dir, "file"), 4_000_000_000, 65534),
		"link":   os.Symlink(strings.Repeat("x", 4095), filepath.Join(dir, "longlink")),
		"fifo":   unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600),
		"device": unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		"xattr":  unix.Lsetxattr(filepath.Join(dir, "file"), "user.large", []byte(strings.Repeat("v", 3000)), 0),
		"large":  os.WriteFile(large, []byte(strings.Repeat("0123456789abcdef", 200_000)), 0o644),
		"hole":   os.Truncate(large, 5_000_000),
	} {
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	want, err := testtree.FromDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, root := build(t, dir)
	_, mnt := mount(t, openImage(t, s, root))
	got, err := testtree.FromDir(mnt)
	if err != nil {
		t.Fatal(err)
	}
	if d := testtree.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// awkward is an image of what no file system of this machine would hold.
func awkward(t testing.TB) *image.Image {
	m := &memory{}
	return m.image(t, format.InodeVector{
		{Ino: 1, Kind: format.KindDir, Perm: 0o755, Entries: append(entries(2, "a", "b", "blk", "sub"), entries(2, "hard")...)},
		{Ino: 2, Kind: format.KindFile, Perm: 0o640, UID: 7, GID: 8, Chunks: m.add(make([]byte, 5000))},
		{Ino: 3, Kind: format.KindFile, Perm: 0o4755},
		{Ino: 4, Kind: format.KindBlk, Perm: 0o600, Major: 4095, Minor: 1<<20 - 1},
		{Ino: 5, Kind: format.KindDir, Perm: 0o1777, Entries: entries(1<<62, "deep")},
		{Ino: 1 << 62, Kind: format.KindDir, Perm: 0o700},
	})
}

// stat is what the kernel says, less what depends on the machine.
type stat struct {
	Ino, Nlink, Rdev     uint64
	Mode, UID, GID       uint32
	Size, Blocks, Blksiz int64
	Times                [3]unix.Timespec
}

func lstat(t *testing.T, path string) stat {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return stat{
		Ino: st.Ino, Nlink: uint64(st.Nlink), Rdev: st.Rdev, //nolint:unconvert // Nlink has 32 bits on arm64
		Mode: st.Mode, UID: st.Uid, GID: st.Gid,
		Size: st.Size, Blocks: st.Blocks, Blksiz: int64(st.Blksize), //nolint:unconvert // 32 bits on arm64
		Times: [3]unix.Timespec{st.Atim, st.Mtim, st.Ctim},
	}
}

func TestStat(t *testing.T) {
	_, dir := mount(t, awkward(t))
	for path, want := range map[string]stat{
		"":         {Ino: 1, Nlink: 3, Mode: unix.S_IFDIR | 0o755},
		"a":        {Ino: 2, Nlink: 2, Mode: unix.S_IFREG | 0o640, UID: 7, GID: 8, Size: 5000, Blocks: 10},
		"hard":     {Ino: 2, Nlink: 2, Mode: unix.S_IFREG | 0o640, UID: 7, GID: 8, Size: 5000, Blocks: 10},
		"b":        {Ino: 3, Nlink: 1, Mode: unix.S_IFREG | 0o4755},
		"blk":      {Ino: 4, Nlink: 1, Mode: unix.S_IFBLK | 0o600, Rdev: unix.Mkdev(4095, 1<<20-1)},
		"sub":      {Ino: 5, Nlink: 3, Mode: unix.S_IFDIR | 0o1777},
		"sub/deep": {Ino: 1 << 62, Nlink: 2, Mode: unix.S_IFDIR | 0o700},
	} {
		want.Blksiz = 4096
		if d := cmp.Diff(want, lstat(t, filepath.Join(dir, path))); d != "" {
			t.Errorf("%q (-want +got):\n%s", path, d)
		}
	}
}

func TestStatfs(t *testing.T) {
	_, dir := mount(t, awkward(t))
	var got unix.Statfs_t
	if err := unix.Statfs(dir, &got); err != nil {
		t.Fatal(err)
	}
	want := unix.Statfs_t{Type: 0x65735546, Bsize: 4096, Frsize: 4096, Blocks: 2, Files: 6, Namelen: 255}
	want.Fsid, want.Flags = got.Fsid, got.Flags
	if d := cmp.Diff(want, got, cmp.AllowUnexported(unix.Fsid{})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if all := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV); got.Flags&all != all {
		t.Errorf("flags %#x, want %#x among them", got.Flags, all)
	}
}

// TestReadOnly tries everything that would change the file system.
func TestReadOnly(t *testing.T) {
	_, dir := mount(t, golden(t, "v3-master", "small"))
	file, sub, none := filepath.Join(dir, "zeros"), filepath.Join(dir, "docs"), filepath.Join(dir, "none")
	open := func(path string, flags int) error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
		if err == nil {
			_ = unix.Close(fd)
		}
		return err
	}
	for name, err := range map[string]error{
		"create":       open(none, unix.O_CREAT|unix.O_WRONLY),
		"open":         open(file, unix.O_WRONLY),
		"append":       open(file, unix.O_RDWR|unix.O_APPEND),
		"truncate":     open(file, unix.O_RDONLY|unix.O_TRUNC),
		"without name": open(dir, unix.O_TMPFILE|unix.O_RDWR),
		"setsize":      unix.Truncate(file, 0),
		"mkdir":        unix.Mkdir(none, 0o755),
		"mknod":        unix.Mknod(none, unix.S_IFIFO|0o644, 0),
		"symlink":      unix.Symlink("x", none),
		"link":         unix.Link(file, none),
		"rename":       unix.Rename(file, none),
		"unlink":       unix.Unlink(file),
		"rmdir":        unix.Rmdir(sub),
		"chmod":        unix.Chmod(file, 0o600),
		"chown":        unix.Lchown(file, 1, 1),
		"utimes":       unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{{}, {}}, 0),
		"setxattr":     unix.Lsetxattr(file, "user.x", []byte("y"), 0),
		"removexattr":  unix.Lremovexattr(filepath.Join(sub, "b.txt"), "user.comment"),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v, want EROFS", name, err)
		}
	}
}

func TestXattr(t *testing.T) {
	_, dir := mount(t, golden(t, "v3-master", "small"))
	with, without := filepath.Join(dir, "docs", "b.txt"), filepath.Join(dir, "zeros")
	const name, value = "user.comment", "a value\x00with a zero"
	buf := make([]byte, 64)
	for what, test := range map[string]struct {
		call func() (int, error)
		want string
		err  error
	}{
		"value":          {func() (int, error) { return unix.Lgetxattr(with, name, buf) }, value, nil},
		"too small":      {func() (int, error) { return unix.Lgetxattr(with, name, buf[:len(value)-1]) }, "", unix.ERANGE},
		"no such name":   {func() (int, error) { return unix.Lgetxattr(with, "user.none", buf) }, "", unix.ENODATA},
		"none at all":    {func() (int, error) { return unix.Lgetxattr(without, name, buf) }, "", unix.ENODATA},
		"list":           {func() (int, error) { return unix.Llistxattr(with, buf) }, name + "\x00", nil},
		"list too small": {func() (int, error) { return unix.Llistxattr(with, buf[:3]) }, "", unix.ERANGE},
		"empty list":     {func() (int, error) { return unix.Llistxattr(without, buf) }, "", nil},
	} {
		clear(buf)
		n, err := test.call()
		if !errors.Is(err, test.err) {
			t.Errorf("%s: %v, want %v", what, err, test.err)
		} else if err == nil && string(buf[:n]) != test.want {
			t.Errorf("%s: %q, want %q", what, buf[:n], test.want)
		}
	}
	for what, size := range map[string]func() (int, error){
		"value": func() (int, error) { return unix.Lgetxattr(with, name, nil) },
		"list":  func() (int, error) { return unix.Llistxattr(with, nil) },
	} {
		want := map[string]int{"value": len(value), "list": len(name) + 1}[what]
		if n, err := size(); n != want || err != nil {
			t.Errorf("size of the %s: %d, %v, want %d", what, n, err, want)
		}
	}
}

// TestNoXattrs looks at an image without any: the kernel is told so once.
func TestNoXattrs(t *testing.T) {
	_, dir := mount(t, awkward(t))
	for range 2 {
		if _, err := unix.Lgetxattr(filepath.Join(dir, "a"), "user.x", nil); !errors.Is(err, unix.ENOTSUP) {
			t.Errorf("getxattr: %v, want ENOTSUP", err)
		}
		if n, err := unix.Llistxattr(filepath.Join(dir, "a"), nil); !errors.Is(err, unix.ENOTSUP) {
			t.Errorf("listxattr: %d, %v, want ENOTSUP", n, err)
		}
	}
}

// TestDots looks for "." and ".." where programs find them, with the right numbers.
func TestDots(t *testing.T) {
	_, dir := mount(t, awkward(t))
	for path, want := range map[string][2]uint64{"sub/deep": {1 << 62, 5}, "sub": {5, 1}} {
		fd, err := unix.Open(filepath.Join(dir, path), unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 4096)
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Close(fd); err != nil {
			t.Fatal(err)
		}
		got := map[string]uint64{}
		for b := buf[:n]; len(b) > 0; {
			length := binary.NativeEndian.Uint16(b[16:])
			got[unix.ByteSliceToString(b[19:length])] = binary.NativeEndian.Uint64(b)
			b = b[length:]
		}
		if got["."] != want[0] || got[".."] != want[1] {
			t.Errorf("%s: . is %d and .. is %d, want %d", path, got["."], got[".."], want)
		}
	}
	if lstat(t, filepath.Join(dir, "sub/deep/..")).Ino != 5 {
		t.Error("sub/deep/.. is not sub")
	}
}

// TestLargeDirectory lists 50,000 names.
func TestLargeDirectory(t *testing.T) {
	const n = 50_000
	names := make([]string, n)
	inodes := format.InodeVector{{Ino: 1, Kind: format.KindDir, Perm: 0o755}}
	for i := range names {
		names[i] = fmt.Sprintf("%05d-%s", i, strings.Repeat("x", i%60))
		inodes = append(inodes, format.Inode{Ino: uint64(i) + 2, Kind: format.KindFile, Perm: 0o644})
	}
	inodes[0].Entries = entries(2, names...)
	_, dir := mount(t, (&memory{}).image(t, inodes))
	for _, pass := range []string{"cold", "warm"} {
		list, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		if len(list) != n {
			t.Fatalf("%s: %d names, want %d", pass, len(list), n)
		}
		for i, e := range list {
			if e.Name() != names[i] || e.Type() != 0 {
				t.Fatalf("%s: entry %d is %q of type %v, want the file %q", pass, i, e.Name(), e.Type(), names[i])
			}
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, names[n-1])); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a name that is not there: %v", err)
	}
}
