package builder_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// What an archive says in odd ways is understood as tar programs understand it.
func TestReadTar(t *testing.T) {
	for _, tt := range []struct {
		name    string
		entries []entry
		want    string
	}{
		{"nothing", nil, "/"},
		{"parents are made", []entry{file("a/b/c", "x")}, "/ /a /a/b /a/b/c=1"},
		{"parents come later", []entry{file("a/b", "x"), dir("a", 0o700)}, "/ /a /a/b=1"},
		{"names begin anywhere", []entry{file("./a", "x"), file("/b", "x"), file("c/./d//e", "x"), file("c/../f", "x")}, "/ /a=1 /b=1 /c /c/d /c/d/e=1 /f=1"},
		{"the last one counts", []entry{file("a", "x"), file("a", "xyz"), dir("b/c", 0o755), file("b", "x"), file("d", "x"), file("d/e", "x")}, "/ /a=3 /b=1 /d /d/e=1"},
		{"hard links", []entry{file("a", "xy"), link("b/c", "a"), link("d", "./b/c"), link("a", "d")}, "/ /a=2 /b /b/c=2 /d=2"},
		{"hard links before their files", []entry{link("b", "a"), link("c", "b"), file("a", "xy")}, "/ /a=2 /b=2 /c=2"},
		{"a hard link to a symlink", []entry{symlink("a", "x"), link("b", "a")}, "/ /a->x /b->x"},
		{"what a link was made to stays", []entry{file("a", "xy"), link("b", "a"), file("a", "z")}, "/ /a=1 /b=2"},
		{"symlinks are followed within the tree", []entry{symlink("a", "b"), file("a/f", "x"), symlink("c/up", "../../../b"), file("c/up/g", "x"), symlink("abs", "/b/../b"), link("h", "abs/f")}, "/ /a->b /abs->/b/../b /b /b/f=1 /b/g=1 /c /c/up->../../../b /h=1"},
		{"a directory replaces a symlink", []entry{dir("b", 0o755), symlink("a", "b"), dir("a", 0o755), file("a/f", "x")}, "/ /a /a/f=1 /b"},
		{"names of whiteouts mean nothing", []entry{file("a", "x"), file(".wh.a", ""), file(".wh..wh..opq", "")}, "/ /.wh..wh..opq=0 /.wh.a=0 /a=1"},
		{"a comment for all", []entry{{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "c0ffee"}}}, file("a", "x")}, "/ /a=1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := paths(t, readTar(t, pack(t, tt.entries...))); got != tt.want {
				t.Errorf("%s\nwant %s", got, tt.want)
			}
		})
	}
}

