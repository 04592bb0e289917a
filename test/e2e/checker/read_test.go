package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// lines collects the lines that a reader prints.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) summaries(t *testing.T) []summary {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []summary
	for dec := json.NewDecoder(bytes.NewReader(l.text.Bytes())); ; {
		var s summary
		if err := dec.Decode(&s); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
}

// wait waits until it has printed n lines, and returns the last.
func (l *lines) wait(t *testing.T, n int) summary {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if all := l.summaries(t); len(all) >= n {
			return all[len(all)-1]
		} else if time.Now().After(end) {
			t.Fatalf("%d lines after 30 s, want %d", len(all), n)
		}
	}
}

// startReader starts a reader, and returns what it prints, and what ends it and returns its error.
func startReader(t *testing.T, line ...string) (printed *lines, end func() error) {
	t.Helper()
	// A signal that comes after the reader's end is not to end the test.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGUSR1)
	t.Cleanup(func() { signal.Stop(signals) })
	ctx, cancel := context.WithCancel(t.Context())
	printed = &lines{}
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, append([]string{"read", "--interval", "1ms"}, line...), printed, io.Discard) }()
	end = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(30 * time.Second):
			return errors.New("the reader does not end")
		}
	})
	t.Cleanup(func() { _ = end() }) // for a test that failed before
	return printed, end
}

// until asks a reader for summaries until one is as it should be.
func until(t *testing.T, printed *lines, what string, good func(summary) bool) summary {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		n := len(printed.summaries(t))
		if err := unix.Kill(os.Getpid(), unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		s := printed.wait(t, n+1)
		if good(s) {
			return s
		}
		if time.Now().After(end) {
			t.Fatalf("not %s after 30 s: %+v", what, s)
		}
	}
}

func TestReadUndisturbed(t *testing.T) {
	dir := files(t, "a", "b/c", "d")
	for _, flags := range [][]string{nil, {"--fresh"}, {"--workers", "5"}} {
		printed, end := startReader(t, append(flags, dir)...)
		if s := printed.wait(t, 1); s.State != "started" || s.Files != 3 || s.Operations != 0 {
			t.Errorf("%q: at the start: %+v", flags, s)
		}
		until(t, printed, "through the files twice", func(s summary) bool { return s.Operations >= 6 && s.State == "reading" })
		if err := end(); err != nil {
			t.Errorf("%q: %v", flags, err)
		}
		all := printed.summaries(t)
		s := all[len(all)-1]
		if s.State != "ended" || s.Bytes == 0 || len(s.FirstErrors) != 0 || len(s.Stuck) != 0 {
			t.Errorf("%q: at the end: %+v", flags, s)
		}
		if diff := cmp.Diff(map[string]int{"ENOTCONN": 0, "EIO": 0}, s.Errors); diff != "" {
			t.Errorf("%q: errors (-want +got):\n%s", flags, diff)
		}
	}
}

func TestReadFor(t *testing.T) {
	dir := files(t, "a")
	out, err := checker(t, "read", dir, "--for", "50ms")
	if err != nil || !strings.Contains(out, `"state":"ended"`) {
		t.Errorf("error %v, printed %s", err, out)
	}
}

func TestReadErrors(t *testing.T) {
	dir := files(t, "changes", "goes", "stays")
	printed, end := startReader(t, dir)
	printed.wait(t, 1)
	if err := os.Remove(filepath.Join(dir, "goes")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "changes"), []byte("CHANGES"), 0o644); err != nil {
		t.Fatal(err)
	}
	until(t, printed, "aware of both", func(s summary) bool { return s.Errors["ENOENT"] > 0 && s.Errors["MISMATCH"] > 10 })
	err := end()
	if err == nil || !strings.Contains(err.Error(), "operations below "+dir+" failed; the first: ") {
		t.Errorf("error %v", err)
	}
	all := printed.summaries(t)
	s := all[len(all)-1]
	if len(s.FirstErrors) != 10 || s.FirstErrors[0].At.IsZero() {
		t.Errorf("first errors: %+v, want ten", s.FirstErrors)
	}
	for _, f := range s.FirstErrors {
		switch filepath.Base(f.Path) {
		case "goes":
			if !strings.Contains(f.Error, "no such file") {
				t.Errorf("%+v", f)
			}
		case "changes":
			if !strings.Contains(f.Error, "its content changed") {
				t.Errorf("%+v", f)
			}
		default:
			t.Errorf("an error that nobody made: %+v", f)
		}
	}
}

// A description that was made elsewhere is what counts.
func TestReadAgainst(t *testing.T) {
	dir := files(t, "a", "b")
	text, err := checker(t, "tree", dir)
	if err != nil {
		t.Fatal(err)
	}
	description := filepath.Join(t.TempDir(), "tree.txt")
	if err := os.WriteFile(description, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := checker(t, "read", dir, "--against", description, "--for", "50ms"); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "b"), []byte("B"), 0o644); err != nil {
		t.Fatal(err)
	}
	printed, end := startReader(t, "--against", description, dir)
	printed.wait(t, 1)
	until(t, printed, "aware of the change", func(s summary) bool { return s.Errors["MISMATCH"] > 0 })
	if err := end(); err == nil {
		t.Error("no error at the end")
	}
}

// A file system that hangs keeps workers, and nothing else: opening a pipe that nobody writes to
// hangs like it.
func TestReadHangs(t *testing.T) {
	dir := files(t, "a", "b")
	printed, end := startReader(t, "--workers", "2", dir)
	printed.wait(t, 1)
	for _, name := range []string{"a", "b"} {
		path := filepath.Join(dir, name)
		if err := unix.Mkfifo(path+"-pipe", 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+"-pipe", path); err != nil {
			t.Fatal(err)
		}
	}
	s := until(t, printed, "stuck", func(s summary) bool { return len(s.Stuck) == 2 })
	if pause := time.Duration(s.LongestPauseMillis) * time.Millisecond; pause < stuckAfter-time.Second {
		t.Errorf("longest pause %s, while two files have been stuck for %s", pause, stuckAfter)
	}
	if err := end(); err != nil {
		t.Errorf("what hangs is no error: %v", err)
	}
	// Let the workers go.
	for _, name := range []string{"a", "b"} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
}

// So does one that hangs before anything has been read.
func TestReadHangsAtOnce(t *testing.T) {
	dir := t.TempDir()
	description := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(description, 0o644); err != nil {
		t.Fatal(err)
	}
	printed, end := startReader(t, "--against", description, dir)
	if err := end(); err == nil || !strings.Contains(err.Error(), "before all files") {
		t.Errorf("error %v", err)
	}
	if s := printed.wait(t, 1); s.State != "ended" || s.Files != 0 {
		t.Errorf("printed %+v", s)
	}
	f, err := os.OpenFile(description, os.O_RDWR, 0) // lets it go
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

func TestReadNothing(t *testing.T) {
	if _, err := checker(t, "read", t.TempDir(), "--for", "1m"); err == nil || !strings.Contains(err.Error(), "no file to read") {
		t.Errorf("error %v", err)
	}
}

func TestErrorNames(t *testing.T) {
	for errno, want := range map[error]string{unix.ENOTCONN: "ENOTCONN", unix.EIO: "EIO", unix.ESTALE: "ESTALE"} {
		if got := errorName(&os.PathError{Op: "read", Path: "x", Err: errno}); got != want {
			t.Errorf("%v: %s, want %s", errno, got, want)
		}
	}
}
