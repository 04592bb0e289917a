package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// newPipe makes a named pipe and opens it as the mount command does.
func newPipe(t *testing.T) *initPipe {
	t.Helper()
	name := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := openInitPipe(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	return p
}

// Who waits for a reader that never comes can be told to give up, before and while waiting.
func TestInitPipeWithoutReader(t *testing.T) {
	for name, when := range map[string]func(cancel context.CancelFunc){
		"before": func(cancel context.CancelFunc) { cancel() },
		"while":  func(cancel context.CancelFunc) { go cancel() },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			when(cancel)
			if err := newPipe(t).tellFailure(ctx); err == nil || !strings.Contains(err.Error(), "nobody reads it") {
				t.Errorf("got %v, want that nobody reads it", err)
			}
		})
	}
}

// The pipe that was opened is told, whatever has its name by then, and only once.
func TestInitPipe(t *testing.T) {
	p := newPipe(t)
	reader, err := os.OpenFile(p.name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := errors.Join(os.Remove(p.name), os.WriteFile(p.name, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(p.tell(t.Context(), toldSuccess), p.tellFailure(t.Context())); err != nil {
		t.Error(err)
	}
	b := make([]byte, 10)
	if n, err := reader.Read(b); err != nil || string(b[:n]) != "s" {
		t.Errorf("read %q, %v; want s", b[:n], err)
	}
	if info, err := os.Stat(p.name); err != nil || info.Size() != 0 {
		t.Errorf("the file with the name of the pipe: %v, %v", info, err)
	}
}

// No pipe is told nothing.
func TestNoInitPipe(t *testing.T) {
	p, err := openInitPipe("")
	if err != nil || p != nil {
		t.Fatalf("got %v, %v", p, err)
	}
	if err := p.tell(t.Context(), toldSuccess); err != nil {
		t.Error(err)
	}
	p.close()
}