// Attributes come as the archive says them, and as a directory that it does not list has them.
func TestReadTarAttributes(t *testing.T) {
	device := entry{Header: tar.Header{Name: "dir/device", Typeflag: tar.TypeBlock, Mode: 0o640, Uid: 1 << 31, Gid: 4_294_967_295, Devmajor: 259, Devminor: 1 << 19}}
	x := file("x", "")
	x.Mode = 0o100000 | 0o6755
	x.PAXRecords = map[string]string{
		"SCHILY.xattr.user.plain": "\x00bytes", "SCHILY.xattr.user.a%3Db%25": "escaped",
		"LIBARCHIVE.xattr.user.plain": "b3RoZXI", "LIBARCHIVE.xattr.user.p%20q": "dmFsdWU=",
		// As bsdtar writes each: it encodes names in both records.
		"SCHILY.xattr.user.r%20%3Ds": "both", "LIBARCHIVE.xattr.user.r%20%3Ds": "Ym90aA",
	}
	s := newStore(t)
	build(t, builder.Config{Tree: readTar(t, pack(t, device, x, symlink("s", "t"))), Store: s, Tag: "t"})
	const want = `/ dir 0755 0:0
/dir dir 0755 0:0
/dir/device blk 0640 2147483648:4294967295 rdev=259:524288
/s link 0777 0:0 -> t
/x file 6755 0:0 size=0 sha256=e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 nlink=1 xattr:user.a\x3db%=65736361706564 xattr:user.p\x20q=76616c7565 xattr:user.plain=006279746573 xattr:user.r\x20\x3ds=626f7468`
	if got := strings.TrimSpace(string(testtree.Format(imageTree(t, s, "t")))); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// Bad archives get an error that names the entry and says what is wrong, and nothing is left.
func TestReadTarRefuses(t *testing.T) {
	whole := pack(t, file("a", "content"), file("b", strings.Repeat("x", 100_000)))
	odd := func(change func(h *tar.Header)) []byte {
		e := file("odd", "")
		change(&e.Header)
		return pack(t, e)
	}
	// Go's writer does not make every archive that can be met.
	raw := func(change func(b []byte)) []byte {
		b := bytes.Clone(pack(t, file("odd", "")))
		change(b)
		copy(b[148:], "        ")
		sum := 0
		for _, c := range b[:512] {
			sum += int(c)
		}
		copy(b[148:], []byte{'0' + byte(sum>>15&7), '0' + byte(sum>>12&7), '0' + byte(sum>>9&7), '0' + byte(sum>>6&7), '0' + byte(sum>>3&7), '0' + byte(sum&7), 0, ' '})
		return b
	}
	flipped := gzipped(t, whole)
	flipped[len(flipped)-5] ^= 1 // in the checksum
	var links []entry
	for i := range 100 {
		links = append(links, link(strings.Repeat("l", i+1), strings.Repeat("l", i+2)))
	}
	for _, tt := range []struct {
		name  string
		b     []byte
		kind  error
		words []string
	}{
		{"nothing at all", nil, builder.ErrArchive, []string{"empty"}},
		{"text", []byte(strings.Repeat("some text\n", 200)), builder.ErrArchive, []string{"no tar archive"}},
		{"cut in content", whole[:60_000], builder.ErrArchive, []string{`entry "b"`, "cut off"}},
		{"cut in a header", whole[:1100], builder.ErrArchive, []string{"cut off"}},
		{"cut between entries", whole[:1024], builder.ErrArchive, []string{"cut off"}},
		{"gzip, cut", gzipped(t, whole)[:200], builder.ErrArchive, []string{"cut off"}},
		{"gzip, damaged", flipped, builder.ErrArchive, []string{"damaged"}},
		{"zstd, cut", zstded(t, whole)[:40], builder.ErrArchive, []string{"cut off"}},
		{"zstd with a large window", []byte("\x28\xb5\x2f\xfd\x00\x98\x01\x00\x00"), format.ErrTooLarge, []string{"zstd -dc --long=31"}},
		{"gzip of text", gzipped(t, []byte(strings.Repeat("x", 1000))), builder.ErrArchive, []string{"no tar archive"}},
		{"xz", []byte("\xfd7zXZ\x00..."), builder.ErrArchive, []string{"xz -dc"}},
		{"bzip2", []byte("BZh91AY&SY"), builder.ErrArchive, []string{"bzip2 -dc"}},
		{"leads out", pack(t, file("a/../../etc/passwd", "x")), builder.ErrArchive, []string{`"a/../../etc/passwd"`, "leads out"}},
		{"a hard link leads out", pack(t, link("a", "../b")), builder.ErrArchive, []string{`"a"`, `"../b"`, "leads out"}},
		{"a hard link to nothing", pack(t, file("x", ""), link("a", "b")), builder.ErrArchive, []string{`"a"`, `"b"`, "not there"}},
		{"a hard link to itself", pack(t, link("a", "a")), builder.ErrArchive, []string{"not there"}},
		{"hard links in a long row", pack(t, append(links, file(strings.Repeat("l", 101), ""))...), builder.ErrArchive, []string{"not there"}},
		{"a hard link to a directory", pack(t, dir("d", 0o755), link("a", "d")), builder.ErrArchive, []string{"directory"}},
		{"a hard link to the root", pack(t, link("a", ".")), builder.ErrArchive, []string{"directory"}},
		{"the root is a file", pack(t, file(".", "x")), builder.ErrArchive, []string{"root"}},
		{"symlinks in a circle", pack(t, symlink("a", "b"), symlink("b", "a"), file("a/x", "x")), builder.ErrArchive, []string{"symlinks"}},
		{"a name too long", pack(t, file(strings.Repeat("n", 256), "x")), builder.ErrArchive, []string{"256 bytes", "255"}},
		{"too deep", pack(t, file(strings.Repeat("d/", 5000)+"f", "x")), format.ErrTooLarge, []string{"4096"}},
		{"symlink too long", pack(t, symlink("s", strings.Repeat("x", 4096))), builder.ErrArchive, []string{"4096 bytes"}},
		{"xattr too long", odd(func(h *tar.Header) {
			h.PAXRecords = map[string]string{"SCHILY.xattr.user.x": strings.Repeat("v", 64<<10+1)}
		}), builder.ErrArchive, []string{`"user.x"`}},
		{"xattr without a name", odd(func(h *tar.Header) { h.PAXRecords = map[string]string{"SCHILY.xattr.": "v"} }), builder.ErrArchive, []string{"extended attribute"}},
		{"xattr that is no base64", odd(func(h *tar.Header) { h.PAXRecords = map[string]string{"LIBARCHIVE.xattr.user.x": "!"} }), builder.ErrArchive, []string{"LIBARCHIVE.xattr.user.x"}},
		{"one xattr in two spellings", odd(func(h *tar.Header) {
			h.PAXRecords = map[string]string{"SCHILY.xattr.user.x%": "1", "SCHILY.xattr.user.x%25": "2"}
		}), builder.ErrArchive, []string{`"user.x%"`, "twice"}},
		{"one xattr in two kinds of record", odd(func(h *tar.Header) {
			h.PAXRecords = map[string]string{"LIBARCHIVE.xattr.user.%78": "MQ", "SCHILY.xattr.user.x": "2"}
		}), builder.ErrArchive, []string{`"user.x"`, "twice"}},
		{"records for all", pack(t, entry{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"path": "x"}}}), builder.ErrArchive, []string{`"path"`}},
		{"owner over 32 bits", odd(func(h *tar.Header) { h.Uid, h.Format = 1<<32, tar.FormatGNU }), builder.ErrArchive, []string{"owner is 4294967296"}},
		{"negative group", odd(func(h *tar.Header) { h.Gid, h.Format = -1, tar.FormatGNU }), builder.ErrArchive, []string{"group is -1"}},
		{"unknown type", raw(func(b []byte) { b[156] = 'Z' }), builder.ErrArchive, []string{`"odd"`, "'Z'"}},
		{"volume label", raw(func(b []byte) { b[156] = 'V' }), builder.ErrArchive, []string{"'V'"}},
		{"symlink to nothing", raw(func(b []byte) { b[156] = '2' }), builder.ErrArchive, []string{"0 bytes"}},
		{"more than any image", raw(func(b []byte) { copy(b[124:], "\x80\x00\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00") }), format.ErrTooLarge, []string{"an image can hold"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			work, before := t.TempDir(), openFiles(t)
			_, err := builder.ReadTar(t.Context(), bytes.NewReader(tt.b), builder.ReadConfig{Name: "tar:x", WorkDir: work})
			if !errors.Is(err, tt.kind) {
				t.Fatalf("%v, want %v", err, tt.kind)
			}
			for _, w := range append(tt.words, "read tar:x: ") {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
			checkTidy(t, work, before)
		})
	}
}

