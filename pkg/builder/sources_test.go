package builder_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// entry is an entry of a tar archive in a test.
type entry struct {
	tar.Header
	content string
}

func file(name, content string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}, content}
}

func dir(name string, mode int64) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode}}
}

func link(name, target string) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}}
}

func symlink(name, target string) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}}
}

// pack makes a tar archive.
func pack(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return z.Bytes()
}

func zstded(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(b, nil)
}

// entriesOf lists a directory as the entries of a tar archive.
func entriesOf(t testing.TB, root string) []entry {
	t.Helper()
	var entries []entry
	first := make(map[uint64]string)
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		e := entry{Header: tar.Header{Name: "./" + name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), Format: tar.FormatPAX}}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if old, ok := first[st.Ino]; ok {
				e.Typeflag, e.Linkname = tar.TypeLink, old
				entries = append(entries, e)
				return nil
			}
			first[st.Ino] = e.Name
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			e.Typeflag = tar.TypeDir
		case unix.S_IFLNK:
			e.Typeflag = tar.TypeSymlink
			e.Linkname, err = os.Readlink(path)
		case unix.S_IFIFO:
			e.Typeflag = tar.TypeFifo
		case unix.S_IFCHR, unix.S_IFBLK:
			e.Typeflag = tar.TypeChar
			if st.Mode&unix.S_IFMT == unix.S_IFBLK {
				e.Typeflag = tar.TypeBlock
			}
			e.Devmajor, e.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		default:
			var b []byte
			b, err = os.ReadFile(path)
			e.Typeflag, e.Size, e.content = tar.TypeReg, int64(len(b)), string(b)
		}
		e.PAXRecords = xattrRecords(t, path)
		entries = append(entries, e)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func xattrRecords(t testing.TB, path string) map[string]string {
	t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatal(err)
	}
	records := make(map[string]string)
	for _, key := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if key == "" {
			continue
		}
		val := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, key, val)
		if err != nil {
			t.Fatal(err)
		}
		records["SCHILY.xattr."+key] = string(val[:n])
	}
	return records
}

func readTar(t testing.TB, b []byte) *builder.Tree {
	t.Helper()
	tree, err := builder.ReadTar(t.Context(), bytes.NewReader(b), builder.ReadConfig{Name: "archive", WorkDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeTree(t, tree) })
	return tree
}

func closeTree(t testing.TB, tree *builder.Tree) {
	t.Helper()
	if err := tree.Close(); err != nil {
		t.Error(err)
	}
}

// images is a place for one container image in memory.
type images struct {
	top   format.Digest
	blobs map[format.Digest][]byte
	// broken, if not nil, is given each blob and returns what is read instead.
	broken func(d format.Digest, b []byte) []byte
}

var _ builder.Images = (*images)(nil)

func (im *images) Manifest(_ context.Context, d format.Digest, limit int64) ([]byte, error) {
	if d.IsZero() {
		d = im.top
	}
	b, ok := im.blobs[d]
	if !ok {
		return nil, store.ErrNotFound
	}
	if int64(len(b)) > limit {
		return nil, store.ErrTooLarge
	}
	return b, nil
}

