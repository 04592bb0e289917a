package reftest_test

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/reftest"
)

// recorder is a testing.TB that remembers how Binary ended.
type recorder struct {
	testing.TB
	skipped, failed bool
}

func (r *recorder) Helper() {}

func (r *recorder) Skipf(string, ...any) {
	r.skipped = true
	runtime.Goexit()
}

func (r *recorder) Fatalf(string, ...any) {
	r.failed = true
	runtime.Goexit()
}

func TestBinary(t *testing.T) {
	script := func(t *testing.T, path, text string) {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const current = "echo puzzlefs " + reftest.Version
	for name, test := range map[string]struct {
		// cached and named are scripts in the cache and at PUZZLEFS_REFERENCE; "" is no file
		cached, named        string
		setNamed, require    bool
		skipped, failed      bool
		wantNamed, wantCache bool
	}{
		"nothing there":          {skipped: true},
		"nothing there, wanted":  {require: true, failed: true},
		"in the cache":           {cached: current, require: true, wantCache: true},
		"in the cache but old":   {cached: "echo puzzlefs 0.1.0", failed: true},
		"named":                  {cached: current, named: current, setNamed: true, wantNamed: true},
		"named but missing":      {cached: current, setNamed: true, failed: true},
		"named but does not run": {named: "exit 1", setNamed: true, failed: true},
	} {
		t.Run(name, func(t *testing.T) {
			cache, dir := t.TempDir(), t.TempDir()
			inCache := filepath.Join(cache, "csi-puzzlefs", "reference", "bin", "puzzlefs")
			named := filepath.Join(dir, "puzzlefs")
			if test.cached != "" {
				script(t, inCache, test.cached)
			}
			if test.named != "" {
				script(t, named, test.named)
			}
			t.Setenv("XDG_CACHE_HOME", cache)
			t.Setenv("PUZZLEFS_REFERENCE", "")
			t.Setenv("REQUIRE_REFERENCE", "")
			if test.setNamed {
				t.Setenv("PUZZLEFS_REFERENCE", named)
			}
			if test.require {
				t.Setenv("REQUIRE_REFERENCE", "1")
			}
			want := ""
			if test.wantNamed {
				want = named
			}
			if test.wantCache {
				want = inCache
			}

			var got string
			r := &recorder{TB: t}
			done := make(chan struct{})
			go func() { // Skipf and Fatalf end the goroutine that calls them
				defer close(done)
				got = reftest.Binary(r)
			}()
			<-done
			if got != want || r.skipped != test.skipped || r.failed != test.failed {
				t.Errorf("Binary = %q, skipped %t, failed %t; want %q, %t, %t",
					got, r.skipped, r.failed, want, test.skipped, test.failed)
			}
		})
	}
}
