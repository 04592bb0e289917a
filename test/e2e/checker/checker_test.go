package main

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/tree"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// checker runs a command line and returns what it prints.
func checker(t *testing.T, line ...string) (string, error) {
	t.Helper()
	var stdout bytes.Buffer
	err := run(t.Context(), line, &stdout, io.Discard)
	return stdout.String(), err
}

// files makes a directory with files, which hold their names.
func files(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestUsage(t *testing.T) {
	for _, line := range [][]string{
		{},
		{"frobnicate"},
		{"tree"},
		{"tree", "a", "b"},
		{"mounts", "a"},
		{"tree", "--frobnicate", "a"},
		{"read", ".", "--for", "-1s"},
		{"read", ".", "--workers", "0"},
	} {
		_, err := checker(t, line...)
		if !errors.As(err, new(usageError)) {
			t.Errorf("checker %q: error %v, want one about its usage", line, err)
		}
	}
	for _, cmd := range commands() {
		out, err := checker(t, cmd.name, "--help")
		if !errors.Is(err, flag.ErrHelp) || !strings.Contains(out, cmd.about) {
			t.Errorf("checker %s --help: error %v, printed %q", cmd.name, err, out)
		}
	}
}

// What make makes, tree describes, and both take their flags anywhere.
func TestMakeAndTree(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "s")
	if _, err := checker(t, "make", dir, "--size", "100000", "--seed", "3"); err != nil {
		t.Fatal(err)
	}
	out, err := checker(t, "tree", dir)
	if err != nil {
		t.Fatal(err)
	}
	want, err := tree.Describe(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want.Format()), out); diff != "" {
		t.Errorf("description (-want +got):\n%s", diff)
	}
	if !strings.Contains(out, "\n/large file 0644 ") || !strings.Contains(out, " size=100000 ") {
		t.Error("the large file does not have its size")
	}
	if _, err := checker(t, "make", dir); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("make again: error %v", err)
	}
}

// Where writing is allowed everything is tried, and undone.
func TestWriteAllowed(t *testing.T) {
	dir := files(t, "a", "b/c")
	if err := os.Chmod(filepath.Join(dir, "a"), 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	before, err := tree.Describe(dir)
	if err != nil {
		t.Fatal(err)
	}
	out, err := checker(t, "write", dir)
	if err == nil || !strings.Contains(err.Error(), "16 of 16 changes") {
		t.Errorf("error %v", err)
	}
	if strings.Contains(out, "EROFS") || strings.Count(out, "\n") != 16 {
		t.Errorf("printed\n%s", out)
	}
	after, err := tree.Describe(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := tree.Diff(before, after); diff != "" {
		t.Errorf("left behind: %s", diff)
	}
}

func TestWriteRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	dir := files(t, "a", "b/c")
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	out, err := checker(t, "write", dir, "--file", "b/c")
	if err != nil {
		t.Error(err)
	}
	for _, name := range []string{
		"create", "mkdir", "mkfifo", "symlink", "link", "rename", "unlink", "rmdir", "write", "append", "truncate", "chown", "chmod",
		"utimes", "setxattr", "removexattr",
	} {
		if !strings.Contains("\n"+out, "\n"+name+": EROFS\n") {
			t.Errorf("%s: printed\n%s", name, out)
		}
	}
	if _, err := checker(t, "write", dir, "--file", "x"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a file that is not there: error %v", err)
	}
}
