// Package sample makes a tree with everything in it that an image can hold, and that readers of
// images have got wrong: the suite publishes it, and compares what pods see with what was made.
//
// The same configuration makes the same tree, as far as the user who makes it may: see [Make].
package sample

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// DefaultSize is the length of the large file, in bytes, where the configuration has none: some
	// tens of chunks.
	DefaultSize = 8 << 20
	// MaxSize is the most that it can be.
	MaxSize = 1 << 40

	// SmallFiles is how many small files there are in the directory "many".
	SmallFiles = 2000

	// depth is how many directories lie in one another in "deep".
	depth = 60
)

// Config is what can be chosen.
type Config struct {
	// Seed gives the files with random bytes other ones.
	Seed uint64
	// Size is the length of the large file, in bytes, from 1 to MaxSize; the sparse one is twice as
	// long. Zero stands for DefaultSize.
	Size int64
}

// maker makes one sample and keeps the first error.
type maker struct {
	dir     string
	random  *rand.ChaCha8
	err     error
	omitted []string
}

// Make makes the tree in dir, which must be empty or not exist. It returns, in sentences, what it
// had to leave out: without root that is other owners, devices, a file without permissions and
// attributes that are the system's, and any attributes where the file system has none.
func Make(dir string, cfg Config) (omitted []string, err error) {
	if cfg.Size == 0 {
		cfg.Size = DefaultSize
	}
	if cfg.Size < 0 || cfg.Size > MaxSize {
		return nil, fmt.Errorf("make a sample in %s: size %d: want 1 to %d bytes", dir, cfg.Size, int64(MaxSize))
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if there, err := os.ReadDir(dir); err != nil {
		return nil, err
	} else if len(there) > 0 {
		return nil, fmt.Errorf("make a sample in %s: it is not empty; want a directory for it alone", dir)
	}
	var seed [32]byte
	for i := range 8 {
		seed[i] = byte(cfg.Seed >> (8 * i))
	}
	m := &maker{dir: dir, random: rand.NewChaCha8(seed)}
	m.plainFiles(cfg.Size)
	m.links()
	m.names()
	m.many()
	m.modes()
	m.attributes()
	m.special()
	m.times()
	if m.err != nil {
		return nil, fmt.Errorf("make a sample in %s: %w", dir, m.err)
	}
	return m.omitted, nil
}

// do keeps an error, and tells what was being made.
func (m *maker) do(what string, err error) {
	if err != nil && m.err == nil {
		m.err = fmt.Errorf("%s: %w", what, err)
	}
}

// try is do for what not every user may make and not every file system can hold.
func (m *maker) try(what string, err error) {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOTSUP) {
		m.omitted = append(m.omitted, fmt.Sprintf("%s: %v", what, err))
		return
	}
	m.do(what, err)
}

func (m *maker) path(name string) string { return filepath.Join(m.dir, name) }

func (m *maker) mkdir(name string) {
	m.do("make directory "+name, os.MkdirAll(m.path(name), 0o755))
	m.chmod(name, 0o755)
}

func (m *maker) file(name string, content []byte) {
	m.do("write "+name, os.WriteFile(m.path(name), content, 0o644))
	m.chmod(name, 0o644)
}

// chmod sets all twelve bits, whatever the umask is.
func (m *maker) chmod(name string, mode uint32) {
	m.do("set the mode of "+name, unix.Chmod(m.path(name), mode))
}

func (m *maker) symlink(target, name string) {
	m.do("link "+name, os.Symlink(target, m.path(name)))
}

// bytes returns n random bytes.
func (m *maker) bytes(n int) []byte {
	b := make([]byte, n)
	_, err := m.random.Read(b)
	m.do("read random bytes", err)
	return b
}

