package store_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestConformance(t *testing.T) {
	for _, test := range []struct {
		name  string
		named bool
	}{
		{"files without a name", false},
		{"files with temporary names", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			storetest.TestStore(t, func(t *testing.T) storetest.Interface {
				s := create(t, store.Config{Fault: faults(test.named, func(store.Step) error { return nil })})
				t.Cleanup(func() { checkTree(t, s.Dir()) })
				return s
			})
		})
	}
}

func TestCreate(t *testing.T) {
	s := create(t, store.Config{Dir: filepath.Join(t.TempDir(), "a", "b")})
	if s.Layout() != store.LayoutOCI {
		t.Errorf("layout %v, want %v", s.Layout(), store.LayoutOCI)
	}
	checkTree(t, s.Dir())
	for name, want := range map[string]string{
		"oci-layout": `{"imageLayoutVersion":"1.0.0"}`,
		"index.json": `{"manifests":[],"schemaVersion":2}`,
	} {
		if diff := cmp.Diff(want, string(readFile(t, filepath.Join(s.Dir(), name)))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if names := tagNames(t, s); len(names) != 0 {
		t.Errorf("tags %q in a new layout", names)
	}

	// Opening it again changes nothing.
	put(t, s, manifestData)
	if err := s.Tag("kept", manifest()); err != nil {
		t.Fatal(err)
	}
	before := readFile(t, filepath.Join(s.Dir(), "index.json"))
	again := open(t, store.Config{Dir: s.Dir(), Create: true})
	if diff := cmp.Diff(string(before), string(readFile(t, filepath.Join(s.Dir(), "index.json")))); diff != "" {
		t.Errorf("index.json after opening it again (-want +got):\n%s", diff)
	}
	if _, err := again.Resolve("kept"); err != nil {
		t.Error(err)
	}
}

func TestCreateConcurrently(t *testing.T) {
	for range 20 {
		dir := filepath.Join(t.TempDir(), "layout")
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				s, err := store.Open(store.Config{Dir: dir, Create: true})
				if err != nil {
					t.Error(err)
					return
				}
				defer s.Close()
				if err := s.Put(manifestData, format.Digest{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		checkTree(t, dir)
	}
}

func TestOpenNoLayout(t *testing.T) {
	file := func(name, content string) func(*testing.T, string) {
		return func(t *testing.T, dir string) { writeFile(t, filepath.Join(dir, name), []byte(content)) }
	}
	tests := []struct {
		name    string
		prepare func(t *testing.T, dir string)
		create  bool
		want    []string // in the message
	}{
		{"no directory", func(t *testing.T, dir string) {
			if err := os.Remove(dir); err != nil {
				t.Fatal(err)
			}
		}, false, []string{"no such directory", "build or pull"}},
		{"a file", func(t *testing.T, dir string) {
			if err := os.Remove(dir); err != nil {
				t.Fatal(err)
			}
			writeFile(t, dir, nil)
		}, false, []string{"not a directory"}},
		{"empty directory", func(*testing.T, string) {}, false, []string{"empty", "build or pull"}},
		{"other files", file("notes.txt", ""), false, []string{`"notes.txt"`, "oci-layout"}},
		{"other files, create", file("notes.txt", ""), true, []string{`"notes.txt"`, "new or empty one"}},
		{"other version", file("oci-layout", `{"imageLayoutVersion":"9.9"}`), true, []string{`"9.9"`, `"1.0.0"`}},
		{"no version", file("oci-layout", `{}`), true, []string{`""`}},
		{"layout file is not JSON", file("oci-layout", `1.0.0`), true, []string{"restore"}},
		{"layout file is empty", file("oci-layout", ``), true, []string{"restore"}},
		{"no blobs", file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`), false, []string{"blobs/sha256"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "dir")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			test.prepare(t, dir)
			before := list(t, dir)
			_, err := store.Open(store.Config{Dir: dir, Create: test.create})
			if !errors.Is(err, store.ErrNotALayout) {
				t.Fatalf("error %v, want ErrNotALayout", err)
			}
			for _, want := range append(test.want, dir) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not mention %q", err, want)
				}
			}
			if diff := cmp.Diff(before, list(t, dir)); diff != "" {
				t.Errorf("the directory was changed (-before +after):\n%s", diff)
			}
		})
	}
}

// list returns the names in a directory, nil if it is none.
func list(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestOpenBadConfig(t *testing.T) {
	for name, cfg := range map[string]store.Config{
		"no directory":         {},
		"negative timeout":     {Dir: "x", LockTimeout: -1},
		"negative table bytes": {Dir: "x", TableBytes: -1},
		"few table bytes":      {Dir: "x", TableBytes: 1},
	} {
		if _, err := store.Open(cfg); err == nil || !strings.HasPrefix(err.Error(), "open layout") {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestClose(t *testing.T) {
	s := create(t, store.Config{})
	d := put(t, s, manifestData)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	_, sizeErr := s.Size(d)
	_, getErr := s.Get(t.Context(), d, 100)
	_, readErr := s.ReadBlobAt(t.Context(), d, make([]byte, 1), 0)
	_, openErr := s.OpenBlob(d)
	_, tagsErr := s.Tags()
	_, resolveErr := s.Resolve("x")
	var blobsErr error
	for _, err := range s.Blobs() {
		blobsErr = err
	}
	for name, err := range map[string]error{
		"Size": sizeErr, "Get": getErr, "ReadBlobAt": readErr, "OpenBlob": openErr, "Tags": tagsErr,
		"Resolve": resolveErr, "Blobs": blobsErr,
		"Put":       s.Put(manifestData, d),
		"PutReader": s.PutReader(t.Context(), d, -1, strings.NewReader("")),
		"Verify":    s.Verify(t.Context(), d),
		"Remove":    s.Remove(d),
		"Sync":      s.Sync(),
		"Tag":       s.Tag("x", manifest()),
		"Untag":     s.Untag("x"),
	} {
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s after Close: error %v, want fs.ErrClosed", name, err)
		}
	}
}

// TestCloseDuringUse closes stores while they are used: the descriptor of a directory must
// not be used after it was closed, when it may mean another file.
func TestCloseDuringUse(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	for range 20 {
		s, err := store.Open(store.Config{Dir: dir, Create: true})
		if err != nil {
			t.Fatal(err)
		}
		started := make(chan struct{}, 4)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for i := 0; ; i++ {
					err := s.Put(manifestData, format.Digest{})
					if i == 0 {
						started <- struct{}{}
					}
					if errors.Is(err, fs.ErrClosed) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		<-started
		s.Close()
		wg.Wait()
	}
}

func TestReferenceLayouts(t *testing.T) {
	manifests := func(mediaType string, digests ...string) []format.Descriptor {
		var want []format.Descriptor
		for i, tag := range []string{"small", "changed", "small-zstd", "segments"} {
			d, err := format.ParseHex(digests[i])
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, format.Descriptor{
				Annotations: map[string]string{format.AnnotationRefName: tag}, Digest: d, MediaType: mediaType,
			})
		}
		return want
	}
	private := store.LayoutPrivate
	tests := []struct {
		name   string
		layout store.Layout
		want   []format.Descriptor
		sizes  []int64
	}{
		{"v1-git", private, manifests(format.MediaTypeRootfs,
			"d19630dd2dbe0b326628e1cd032e8a990cf9913237868702e450f76be74623a0",
			"5eef649285b96cdf912463a05f3f72894da34530186d6d8532bc63eb42f2ae41",
			"07a5e6d21dccb6b12196844aa8e398fbe859f2c1ae0715fecb23bc5d98154649",
			"b5f84afb1f3aff45f190ad37392338ad5167eb4cf51d10806c42437adbf5a7a3"), []int64{592, 888, 592, 832}},
		{"v2-0.1.0", private, manifests(format.MediaTypeRootfs,
			"8964bb2baf6f9e36a49d8b2e555fd96d2f9ba9a4881de9b1b871007980ffbdfb",
			"2f7ef7c698fac3caa030c2e64f9a7b071e4b5d35c488017bdfa1b7e1a53ac060",
			"6ce3c07c875916274b03f0b94752393258ccfdcc7ce1fb0514f377246d5c406b",
			"5579cca60f9df5f8bbc3e8115263cbb76b2022705cfbee5b78e4d3c61ddac024"), []int64{592, 888, 592, 832}},
		{"v3-0.2.0", store.LayoutOCI, manifests(format.MediaTypeManifest,
			"9f6cda1472e370be2a773a9dd47bdd6b58d9f69b8406360ba264a59d41373ca7",
			"4c49edf478a92d3859cbe6fc93e89a58ac33229f00e6702a8f4ab7339854f2a1",
			"f9049316b3be3a658a802859f0131c676bce6938f410393c05ea0352468afc1d",
			"3321cc822cb53527d1c509377a8d23fba84c9bb0ecdfdccc2dc155e1a3e6a5dc"), []int64{1256, 1256, 1281, 1726}},
		{"v3-master", store.LayoutOCI, manifests(format.MediaTypeManifest,
			"9f6cda1472e370be2a773a9dd47bdd6b58d9f69b8406360ba264a59d41373ca7",
			"4c49edf478a92d3859cbe6fc93e89a58ac33229f00e6702a8f4ab7339854f2a1",
			"e7f2b1e48c0c337295d58de8209cd2a106dec8eb68c7aae07424c2f9c92e0bf9",
			"3321cc822cb53527d1c509377a8d23fba84c9bb0ecdfdccc2dc155e1a3e6a5dc"), []int64{1256, 1256, 1280, 1726}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for i := range test.want {
				test.want[i].Size = test.sizes[i]
				if test.layout == store.LayoutOCI {
					test.want[i].Platform = &format.Platform{Architecture: "amd64", OS: "linux"}
				}
			}
			s := open(t, store.Config{Dir: copyLayout(t, test.name)})
			if s.Layout() != test.layout {
				t.Errorf("layout %v, want %v", s.Layout(), test.layout)
			}
			tags, err := s.Tags()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, tags); diff != "" {
				t.Errorf("Tags (-want +got):\n%s", diff)
			}
			for _, want := range test.want {
				got, err := s.Resolve(want.Annotations[format.AnnotationRefName])
				if err != nil {
					t.Error(err)
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("Resolve (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestPrivateLayoutIsReadOnly(t *testing.T) {
	dir := copyLayout(t, "v2-0.1.0")
	d := format.DigestOf(manifestData)
	writeFile(t, filepath.Join(dir, "blobs", "sha256", d.Hex()), manifestData)
	s := open(t, store.Config{Dir: dir, Create: true, LockTimeout: time.Second})
	for name, err := range map[string]error{
		"Put":       s.Put(chunkData, format.Digest{}),
		"PutReader": s.PutReader(t.Context(), d, -1, strings.NewReader("")),
		"Remove":    s.Remove(d),
		"Tag":       s.Tag("x", manifest()),
		"Untag":     s.Untag("small"),
	} {
		if !errors.Is(err, store.ErrReadOnly) || !strings.Contains(err.Error(), "extract and rebuild") || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: error %v, want ErrReadOnly that says what to do with %s", name, err, dir)
		}
	}
	if b, err := s.Get(t.Context(), d, 1000); err != nil || string(b) != string(manifestData) {
		t.Errorf("Get: %q, %v", b, err)
	}
	if diff := cmp.Diff(string(readFile(t, "testdata/layouts/v2-0.1.0/index.json")), string(readFile(t, filepath.Join(dir, "index.json")))); diff != "" {
		t.Errorf("index.json (-want +got):\n%s", diff)
	}
}

// TestReadOnlyFileSystem reads a layout that cannot be written, and tries to write it.
func TestReadOnlyFileSystem(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	mnt := t.TempDir()
	must(t, unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	first, err := store.Open(store.Config{Dir: mnt, Create: true})
	must(t, err)
	must(t, build(first))
	must(t, first.Close())
	must(t, unix.Mount("", mnt, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	for _, create := range []bool{false, true} {
		s, err := store.Open(store.Config{Dir: mnt, Create: create})
		must(t, err)
		defer s.Close() // before the file system is unmounted
		d, err := s.Resolve("new")
		must(t, err)
		must(t, s.Verify(t.Context(), d.Digest))
		must(t, s.Put(manifestData, d.Digest)) // it is there
		for op, err := range map[string]error{
			"Put":       s.Put([]byte("x"), format.Digest{}),
			"PutReader": s.PutReader(t.Context(), d.Digest, -1, strings.NewReader("")),
			"Tag":       s.Tag("x", manifest()),
			"Untag":     s.Untag("new"),
			"Remove":    s.Remove(d.Digest),
		} {
			if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), "writable") {
				t.Errorf("%s: error %v, want EROFS and the cure", op, err)
			}
		}
	}
	if _, err := store.Open(store.Config{Dir: filepath.Join(mnt, "new"), Create: true}); !errors.Is(err, unix.EROFS) {
		t.Errorf("Open: error %v, want EROFS", err)
	}
}

func TestSplitRef(t *testing.T) {
	tests := []struct {
		in, dir, tag string
		ok           bool
	}{
		{"layout:tag", "layout", "tag", true},
		{"/a/b:1.0", "/a/b", "1.0", true},
		{"a:b:c", "a:b", "c", true},
		{"dir:with space", "dir", "with space", true},
		{"dir:" + strings.Repeat("x", store.MaxTagLen), "dir", strings.Repeat("x", store.MaxTagLen), true},
		{"layout", "", "", false},
		{"layout:", "", "", false},
		{":tag", "", "", false},
		{"", "", "", false},
		{"dir:a\nb", "", "", false},
		{"dir:a\x7fb", "", "", false},
		{"dir:\xff", "", "", false},
		{"dir:" + strings.Repeat("x", store.MaxTagLen+1), "", "", false},
	}
	for _, test := range tests {
		dir, tag, err := store.SplitRef(test.in)
		if dir != test.dir || tag != test.tag || (err == nil) != test.ok {
			t.Errorf("SplitRef(%.40q) = %q, %q, %v", test.in, dir, tag, err)
		}
		if err != nil && (!errors.Is(err, store.ErrInvalidTag) || !strings.Contains(err.Error(), "LAYOUT:TAG")) {
			t.Errorf("SplitRef(%.40q): error %v, want ErrInvalidTag that names the form", test.in, err)
		}
	}
}
