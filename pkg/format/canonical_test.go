package format_test

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// manifests returns the manifests of the reference's images of version 3.
func manifests(t *testing.T) map[string][]byte {
	t.Helper()
	found := map[string][]byte{}
	names, err := filepath.Glob(filepath.Join(images, "v3-*", "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.HasPrefix(b, []byte(`{"config"`)) {
			found[name] = b
		}
	}
	if len(found) == 0 {
		t.Fatal("no manifests: testdata/images is missing")
	}
	return found
}

// sameParsed compares what is made of a document with what is made of one of any form.
func sameParsed(t *testing.T, b []byte) {
	t.Helper()
	want, wantErr := format.ParseAny(b)
	got, err := format.ParseManifest(b)
	if (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
		t.Errorf("%s: error %v, want %v", b, err, wantErr)
	}
	if !reflect.DeepEqual(want, got) {
		t.Errorf("%s: (-any form +canonical):\n%s", b, cmp.Diff(want, got))
	}
}

// What the reference writes is read in the fast way, and as in the slow one.
func TestCanonicalManifests(t *testing.T) {
	for name, b := range manifests(t) {
		if !format.IsCanonical(b) {
			t.Errorf("%s is not taken for canonical: %s", name, b)
		}
		sameParsed(t, b)
	}
}

// No document means another thing in the fast way than in the slow one: a byte more, less or other.
func TestAlmostCanonicalManifests(t *testing.T) {
	var smallest []byte
	for _, b := range manifests(t) {
		if smallest == nil || len(b) < len(smallest) {
			smallest = b
		}
	}
	for i := range smallest {
		sameParsed(t, smallest[:i])
		sameParsed(t, append(smallest[:i:i], smallest[i+1:]...))
		for _, x := range []byte(`0a"{}[],: -.A`) {
			changed := bytes.Clone(smallest)
			changed[i] = x
			sameParsed(t, changed)
			sameParsed(t, append(append(smallest[:i:i], x), smallest[i:]...))
		}
	}
	// Eight digits of a digest are looked at at once.
	digest := bytes.LastIndex(smallest, []byte("sha256:")) + len("sha256:")
	for i := digest; i < digest+8; i++ {
		for x := range 256 {
			changed := bytes.Clone(smallest)
			changed[i] = byte(x)
			sameParsed(t, changed)
		}
	}
	sameParsed(t, append(bytes.Clone(smallest), ' '))
	huge := bytes.Replace(smallest, []byte(`"size":`), []byte(`"size":9223372036854775807`), 2)
	sameParsed(t, huge)
}

// What is written in the fast way is what is written in the slow one.
func TestEncodeManifest(t *testing.T) {
	d := format.DigestOf([]byte("chunk"))
	chunk := format.Descriptor{MediaType: format.MediaTypeChunk, Digest: d, Size: 65536}
	small := format.Descriptor{MediaType: format.MediaTypeChunkZstd, Digest: d, Size: 1}
	for name, change := range map[string]func(m *format.Manifest){
		"usual":            func(*format.Manifest) {},
		"no chunks":        func(m *format.Manifest) { m.Layers = m.Layers[:1] },
		"no layers":        func(m *format.Manifest) { m.Layers = nil },
		"note":             func(m *format.Manifest) { m.Annotations = map[string]string{"note": `"<&>`} },
		"media type":       func(m *format.Manifest) { m.MediaType = format.MediaTypeManifest },
		"another version":  func(m *format.Manifest) { m.SchemaVersion = 1 },
		"chunk with data":  func(m *format.Manifest) { m.Layers[1].Data = []byte("x") },
		"chunk with note":  func(m *format.Manifest) { m.Layers[1].Annotations = map[string]string{"a": "b"} },
		"chunk for one":    func(m *format.Manifest) { m.Layers[1].Platform = &format.Platform{OS: "linux"} },
		"other chunk":      func(m *format.Manifest) { m.Layers[2].MediaType = `text/"<plain>"` },
		"negative size":    func(m *format.Manifest) { m.Layers[2].Size = -1 },
		"empty annotation": func(m *format.Manifest) { m.Layers[2].Annotations = map[string]string{} },
	} {
		m := format.NewManifest(format.Descriptor{Digest: d, Size: 1 << 40}, d, []format.Descriptor{chunk, small, chunk})
		change(m)
		got, err := m.Encode()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want, err := format.CanonicalJSON(m)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s: (-any form +canonical):\n%s", name, diff)
		}
	}
}

func BenchmarkParseManifest(b *testing.B) {
	d := format.DigestOf([]byte("chunk"))
	var chunks []format.Descriptor
	for range 14_000 {
		chunks = append(chunks, format.Descriptor{MediaType: format.MediaTypeChunk, Digest: d, Size: 65536})
	}
	doc, err := format.NewManifest(format.Descriptor{Digest: d, Size: 1 << 20}, d, chunks).Encode()
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(doc)))
	for b.Loop() {
		if _, err := format.ParseManifest(doc); err != nil {
			b.Fatal(err)
		}
	}
}
