package format_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// seeds adds every blob of a layout of the given size at most, and fails when there is none.
func seeds(f *testing.F, layouts ...string) {
	f.Helper()
	n := 0
	for _, layout := range layouts {
		names, err := filepath.Glob(filepath.Join(images, layout, "blobs", "sha256", "*"))
		if err != nil {
			f.Fatal(err)
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			if len(b) <= 8<<10 {
				f.Add(b)
				n++
			}
		}
	}
	if n == 0 {
		f.Fatal("no seeds: testdata/images is missing")
	}
}

// What is accepted is encoded to a message that is decoded to the same.
func FuzzDecodeRootfs(f *testing.F) {
	seeds(f, "v1-git", "v2-0.1.0", "v3-0.2.0", "v3-master")
	b, err := format.EncodeRootfs(sample())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		sameDecoded(t, b)
		r, err := format.DecodeRootfs(b)
		if err != nil || r.Version != format.Version3 {
			return
		}
		encoded, err := format.EncodeRootfs(r)
		if err != nil {
			t.Fatalf("decoded but not encoded: %v", err)
		}
		again, err := format.DecodeRootfs(encoded)
		if err != nil {
			t.Fatalf("encoded but not decoded: %v", err)
		}
		if diff := cmp.Diff(r, again); diff != "" {
			t.Errorf("(-decoded +encoded and decoded):\n%s", diff)
		}
	})
}

// An inode vector of an old version is a layer of the new one.
func FuzzDecodeInodeVector(f *testing.F) {
	seeds(f, "v1-git", "v2-0.1.0")
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range []format.Version{format.Version1, format.Version2} {
			inodes, err := format.DecodeInodeVector(b, v)
			if err != nil {
				continue
			}
			if _, err := format.EncodeRootfs(&format.Rootfs{Layers: []format.InodeVector{inodes}}); err != nil {
				t.Fatalf("decoded as version %d but not encoded: %v", v, err)
			}
		}
	})
}

// An accepted manifest is encoded to a canonical form, which is encoded to itself.
func FuzzParseManifest(f *testing.F) {
	seeds(f, "v3-master")
	f.Fuzz(func(t *testing.T, b []byte) {
		sameParsed(t, b)
		m, err := format.ParseManifest(b)
		if err != nil {
			return
		}
		once, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := format.ParseManifest(once)
		if err != nil {
			t.Fatal(err)
		}
		twice, err := again.Encode()
		if err != nil || !bytes.Equal(once, twice) {
			t.Errorf("%v\n%s\n%s", err, once, twice)
		}
	})
}