func (im *images) Blob(_ context.Context, d format.Digest, _ int64) (io.ReadCloser, error) {
	b, ok := im.blobs[d]
	if !ok {
		return nil, store.ErrNotFound
	}
	if im.broken != nil {
		b = im.broken(d, b)
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

func (im *images) put(mediaType string, b []byte) map[string]any {
	if im.blobs == nil {
		im.blobs = make(map[format.Digest][]byte)
	}
	im.top = format.DigestOf(b)
	im.blobs[im.top] = b
	return map[string]any{"mediaType": mediaType, "digest": im.top, "size": len(b)}
}

func (im *images) putJSON(t testing.TB, mediaType string, doc map[string]any) map[string]any {
	t.Helper()
	b, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return im.put(mediaType, b)
}

const (
	ociManifest = "application/vnd.oci.image.manifest.v1+json"
	ociIndex    = "application/vnd.oci.image.index.v1+json"
	ociConfig   = "application/vnd.oci.image.config.v1+json"
	ociLayer    = "application/vnd.oci.image.layer.v1.tar"
)

// addImage adds an image of layers, tar archives, compressed in turn in each way there is,
// and returns its descriptor.
func (im *images) addImage(t testing.TB, arch string, layers ...[]byte) map[string]any {
	t.Helper()
	var diffs []format.Digest
	descriptors := []map[string]any{}
	for i, b := range layers {
		diffs = append(diffs, format.DigestOf(b))
		switch i % 3 {
		case 0:
			descriptors = append(descriptors, im.put(ociLayer+"+gzip", gzipped(t, b)))
		case 1:
			descriptors = append(descriptors, im.put(ociLayer+"+zstd", zstded(t, b)))
		default:
			descriptors = append(descriptors, im.put(ociLayer, b))
		}
	}
	config := im.putJSON(t, ociConfig, map[string]any{
		"os": "linux", "architecture": arch, "rootfs": map[string]any{"type": "layers", "diff_ids": diffs},
	})
	return im.putJSON(t, ociManifest, map[string]any{
		"schemaVersion": 2, "mediaType": ociManifest, "config": config, "layers": descriptors,
	})
}

func newImages(t testing.TB, layers ...[]byte) *images {
	t.Helper()
	im := new(images)
	im.addImage(t, "amd64", layers...)
	return im
}

func readImage(t testing.TB, im builder.Images) *builder.Tree {
	t.Helper()
	tree, err := builder.ReadImage(t.Context(), im, builder.Platform{OS: "linux", Architecture: "amd64"}, false,
		builder.ReadConfig{Name: "image", WorkDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeTree(t, tree) })
	return tree
}

// makeTree makes a tree with everything that a tree can have and a tar archive too.
func makeTree(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("devices, owners and capabilities take root")
	}
	root := filepath.Join(t.TempDir(), "tree")
	deep := strings.Repeat("a directory with a name of fifty bytes in length/", 8)
	random := make([]byte, 700_000)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(random) // never fails
	write(t, root, map[string]string{
		"empty": "", "small": "x", "big": string(random), "d/e/f": "nested", "d/hard": "=big", "0-first": "=big",
		"link": "->d/e", "dangling": "->/no/such/thing", "hard-to-link": "=link", "not utf-8 \xff\xfe": "y", "new\nline": "z",
		deep + "file": "deep", "long/" + strings.Repeat("n", 255): "long name", "links/to/fifo": "", "set": "uid", ".wh.not-a-whiteout": "!",
	})
	at := func(name string) string { return filepath.Join(root, name) }
	for _, err := range []error{
		os.Remove(at(".wh.not-a-whiteout")),
		os.Mkdir(at("empty-dir"), 0o700),
		unix.Mkfifo(at("fifo"), 0o620),
		unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Mknod(at("loop"), unix.S_IFBLK|0o640, int(unix.Mkdev(7, 300))),
		os.Chmod(at("set"), 0o755|os.ModeSetuid|os.ModeSetgid),
		os.Chmod(at("d"), 0o777|os.ModeSticky),
		os.Chown(at("small"), 3_000_000_000, 4_000_000_000),
		os.Lchown(at("link"), 70_000, 80_000),
		os.Chown(root, 12, 34),
		os.Chmod(root, 0o751),
		unix.Setxattr(at("small"), "user.z", []byte("last"), 0),
		unix.Setxattr(at("small"), "user.a", nil, 0),
		unix.Setxattr(at("small"), "user.binary", []byte("\x00\xff=\n"), 0),
		unix.Setxattr(at("empty"), "user.empty file", []byte("v"), 0),
		unix.Setxattr(at("d"), "trusted.of directory", []byte("v"), 0),
		unix.Setxattr(root, "user.of root", []byte("v"), 0),
		unix.Setxattr(at("big"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	sparse, err := os.Create(at("sparse"))
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{1 << 20, 5<<20 + 123} {
		if _, err := sparse.WriteAt([]byte("data in a hole"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := sparse.Truncate(9 << 20); err != nil {
		t.Fatal(err)
	}
	if err := sparse.Close(); err != nil {
		t.Fatal(err)
	}
	return root
}

// sources returns a directory in every form that it can be built from.
func sources(t testing.TB, root string) map[string]builder.Config {
	t.Helper()
	entries := entriesOf(t, root)
	plain := pack(t, entries...)
	backwards := make([]entry, len(entries)) // parents and links come last
	for i, e := range entries {
		backwards[len(entries)-1-i] = e
	}
	// A second layer repairs what is wrong in the first.
	half := len(entries) / 2
	wrong := append([]entry{dir("./", 0o700), file("d/e", "was a file"), file("gone", "x"), file("gone-dir/x/y", "x"), dir("small", 0o755), file("small/x", "x")}, entries[:half]...)
	wrong = append(wrong, file("big", "other"), symlink("links", "gone-dir"))
	right := append([]entry{file(".wh.gone", ""), file(".wh.gone-dir", "")}, entries...)
	forms := map[string]builder.Config{
		"directory":             {Dir: root},
		"tar":                   {Tree: readTar(t, plain)},
		"tar, gzip":             {Tree: readTar(t, gzipped(t, plain))},
		"tar, zstd":             {Tree: readTar(t, zstded(t, plain))},
		"tar, backwards":        {Tree: readTar(t, pack(t, backwards...))},
		"tar, twice":            {Tree: readTar(t, pack(t, append(append([]entry{}, entries...), entries...)...))},
		"image of one layer":    {Tree: readImage(t, newImages(t, plain))},
		"image of three layers": {Tree: readImage(t, newImages(t, pack(t, wrong...), pack(t, right...), pack(t)))},
	}
	program, err := exec.LookPath("tar")
	if err != nil {
		t.Logf("GNU tar is not tried: %v", err)
		return forms
	}
	for name, args := range map[string][]string{
		"GNU tar, posix":         {"--format=posix"},
		"GNU tar, posix, sparse": {"--format=posix", "--sparse", "--sort=name"},
	} {
		cmd := exec.Command(program, append(args, "--xattrs", "--xattrs-include=*", "-C", root, "-c", ".")...)
		var out, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &stderr
		if err := cmd.Run(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, stderr.Bytes())
		}
		forms[name] = builder.Config{Tree: readTar(t, out.Bytes())}
	}
	return forms
}

// The same tree gives the same image, whatever form it comes in; deltas too.
func TestSameTreeSameImage(t *testing.T) {
	before := sources(t, makeTree(t))
	root := makeTree(t)
	write(t, root, map[string]string{"new": "n", "d/e/new": "n"})
	remove(t, root, "d/hard", "link", "long", "sparse")
	after := sources(t, root)
	type digests struct{ image, compressed, delta format.Digest }
	var want digests
	for _, name := range append([]string{"directory"}, sortedKeys(before)...) {
		s := newStore(t)
		one := func(cfg builder.Config, tag, base string, compress bool) format.Digest {
			cfg.Store, cfg.Tag, cfg.Base, cfg.Compress = s, tag, base, compress
			return build(t, cfg).Manifest.Digest
		}
		got := digests{one(before[name], "1", "", false), one(before[name], "z", "", true), one(after[name], "2", "1", false)}
		if name == "directory" {
			if want = got; want.delta == want.image {
				t.Error("the delta changes nothing")
			}
			shows(t, s, "2", fromDir(t, root))
		}
		if got != want {
			t.Errorf("%s: %s, compressed %s, delta %s; want %s, %s, %s", name,
				got.image, got.compressed, got.delta, want.image, want.compressed, want.delta)
			shows(t, s, "2", fromDir(t, root))
		}
	}
}

func sortedKeys(m map[string]builder.Config) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	return keys
}

// GNU tar's own format for sparse files and long names reads as its tree, without xattrs.
func TestGNUFormat(t *testing.T) {
	program, err := exec.LookPath("tar")
	if err != nil {
		t.Skipf("GNU tar: %v", err)
	}
	root := t.TempDir()
	write(t, root, map[string]string{strings.Repeat("long/", 40) + "file": "x", "l": "->" + strings.Repeat("x", 300), "h": "=" + strings.Repeat("long/", 40) + "file"})
	f, err := os.Create(filepath.Join(root, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("end"), 3<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(program, "--format=gnu", "--sparse", "-C", root, "-c", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	want := build(t, builder.Config{Dir: root, Store: s, Tag: "dir"})
	if got := build(t, builder.Config{Tree: readTar(t, out), Store: s, Tag: "tar"}); got.Manifest.Digest != want.Manifest.Digest {
		t.Errorf("%s, want %s", got.Manifest.Digest, want.Manifest.Digest)
	}
}

// paths lists what a tree shows, as PATH or PATH=CONTENT.
func paths(t testing.TB, tree *builder.Tree) string {
	t.Helper()
	s := newStore(t)
	build(t, builder.Config{Tree: tree, Store: s, Tag: "t"})
	var list []string
	for _, e := range imageTree(t, s, "t") {
		text := e.Path
		switch {
		case e.Target != "":
			text += "->" + e.Target
		case e.SHA256 != "":
			text += fmt.Sprintf("=%d", e.Size)
		}
		list = append(list, text)
	}
	return strings.Join(list, " ")
}

// overwrite puts other content in the place of a blob.
func overwrite(t testing.TB, s *store.Store, d format.Digest, b []byte) {
	t.Helper()
	name := filepath.Join(s.Dir(), "blobs", "sha256", d.Hex())
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
}
