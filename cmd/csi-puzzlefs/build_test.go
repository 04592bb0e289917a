package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Ctrl-C ends a build that waits for standard input, and nothing is left of it.
func TestInterruptedStandardInput(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	stdin := os.Stdin
	os.Stdin = r
	defer func() { os.Stdin = stdin }()
	var archive bytes.Buffer
	tw := tar.NewWriter(&archive)
	content := bytes.Repeat([]byte("x"), 4<<20) // more than the pipe holds: written is read
	if err := tw.WriteHeader(&tar.Header{Name: "file", Typeflag: tar.TypeReg, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(content); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() {
		_, err := w.Write(archive.Bytes())
		written <- errors.Join(err, unix.Kill(os.Getpid(), unix.SIGINT))
	}()
	dir := t.TempDir()
	var stderr strings.Builder
	log := filepath.Join(dir, "log")
	work := filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"build", "tar:-", filepath.Join(dir, "layout") + ":t", "--work-dir", work, "--termination-log", log}
	if code := run(args, io.Discard, &stderr); code != exitError {
		t.Errorf("exit code %d, want %d", code, exitError)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
	if got := stderr.String(); !strings.HasPrefix(got, "csi-puzzlefs: interrupted: build ") {
		t.Errorf("message %q", got)
	}
	if b, err := os.ReadFile(log); err != nil || !strings.Contains(string(b), "read tar:-: ") {
		t.Errorf("termination log %q, %v", b, err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if left, err := os.ReadDir(work); err != nil || len(left) != 0 {
		t.Errorf("left in the work directory: %v, %v", left, err)
	}
}

// A termination message is cut where Kubernetes would, between characters.
func TestTerminationLogIsCut(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	for _, n := range []int{10, 4000, 5000, 5001} {
		var r *buildResult
		if err := r.writeTo(log, errors.New(strings.Repeat("é", n/2)+strings.Repeat("x", n%2)+"!")); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		whole := n <= 4000
		if len(b) > maxTerminationLog || strings.ToValidUTF8(string(b), "") != string(b) || strings.HasSuffix(string(b), "!\n") != whole || strings.HasSuffix(string(b), "…\n") == whole {
			t.Errorf("%d bytes became %d, ending in %q", n, len(b), b[len(b)-5:])
		}
	}
}
