package builder_test

import (
	"errors"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// FuzzUpper builds from upper directories of any sense: no panic, and what is not refused makes an
// image that is in good order, with no directory in two places and no chunk too few.
func FuzzUpper(f *testing.F) {
	names := []string{"a", "b", "f", "l", "new", "n"}
	targets := []string{"a", "b", "/a", "/a/b", "/b", "/a/f", "/l", "f", "/none"}
	f.Add([]byte{0, 0, 0, 0, 0, 0, 2, 0, 1, 1, 1, 0, 4, 0, 0, 0, 0, 1, 1, 9})
	f.Add([]byte{4, 0, 1, 0, 0, 1, 1, 9, 0, 0, 1, 0, 1, 0, 2, 1, 2, 1, 2, 1, 2, 2})
	f.Add([]byte{3, 0, 1, 1, 2, 1, 3, 4, 2, 0, 1, 1, 2, 1, 3, 4})
	dir := f.TempDir()
	write(f, dir, map[string]string{"a/b/f": "content", "a/f": "content", "b/f": "content", "a/l": "linked", "l": "=a/l", "b/l": "=a/l"})
	tree := &memStore{blobs: make(map[format.Digest][]byte)}
	base := build(f, builder.Config{Dir: dir, Store: tree, Tag: "base", Workers: 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1000 {
			t.Skip("large inputs only take long")
		}
		s := &memStore{blobs: make(map[format.Digest][]byte)}
		for d, blob := range tree.blobs {
			s.blobs[d] = blob
		}
		_, err := builder.BuildUpperOf(t.Context(), builder.Config{
			Upper: "fuzz", Store: s, Tag: "t", BaseManifest: base.Manifest.Digest, Workers: 1,
		}, names, targets, b)
		switch {
		case err == nil:
			imageTree(t, s, "t")
		case !errors.Is(err, builder.ErrUpper):
			t.Fatal(err)
		}
	})
}
