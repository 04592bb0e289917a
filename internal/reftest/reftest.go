// Package reftest finds the reference implementation of PuzzleFS for the tests that run it.
// hack/reference.sh builds it.
package reftest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Version is the version of the reference that tests expect; hack/reference.sh builds it.
const Version = "0.2.0"

// Binary returns the path of the reference's program. It is the one that the environment
// variable PUZZLEFS_REFERENCE names, else the one that hack/reference.sh keeps in the user's
// cache. When there is none the test is skipped, and says so; it fails instead when
// REQUIRE_REFERENCE is 1, when PUZZLEFS_REFERENCE names something that does not run, and when the
// program has another version than [Version].
func Binary(t testing.TB) string {
	t.Helper()
	path, err := find()
	if err != nil {
		if os.Getenv("REQUIRE_REFERENCE") == "1" {
			t.Fatalf("REQUIRE_REFERENCE is 1: %v", err)
		}
		t.Skipf("not compared with the reference implementation: %v", err)
	}
	out, err := exec.CommandContext(t.Context(), path, "--version").Output()
	if err != nil {
		t.Fatalf("run %s --version: %v", path, err)
	}
	if got, want := strings.TrimSpace(string(out)), "puzzlefs "+Version; got != want {
		t.Fatalf("%s says that it is %q, the tests want %q", path, got, want)
	}
	return path
}

// find returns the path that Binary should use, or an error that says what is missing. A path
// from the environment is returned even when nothing is there: a wrong one is not a missing one.
func find() (string, error) {
	if p := os.Getenv("PUZZLEFS_REFERENCE"); p != "" {
		return p, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache directory: %w", err)
	}
	p := filepath.Join(cache, "csi-puzzlefs", "reference", "bin", "puzzlefs")
	if _, err := os.Stat(p); err != nil {
		return "", fmt.Errorf("no puzzlefs %s; hack/reference.sh builds it where there is a cargo: %w", Version, err)
	}
	return p, nil
}
