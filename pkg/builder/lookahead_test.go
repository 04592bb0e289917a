package builder_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
)

// wideTree makes a directory with more names, and more subdirectories, than are looked at ahead at once.
func wideTree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	var paths []string
	for i := range 2500 {
		paths = append(paths, fmt.Sprintf("many/%d", i))
	}
	for i := range 150 {
		for k := range 3 {
			paths = append(paths, fmt.Sprintf("wide/%d/%c/f", i, 'a'+k))
		}
	}
	for _, path := range paths {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(path), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Whoever looks at what first, the image is the same.
func TestLookAhead(t *testing.T) {
	dir := wideTree(t)
	exclude, err := builder.ParsePattern("wide/*[1-8]")
	if err != nil {
		t.Fatal(err)
	}
	for name, minimal := range map[string]builder.Minimal{
		"all": {}, "no devices": {NoDevices: true}, "excluded": {Exclude: []builder.Pattern{exclude}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			want := build(t, builder.Config{Dir: dir, Store: s, Tag: "t", Minimal: minimal, Workers: 1})
			if name != "excluded" {
				shows(t, s, "t", fromDir(t, dir))
			}
			for range 10 {
				if r := build(t, builder.Config{Dir: dir, Store: s, Tag: "t", Minimal: minimal, Workers: 8}); r.Manifest.Digest != want.Manifest.Digest {
					t.Fatalf("another image: %s, want %s", r.Manifest.Digest, want.Manifest.Digest)
				}
			}
		})
	}
}

// A walk that is given up leaves no directory open.
func TestLookAheadGivenUp(t *testing.T) {
	dir, s := wideTree(t), newStore(t)
	build(t, builder.Config{Dir: dir, Store: s, Tag: "t"})
	before := openFiles(t)
	stopped := 0
	for i := range 40 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*500*time.Microsecond)
		_, err := builder.Build(ctx, builder.Config{Dir: dir, Store: s, Tag: "t", Workers: 4})
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		if err != nil {
			stopped++
		}
	}
	if stopped == 0 {
		t.Error("no build was stopped")
	}
	if n := openFiles(t); n > before {
		t.Errorf("%d open files, %d before", n, before)
	}
}