// checkTidy fails if a work directory is not empty, or more files are open than before.
func checkTidy(t *testing.T, work string, before int) {
	t.Helper()
	left, err := os.ReadDir(work)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if n := openFiles(t); n != before {
		t.Errorf("%d open files, %d before", n, before)
	}
}

// An archive that is cut anywhere is never taken for a whole one.
func TestReadTarCutAnywhere(t *testing.T) {
	whole := pack(t, file("zeros", strings.Repeat("\x00", 2048)), dir("d", 0o755), link("l", "zeros"), file("a", "x"))
	end := len(whole) - 1024 // one block of zeros is enough to tell the end
	work := t.TempDir()
	for n := range len(whole) {
		if within := n % 512; within > 1 && within < 511 && n%7 > 0 {
			continue
		}
		tree, err := builder.ReadTar(t.Context(), bytes.NewReader(whole[:n]), builder.ReadConfig{WorkDir: work})
		if err == nil {
			closeTree(t, tree)
		}
		if n < end+512 && err == nil {
			t.Errorf("%d of %d bytes are taken for the whole", n, len(whole))
		}
	}
}

// A source that fails is not said to be a bad archive.
func TestReadTarSourceFails(t *testing.T) {
	broken := errors.New("the network is gone")
	whole := pack(t, file("a", strings.Repeat("x", 10_000)))
	for name, b := range map[string][]byte{"plain": whole, "gzip": gzipped(t, whole), "zstd": zstded(t, whole)} {
		for _, n := range []int{0, 1, 30, len(b)} {
			r := io.MultiReader(bytes.NewReader(b[:n]), iotest.ErrReader(broken))
			_, err := builder.ReadTar(t.Context(), r, builder.ReadConfig{WorkDir: t.TempDir()})
			if !errors.Is(err, broken) || errors.Is(err, builder.ErrArchive) {
				t.Errorf("%s, after %d bytes: %v", name, n, err)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := builder.ReadTar(ctx, bytes.NewReader(whole), builder.ReadConfig{WorkDir: t.TempDir()}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	_, err := builder.ReadTar(t.Context(), bytes.NewReader(whole), builder.ReadConfig{WorkDir: "/no/such/directory"})
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "work directory") {
		t.Errorf("no work directory: %v", err)
	}
}

// An archive of zeros takes no room.
func TestSpoolKeepsHoles(t *testing.T) {
	big := entry{Header: tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Mode: 0o644, Size: 64 << 20}, content: strings.Repeat("\x00", 64<<20)}
	tree := readTar(t, pack(t, big, file("after", "x")))
	if got := paths(t, tree); got != "/ /after=1 /zeros=67108864" {
		t.Error(got)
	}
	if n := builder.SpoolBlocks(t, tree); n > 1<<20 {
		t.Errorf("%d bytes of disk for one byte of content", n)
	}
}

func TestWarnsOfACLs(t *testing.T) {
	acl := file("acl", "")
	acl.PAXRecords = map[string]string{"SCHILY.acl.access": "user::rw-,user:1000:r--"}
	again := acl
	again.Name = "again"
	var warnings []string
	tree, err := builder.ReadTar(t.Context(), bytes.NewReader(pack(t, acl, again)), builder.ReadConfig{
		WorkDir: t.TempDir(), Warn: func(s string) { warnings = append(warnings, s) },
	})
	if err != nil {
		t.Fatal(err)
	}
	closeTree(t, tree)
	if len(warnings) != 1 || !strings.Contains(warnings[0], `"acl"`) {
		t.Errorf("warnings: %q", warnings)
	}
}

// Looking for what hard links are made to can take long, and ends with its context.
func TestReadTarEndsAmongLinks(t *testing.T) {
	var row []entry // each to the next one, so that every round finds one
	for i := range 30 {
		row = append(row, link(fmt.Sprint(i), fmt.Sprint(i+1)))
	}
	ctx := &mortal{Context: t.Context(), left: 200} // many more than there are entries
	if _, err := builder.ReadTar(ctx, bytes.NewReader(pack(t, append(row, file("30", ""))...)), builder.ReadConfig{WorkDir: t.TempDir()}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}

// mortal is a context that ends after it was asked so many times.
type mortal struct {
	context.Context
	left int
}

func (m *mortal) Err() error {
	if m.left--; m.left < 0 {
		return context.Canceled
	}
	return nil
}

// A deep tree takes memory for its names, not for the path of each directory.
func TestReadTarDeepTree(t *testing.T) {
	const depth = 1000
	deep := file(strings.Repeat(strings.Repeat("n", 254)+"/", depth)+"f", "x")
	tree := readTar(t, pack(t, deep))
	s := &memStore{blobs: make(map[format.Digest][]byte)}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	r, err := builder.Build(t.Context(), builder.Config{Tree: tree, Store: s, Tag: "t", Workers: 1})
	runtime.ReadMemStats(&after)
	if err != nil {
		t.Fatal(err)
	}
	if r.Inodes != depth+2 {
		t.Errorf("%d inodes, want %d", r.Inodes, depth+2)
	}
	// With a path each it was 250 MiB.
	if took := (after.TotalAlloc - before.TotalAlloc) >> 20; took > 100 {
		t.Errorf("building took %d MiB", took)
	}
}