// plainFiles makes files that differ in how their bytes lie in chunks.
func (m *maker) plainFiles(size int64) {
	m.mkdir("empty-directory")
	m.file("empty", nil)
	m.file("hello.txt", []byte("hello\n"))
	m.file("one-byte", []byte{0})
	m.file("page", m.bytes(4096))
	m.file("page-and-a-byte", m.bytes(4097))
	same := m.bytes(300_000)
	m.file("twin-a", same)
	m.file("twin-b", same)
	m.file("text", []byte(strings.Repeat("All that is written here is written here again.\n", 20_000)))

	large, err := os.OpenFile(m.path("large"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	m.do("create large", err)
	if err == nil {
		for left := size; left > 0 && m.err == nil; left -= 1 << 20 {
			_, err := large.Write(m.bytes(int(min(left, 1<<20))))
			m.do("write large", err)
		}
		m.do("close large", large.Close())
	}
	m.chmod("large", 0o644)
	sparse, err := os.OpenFile(m.path("sparse"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	m.do("create sparse", err)
	if err == nil {
		_, err = sparse.WriteAt([]byte("in the middle"), size)
		m.do("write sparse", errors.Join(err, sparse.Truncate(2*size), sparse.Close()))
	}
	m.chmod("sparse", 0o644)
}

func (m *maker) links() {
	m.mkdir("links/directory")
	m.file("links/directory/file", []byte("behind links\n"))
	m.file("links/one", []byte("a file of three names\n"))
	for _, name := range []string{"links/another", "links/directory/third"} {
		m.do("link "+name, os.Link(m.path("links/one"), m.path(name)))
	}
	m.symlink("one", "links/relative")
	m.symlink("../hello.txt", "links/up")
	m.symlink("directory", "links/to-directory")
	m.symlink("to-directory/file", "links/through-a-link")
	m.symlink("/etc/passwd", "links/absolute")
	m.symlink("not there", "links/dangling")
	m.symlink("circle-b", "links/circle-a")
	m.symlink("circle-a", "links/circle-b")
	m.symlink(strings.Repeat("long/", 400)+"target", "links/long")
}

func (m *maker) names() {
	m.mkdir("names")
	for i, name := range []string{
		strings.Repeat("n", 255),
		strings.Repeat("é", 127) + "!", // 255 bytes, not characters
		"grüße-дом-家-🧩", "e\u0301 decomposed", "\u00e9 composed",
		" begins with a space", "ends with a space ", "tab\tand\nnewline", `back\slash`, `quotes"'`, "-rf", "*", "$HOME", "~",
		"...", ".hidden", "con", "a:b", "UPPER", "upper", "not utf-8 \xff\xfe", "\x01", "%41", ".wh.whiteout",
	} {
		m.file("names/"+name, fmt.Appendf(nil, "name %d\n", i))
	}
	deep := "deep"
	for range depth {
		deep += "/directory"
	}
	m.mkdir(deep)
	m.file(deep+"/file", []byte("at the bottom\n"))
}

func (m *maker) many() {
	m.mkdir("many")
	for i := range SmallFiles {
		m.file(fmt.Sprintf("many/%04d", i), fmt.Appendf(m.bytes(i%64), "file %d\n", i))
	}
}

// modes makes files of every mode that means something, and of other owners.
func (m *maker) modes() {
	m.mkdir("modes")
	root := os.Geteuid() == 0
	for _, mode := range []uint32{0o400, 0o444, 0o600, 0o640, 0o644, 0o666, 0o700, 0o755, 0o777, 0o1644, 0o2644, 0o2755, 0o4755, 0o6755, 0o000} {
		if mode == 0 && !root {
			m.omitted = append(m.omitted, "a file of mode 0000: only root could read it")
			continue
		}
		name := fmt.Sprintf("modes/file-%04o", mode)
		m.file(name, fmt.Appendf(nil, "%04o\n", mode))
		m.chmod(name, mode)
	}
	for _, mode := range []uint32{0o500, 0o700, 0o711, 0o755, 0o1777, 0o2775} {
		name := fmt.Sprintf("modes/dir-%04o", mode)
		m.mkdir(name)
		m.file(name+"/file", []byte("x\n"))
		m.chmod(name, mode)
	}
	for _, owner := range []struct{ uid, gid int }{{0, 65534}, {1000, 1000}, {65532, 65532}, {65534, 0}, {4_000_000_000, 3_999_999_999}} {
		name := fmt.Sprintf("modes/owner-%d-%d", owner.uid, owner.gid)
		m.file(name, []byte("x\n"))
		m.try("the owner of "+name, os.Lchown(m.path(name), owner.uid, owner.gid))
	}
	m.symlink("owner-1000-1000", "modes/owned-link")
	m.try("the owner of modes/owned-link", os.Lchown(m.path("modes/owned-link"), 1000, 1000))
	m.file("modes/owned-suid", []byte("x\n"))
	m.try("the owner of modes/owned-suid", os.Lchown(m.path("modes/owned-suid"), 65532, 65532))
	m.chmod("modes/owned-suid", 0o4755) // after the owner, whose change clears the bit
}

func (m *maker) attributes() {
	m.mkdir("attributes/directory")
	m.file("attributes/file", []byte("x\n"))
	m.file("attributes/program", []byte("#!/bin/sh\n"))
	m.chmod("attributes/program", 0o755)
	netBindService := []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0} // revision 2, effective
	for _, a := range []struct {
		file, key string
		value     []byte
	}{
		{"file", "user.text", []byte("a value")},
		{"file", "user.empty", nil},
		{"file", "user.binary", []byte{0, 1, 0xff, '\n', '='}},
		{"file", "user.long", []byte(strings.Repeat("long ", 300))},
		{"file", "user.ключ", []byte("a name that is not ASCII")},
		{"directory", "user.of-a-directory", []byte("yes")},
		{"file", "trusted.of-the-system", []byte("yes")},
		{"program", "security.capability", netBindService},
	} {
		m.try(a.key+" of attributes/"+a.file, unix.Lsetxattr(m.path("attributes/"+a.file), a.key, a.value, 0))
	}
}

func (m *maker) special() {
	m.mkdir("special")
	for _, node := range []struct {
		name string
		mode uint32
		dev  uint64
	}{
		{"special/fifo", unix.S_IFIFO | 0o600, 0},
		{"special/null", unix.S_IFCHR | 0o666, unix.Mkdev(1, 3)},
		{"special/block", unix.S_IFBLK | 0o660, unix.Mkdev(240, 1000)},
	} {
		err := unix.Mknod(m.path(node.name), node.mode, int(node.dev))
		m.try(node.name, err)
		if err == nil {
			m.chmod(node.name, node.mode&0o7777)
		}
	}
}

// times gives everything one time, those below a directory before it.
func (m *maker) times() {
	if m.err != nil {
		return
	}
	at := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	stamp, err := unix.TimeToTimespec(at)
	m.do("set times", err)
	var paths []string
	m.do("set times", filepath.WalkDir(m.dir, func(path string, _ os.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	}))
	for _, path := range slices.Backward(paths) {
		m.do("set the time of "+path, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{stamp, stamp}, unix.AT_SYMLINK_NOFOLLOW))
	}
}
