package fuse_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
)

// smallFiles returns n small files, and their names in the order of the image.
func smallFiles(n int) (files map[string]string, order []string) {
	files = make(map[string]string, n)
	content := pattern(1 << 20)
	for i := range n {
		name := fmt.Sprintf("file-%04d", i)
		at, size := i*997%len(content)/2, i*37%3000
		if i%10 == 0 {
			size = 4096 // a page, whole
		}
		files[name] = string(content[at : at+size])
		order = append(order, name)
	}
	return files, order
}

// TestBeside reads small files one after the other: for most of them the kernel does not have to ask.
func TestBeside(t *testing.T) {
	needRoot(t)
	files, order := smallFiles(400)
	s, root := build(t, tree(t, files))
	r := &records{}
	_, dir := mount(t, openImage(t, s, root), func(c *fuse.Config) { c.Logger, c.Debug = r.logger(), true })
	if _, err := os.ReadDir(dir); err != nil { // as whoever reads all does, so that the kernel knows the files
		t.Fatal(err)
	}
	for _, name := range order {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != files[name] {
			t.Fatalf("%s: %d bytes, want %d, or others: %v", name, len(got), len(files[name]), err)
		}
	}
	if n := requests(r)["READ"]; n == 0 || n > len(order)/4 {
		t.Errorf("%d READ requests for %d files in about ten chunks", n, len(order))
	}
}

// TestBesideAtOnce has many read the same small files at the same time, again and again from the server: nobody
// waits for ever, and everybody sees what is in them.
func TestBesideAtOnce(t *testing.T) {
	needRoot(t)
	files, order := smallFiles(300)
	s, root := build(t, tree(t, files))
	_, dir := mount(t, openImage(t, s, root))
	read := func(name string) error {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		defer f.Close()
		var got bytes.Buffer
		if _, err := got.ReadFrom(f); err != nil {
			return err
		}
		if got.String() != files[name] {
			return fmt.Errorf("%s: %d bytes, want %d, or others", name, got.Len(), len(files[name]))
		}
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
	var readers sync.WaitGroup
	for i := range 8 {
		readers.Go(func() {
			for k := range 2 * len(order) {
				// They begin in different places and go on at the same pace, or meet.
				if err := read(order[(i/2*len(order)/4+k)%len(order)]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	readers.Wait()
}
