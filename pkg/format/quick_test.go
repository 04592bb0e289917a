package format_test

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// sameDecoded compares what is decoded quickly with what the library makes of it, and reports whether anything
// was. What the library reads and the other does not is no matter.
func sameDecoded(t *testing.T, b []byte) bool {
	t.Helper()
	got, ok := format.DecodeQuickly(b)
	if !ok {
		return false
	}
	want, err := format.DecodeAnyRootfs(b)
	switch {
	case err != nil && strings.Contains(err.Error(), "traversal limit"):
		// Both count what they read, each in its way.
	case err != nil:
		t.Errorf("decoded quickly, and refused by the library: %v", err)
	case !reflect.DeepEqual(want, got):
		t.Errorf("(-library +quickly):\n%s", cmp.Diff(want, got))
	}
	return true
}

// What writers write is decoded quickly, and as the library does it: the images of the reference, and our own.
func TestDecodedQuickly(t *testing.T) {
	ours, err := format.EncodeRootfs(sample())
	if err != nil {
		t.Fatal(err)
	}
	rootfses := map[string][]byte{"ours": ours}
	for name, b := range manifests(t) {
		m, err := format.ParseManifest(b)
		if err != nil {
			t.Fatal(err)
		}
		d, err := m.Rootfs()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(filepath.Dir(name), d.Digest.Hex())
		if rootfses[path], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	for name, b := range rootfses {
		if !sameDecoded(t, b) {
			t.Errorf("%s is not decoded quickly", name)
		}
	}
}

// A message of which a byte is changed, or that ends early, means what it means to the library, or nothing.
func TestDecodedQuicklyOrNot(t *testing.T) {
	b, err := format.EncodeRootfs(sample())
	if err != nil {
		t.Fatal(err)
	}
	quickly := 0
	for i := range b {
		for _, x := range []byte{0, 1, 2, 3, 5, 0x7f, 0xff} {
			changed := append([]byte(nil), b...)
			changed[i] ^= x
			if sameDecoded(t, changed) {
				quickly++
			}
		}
	}
	for n := 0; n < len(b); n += 4 {
		sameDecoded(t, b[:n])
	}
	if quickly < len(b) {
		t.Errorf("%d messages were decoded quickly: too few to say anything", quickly)
	}
}
