package builder_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// Layers go over each other as the OCI image specification says.
func TestLayers(t *testing.T) {
	lower := []entry{
		dir("a", 0o700), file("a/one", "1"), file("a/two", "22"), file("a/sub/three", "333"), file("b", "b"),
		symlink("lib", "usr/lib"), dir("usr/lib", 0o755), file("usr/lib/l", "l"), link("hard", "b"),
	}
	// want lists what lower shows, less some and with others.
	all := []string{"/", "/a", "/a/one=1", "/a/sub", "/a/sub/three=3", "/a/two=2", "/b=1", "/hard=1", "/lib->usr/lib", "/usr", "/usr/lib", "/usr/lib/l=1"}
	for _, tt := range []struct {
		name     string
		upper    []entry
		gone, is []string
	}{
		{"nothing", nil, nil, nil},
		{"whiteout of a file", []entry{file("a/.wh.one", "")}, []string{"/a/one=1"}, nil},
		{"whiteout of a directory", []entry{file(".wh.a", "")}, []string{"/a", "/a/one=1", "/a/sub", "/a/sub/three=3", "/a/two=2"}, nil},
		{"whiteout of nothing", []entry{file("a/.wh.none", ""), file("new/.wh.none", "")}, nil, []string{"/new"}},
		{"whiteout and the name again", []entry{file(".wh.b", ""), file("b", "new")}, []string{"/b=1"}, []string{"/b=3"}},
		{"the name and its whiteout", []entry{file("b", "new"), file(".wh.b", "")}, []string{"/b=1"}, []string{"/b=3"}},
		{"whiteout and the directory again", []entry{file("a/new", "x"), file(".wh.a", "")}, []string{"/a/one=1", "/a/sub", "/a/sub/three=3", "/a/two=2"}, []string{"/a/new=1"}},
		{"opaque first", []entry{file("a/.wh..wh..opq", ""), file("a/new", "x")}, []string{"/a/one=1", "/a/sub", "/a/sub/three=3", "/a/two=2"}, []string{"/a/new=1"}},
		{"opaque last", []entry{dir("a", 0o755), file("a/new", "x"), file("a/sub/new", "x"), file("a/.wh..wh..opq", "")}, []string{"/a/one=1", "/a/sub/three=3", "/a/two=2"}, []string{"/a/new=1", "/a/sub/new=1"}},
		{"opaque root", []entry{file(".wh..wh..opq", ""), file("only", "x")}, all[1:], []string{"/only=1"}},
		{"a file for a directory", []entry{file("a", "xx")}, []string{"/a", "/a/one=1", "/a/sub", "/a/sub/three=3", "/a/two=2"}, []string{"/a=2"}},
		{"a file and then a directory for a directory", []entry{file("a", "xx"), file("a/new", "x")}, []string{"/a/one=1", "/a/sub", "/a/sub/three=3", "/a/two=2"}, []string{"/a/new=1"}},
		{"the same, listed", []entry{file("a", "xx"), dir("a", 0o700), file("a/new", "x")}, []string{"/a/one=1", "/a/sub", "/a/sub/three=3", "/a/two=2"}, []string{"/a/new=1"}},
		{"a directory for a file", []entry{file("b/c", "x")}, []string{"/b=1"}, []string{"/b", "/b/c=1"}},
		{"a directory for a symlink", []entry{dir("lib", 0o755), file("lib/x", "x")}, []string{"/lib->usr/lib"}, []string{"/lib", "/lib/x=1"}},
		{"through a symlink below", []entry{file("lib/x", "x"), file("lib/.wh.l", "")}, []string{"/usr/lib/l=1"}, []string{"/usr/lib/x=1"}},
		{"through a symlink that is hidden", []entry{file(".wh.lib", ""), file("lib/x", "x")}, []string{"/lib->usr/lib"}, []string{"/lib", "/lib/x=1"}},
		{"hard link to below", []entry{link("c", "b"), link("lib/d", "a/one")}, nil, []string{"/c=1", "/usr/lib/d=1"}},
		{"one of two hard links", []entry{file("b", "new")}, []string{"/b=1"}, []string{"/b=3"}},
		{"hard link kept, file hidden", []entry{file("a/.wh.one", ""), link("c", "b"), file(".wh.b", "")}, []string{"/a/one=1", "/b=1"}, []string{"/c=1"}},
		{"what old layers had for themselves", []entry{dir(".wh..wh.plnk", 0o755), file(".wh..wh.plnk/1.2", "x"), file(".wh..wh.aufs", "")}, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := make(map[string]bool)
			for _, p := range append(all, tt.is...) {
				want[p] = true
			}
			for _, p := range tt.gone {
				delete(want, p)
			}
			for _, p := range tt.is {
				want[p] = true
			}
			for _, got := range []string{
				paths(t, readImage(t, newImages(t, pack(t, lower...), pack(t, tt.upper...)))),
				// With layers above, below and between that change nothing.
				paths(t, readImage(t, newImages(t, pack(t), pack(t, lower...), pack(t, dir("a", 0o700)), pack(t, tt.upper...), pack(t)))),
			} {
				for _, p := range strings.Fields(got) {
					if !want[p] {
						t.Errorf("there is %s", p)
					}
				}
				if n := len(strings.Fields(got)); n != len(want) {
					t.Errorf("%d paths, want %d: %s", n, len(want), got)
				}
			}
		})
	}
}

