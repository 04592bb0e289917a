package store_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/google/go-cmp/cmp"
)

// FuzzIndex checks the decoder of index.json: whatever is accepted keeps its members and
// entries when it is encoded, and what was encoded once encodes to itself.
func FuzzIndex(f *testing.F) {
	seeds, err := filepath.Glob("testdata/layouts/*/index.json")
	if err != nil || len(seeds) < 4 {
		f.Fatalf("seeds missing: %q, %v", seeds, err)
	}
	if _, err := os.Stat("testdata/fuzz/FuzzIndex"); err != nil {
		f.Fatalf("seeds missing: %v", err)
	}
	for _, seed := range seeds {
		b, err := os.ReadFile(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(foreignIndex))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, layout := range []store.Layout{store.LayoutOCI, store.LayoutPrivate} {
			x, err := store.ParseIndex(b, layout)
			if err != nil {
				continue
			}
			once, err := x.Encode()
			if err != nil {
				t.Fatal(err)
			}
			y, err := store.ParseIndex(once, layout)
			if err != nil {
				t.Fatalf("%q is encoded as %q: %v", b, once, err)
			}
			xf, xe := x.Raw()
			yf, ye := y.Raw()
			raw := cmp.Comparer(func(a, b json.RawMessage) bool { return bytes.Equal(a, b) })
			if diff := cmp.Diff(xf, yf, raw); diff != "" {
				t.Errorf("members (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(xe, ye, raw); diff != "" {
				t.Errorf("entries (-want +got):\n%s", diff)
			}
			twice, err := y.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(once, twice) {
				t.Errorf("%q is encoded as %q", once, twice)
			}
		}
	})
}

// TestReferenceIndexReencodes checks that what the reference wrote encodes to itself.
func TestReferenceIndexReencodes(t *testing.T) {
	for _, name := range []string{"layouts/v3-0.2.0/index.json", "layouts/v3-master/index.json", "retag/3-one.json"} {
		b := readFile(t, filepath.Join("testdata", name))
		x, err := store.ParseIndex(b, store.LayoutOCI)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := x.Encode()
		must(t, err)
		if diff := cmp.Diff(string(b), string(got)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}