// A directory's own attributes are those of the topmost layer that lists it.
func TestLayersKeepAttributes(t *testing.T) {
	im := newImages(t, pack(t, dir("a", 0o700), dir("b", 0o700), dir("./", 0o711)), pack(t, file("a/x", ""), dir("b", 0o770), file("b/y", "")))
	s := newStore(t)
	build(t, builder.Config{Tree: readImage(t, im), Store: s, Tag: "t"})
	got := make(map[string]uint16)
	for _, e := range imageTree(t, s, "t") {
		got[e.Path] = e.Perm
	}
	for path, want := range map[string]uint16{"/": 0o711, "/a": 0o700, "/b": 0o770} {
		if got[path] != want {
			t.Errorf("%s has %#o, want %#o", path, got[path], want)
		}
	}
}

func TestPlatforms(t *testing.T) {
	im := new(images)
	entries := []map[string]any{}
	for _, p := range []struct{ os, arch, variant string }{
		{"linux", "amd64", ""}, {"linux", "arm64", "v8"}, {"linux", "arm", "v6"}, {"linux", "arm", "v7"}, {"unknown", "unknown", ""}, {"windows", "amd64", ""},
	} {
		d := im.addImage(t, p.arch, pack(t, file(p.os+"-"+p.arch+p.variant, "")))
		d["platform"] = map[string]string{"os": p.os, "architecture": p.arch, "variant": p.variant}
		entries = append(entries, d)
	}
	im.putJSON(t, ociIndex, map[string]any{"schemaVersion": 2, "mediaType": ociIndex, "manifests": entries})
	nested := im.putJSON(t, ociIndex, map[string]any{"schemaVersion": 2, "manifests": []any{im.putJSON(t, ociIndex, map[string]any{"schemaVersion": 2, "manifests": entries})}})
	for platform, want := range map[string]string{
		"": "/ /linux-" + runtime.GOARCH, "linux/amd64": "/ /linux-amd64=0", "linux/arm64": "/ /linux-arm64v8=0", "linux/arm64/v8": "/ /linux-arm64v8=0",
		"linux/arm": "/ /linux-armv6=0", "linux/arm/v7": "/ /linux-armv7=0", "windows/amd64": "/ /windows-amd64=0",
	} {
		p, err := builder.ParsePlatform(platform)
		if err != nil {
			t.Fatal(err)
		}
		tree, err := builder.ReadImage(t.Context(), im, p, true, builder.ReadConfig{WorkDir: t.TempDir()})
		if p.OS != "linux" {
			// The configuration in these images says linux.
			if !errors.Is(err, builder.ErrNoPlatform) {
				t.Errorf("%s: %v", platform, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := paths(t, tree); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s, want %s", platform, got, want)
		}
		closeTree(t, tree)
	}
	_, err := builder.ReadImage(t.Context(), im, builder.Platform{OS: "linux", Architecture: "s390x"}, false, builder.ReadConfig{WorkDir: t.TempDir()})
	if !errors.Is(err, builder.ErrNoPlatform) || !strings.Contains(err.Error(), "linux/s390x") ||
		!strings.Contains(err.Error(), "linux/amd64, linux/arm/v6, linux/arm/v7, linux/arm64/v8, windows/amd64:") {
		t.Errorf("no such platform: %v", err)
	}
	d, err := json.Marshal(nested)
	if err != nil {
		t.Fatal(err)
	}
	if got := paths(t, readImage(t, im)); got != "/ /linux-amd64=0" {
		t.Errorf("through two indexes (%s): %s", d, got)
	}
	for _, bad := range []string{"linux", "linux/", "/amd64", "a/b/c/d"} {
		if _, err := builder.ParsePlatform(bad); !errors.Is(err, builder.ErrConfig) {
			t.Errorf("platform %q: %v", bad, err)
		}
	}
}

// What is no container image, or not what it says, is refused in words that say so.
func TestReadImageRefuses(t *testing.T) {
	layer := pack(t, file("a", "x"))
	other := pack(t, file("b", "x"))
	// change returns an image whose manifest, or configuration, was changed.
	change := func(manifest func(im *images, m map[string]any)) *images {
		im := newImages(t, layer)
		var m map[string]any
		if err := json.Unmarshal(im.blobs[im.top], &m); err != nil {
			t.Fatal(err)
		}
		manifest(im, m)
		im.putJSON(t, ociManifest, m)
		return im
	}
	first := func(m map[string]any) map[string]any {
		layers, ok := m["layers"].([]any)
		if !ok {
			t.Fatal("no layers")
		}
		d, ok := layers[0].(map[string]any)
		if !ok {
			t.Fatal("no layer")
		}
		return d
	}
	config := func(im *images, m map[string]any, doc string) { m["config"] = im.put(ociConfig, []byte(doc)) }
	for _, tt := range []struct {
		name  string
		im    *images
		kind  error
		words []string
	}{
		{"a PuzzleFS image", change(func(_ *images, m map[string]any) { first(m)["mediaType"] = format.MediaTypeRootfs }), builder.ErrNotContainer, []string{"PuzzleFS image already", "pull"}},
		{"an artifact", change(func(im *images, m map[string]any) {
			m["config"] = im.put("application/vnd.cncf.helm.config.v1+json", []byte("{}"))
		}), builder.ErrNotContainer, []string{"helm.config"}},
		{"no configuration", change(func(_ *images, m map[string]any) { delete(m, "config") }), builder.ErrNotContainer, []string{"no configuration"}},
		{"schema 1", change(func(_ *images, m map[string]any) { m["schemaVersion"] = 1 }), builder.ErrNotContainer, []string{"schemaVersion 1"}},
		{"image and index", change(func(_ *images, m map[string]any) { m["manifests"] = []any{} }), builder.ErrNotContainer, []string{"at once"}},
		{"another media type", change(func(_ *images, m map[string]any) { m["mediaType"] = "text/plain" }), builder.ErrNotContainer, []string{"text/plain"}},
		{"a foreign layer", change(func(_ *images, m map[string]any) {
			first(m)["mediaType"] = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
		}), builder.ErrNotContainer, []string{"layer 1 of 1", "may not be distributed"}},
		{"a nondistributable layer", change(func(_ *images, m map[string]any) {
			first(m)["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
		}), builder.ErrNotContainer, []string{"may not be distributed"}},
		{"an encrypted layer", change(func(_ *images, m map[string]any) {
			first(m)["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
		}), builder.ErrNotContainer, []string{"encrypted"}},
		{"a hard link to what a file hides", newImages(t, pack(t, file("d/f", "x")), pack(t, file("d", "x"), link("h", "d/f"))), builder.ErrArchive, []string{"layer 2 of 2", `"d/f"`, "not there"}},
		{"an unknown layer", change(func(_ *images, m map[string]any) { first(m)["mediaType"] = "application/x-cpio" }), builder.ErrNotContainer, []string{"unsupported type", "x-cpio"}},
		{"sha512", change(func(_ *images, m map[string]any) { first(m)["digest"] = "sha512:" + strings.Repeat("0", 128) }), builder.ErrNotContainer, []string{"sha512"}},
		{"negative size", change(func(_ *images, m map[string]any) { first(m)["size"] = -1 }), builder.ErrNotContainer, []string{"size is -1"}},
		{"a layer that is not there", change(func(_ *images, m map[string]any) { first(m)["digest"] = format.DigestOf([]byte("none")).String() }), store.ErrNotFound, []string{"layer 1 of 1"}},
		{"other content than configured", change(func(im *images, m map[string]any) {
			config(im, m, fmt.Sprintf(`{"rootfs":{"type":"layers","diff_ids":["%s"]}}`, format.DigestOf(other)))
		}), builder.ErrArchive, []string{"uncompressed it is", format.DigestOf(layer).String(), format.DigestOf(other).String()}},
		{"more layers than configured", change(func(im *images, m map[string]any) { config(im, m, `{"rootfs":{"type":"layers","diff_ids":[]}}`) }), builder.ErrNotContainer, []string{"lists 0 layers", "manifest 1"}},
		{"another rootfs type", change(func(im *images, m map[string]any) { config(im, m, `{"rootfs":{"type":"wasm"}}`) }), builder.ErrNotContainer, []string{"wasm"}},
		{"configuration is no JSON", change(func(im *images, m map[string]any) { config(im, m, "x") }), builder.ErrNotContainer, []string{"configuration"}},
		{"configuration too large", change(func(_ *images, m map[string]any) {
			c, ok := m["config"].(map[string]any)
			if !ok {
				t.Fatal("no config")
			}
			c["size"] = 5 << 20
		}), format.ErrTooLarge, []string{"5242880"}},
		{"a layer that is cut", change(func(im *images, m map[string]any) {
			im.broken = func(_ format.Digest, b []byte) []byte {
				if bytes.HasPrefix(b, []byte("\x1f\x8b")) {
					return b[:len(b)/2]
				}
				return b
			}
		}), builder.ErrArchive, []string{"cut off"}},
		{"nothing tagged", new(images), store.ErrNotFound, nil},
		{"an empty index", func() *images {
			im := new(images)
			im.putJSON(t, ociIndex, map[string]any{"schemaVersion": 2, "manifests": []any{}})
			return im
		}(), builder.ErrNoPlatform, []string{"linux/amd64"}},
		{"a hostile layer", newImages(t, layer, pack(t, file("../x", ""))), builder.ErrArchive, []string{"layer 2 of 2", `"../x"`}},
		{"a whiteout of nothing", newImages(t, pack(t, file("d/.wh.", ""))), builder.ErrArchive, []string{`"d/.wh."`}},
		{"a whiteout of the parent", newImages(t, pack(t, file("d/.wh...", ""))), builder.ErrArchive, []string{`"d/.wh..."`}},
		{"a hard link to what is hidden", newImages(t, layer, pack(t, file(".wh.a", ""), link("b", "a"))), builder.ErrArchive, []string{"not there"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			work, before := t.TempDir(), openFiles(t)
			_, err := builder.ReadImage(t.Context(), tt.im, builder.Platform{OS: "linux", Architecture: "amd64"}, false,
				builder.ReadConfig{Name: "oci:x:y", WorkDir: work})
			if !errors.Is(err, tt.kind) {
				t.Fatalf("%v, want %v", err, tt.kind)
			}
			for _, w := range append(tt.words, "read oci:x:y: ") {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
			checkTidy(t, work, before)
		})
	}
}

// An image in a layout is found by its tag, index or not, and its blobs are checked.
func TestLayoutImages(t *testing.T) {
	s := newStore(t)
	im := newImages(t, pack(t, file("a", "x")))
	for d, b := range im.blobs {
		if err := s.Put(b, d); err != nil {
			t.Fatal(err)
		}
	}
	manifest := im.blobs[im.top]
	if err := s.Tag("image", format.Descriptor{Digest: im.top, Size: int64(len(manifest))}); err != nil {
		t.Fatal(err)
	}
	index := []byte(fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":"%s","size":%d,"platform":{"os":"linux","architecture":"amd64"}}]}`, ociManifest, im.top, len(manifest)))
	d := format.DigestOf(index)
	if err := s.Put(index, d); err != nil {
		t.Fatal(err)
	}
	if err := s.Tag("index", format.Descriptor{MediaType: ociIndex, Digest: d, Size: int64(len(index))}); err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{"image", "index"} {
		if got := paths(t, readImage(t, builder.NewLayoutImages(s, tag))); got != "/ /a=1" {
			t.Errorf("%s: %s", tag, got)
		}
	}
	read := func(tag string) error {
		tree, err := builder.ReadImage(t.Context(), builder.NewLayoutImages(s, tag), builder.Platform{OS: "linux", Architecture: "amd64"}, false, builder.ReadConfig{WorkDir: t.TempDir()})
		if err == nil {
			closeTree(t, tree)
		}
		return err
	}
	if err := read("none"); !errors.Is(err, store.ErrNotFound) || !strings.Contains(err.Error(), `"image", "index"`) {
		t.Errorf("no such tag: %v", err)
	}
	for d, b := range im.blobs {
		if !bytes.HasPrefix(b, []byte("\x1f\x8b")) {
			continue
		}
		// Another layer, also good, in its place.
		bad := gzipped(t, pack(t, file("evil", "x")))
		overwrite(t, s, d, bad[:min(len(bad), len(b))])
	}
	if err := read("image"); !errors.Is(err, store.ErrDigestMismatch) {
		t.Errorf("a damaged layer: %v", err)
	}
}
