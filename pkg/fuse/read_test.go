package fuse_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// pattern returns n bytes that do not repeat.
func pattern(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b) // never fails
	return b
}

// built mounts an image of one file, "file", and returns the store's directory as well.
func built(t testing.TB, content []byte, change ...func(*fuse.Config)) (dir, layout string) {
	t.Helper()
	needRoot(t)
	s, root := build(t, tree(t, map[string]string{"file": string(content)}))
	_, dir = mount(t, openImage(t, s, root), change...)
	return dir, s.Dir()
}

// direct reads a range of a file past the page cache. Offset and length are multiples of
// 4096.
func direct(path string, off int64, n int) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := unsafeBuffer(n)
	n, err = unix.Pread(fd, buf, off)
	return buf[:max(n, 0)], err
}

// chunkBlob returns the path of a blob that begins with the content.
func chunkBlob(t testing.TB, layout string, content []byte) string {
	t.Helper()
	blobs, err := filepath.Glob(filepath.Join(layout, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range blobs {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 4096 && bytes.HasPrefix(content, b) {
			return path
		}
	}
	t.Fatal("no blob begins the file")
	return ""
}

// TestBadBlob spoils the blob of a file's beginning: the reader gets an error and never
// other bytes, the log a line for each failed request, and all is well when the blob is.
func TestBadBlob(t *testing.T) {
	content := pattern(1 << 20)
	for name, test := range map[string]struct {
		spoil func(path string) error
		cause string
	}{
		"flipped": {func(path string) error {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			b[len(b)/2] ^= 1
			return os.WriteFile(path, b, 0o644)
		}, store.ErrDigestMismatch.Error()},
		"cut":     {func(path string) error { return os.Truncate(path, 4096) }, store.ErrDigestMismatch.Error()},
		"missing": {os.Remove, store.ErrNotFound.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			r := &records{}
			dir, layout := built(t, content, func(c *fuse.Config) { c.Logger = r.logger() })
			file := filepath.Join(dir, "file")
			path := chunkBlob(t, layout, content)
			good, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := test.spoil(path); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(file); !errors.Is(err, unix.EIO) || len(b) > 0 {
				t.Errorf("buffered: %d bytes, %v, want EIO", len(b), err)
			}
			if b, err := direct(file, 0, 4096); !errors.Is(err, unix.EIO) || len(b) > 0 {
				t.Errorf("direct: %d bytes, %v, want EIO", len(b), err)
			}
			// What other blobs hold is not affected.
			end := int64(len(content) - 8192)
			if b, err := direct(file, end, 4096); err != nil || !bytes.Equal(b, content[end:end+4096]) {
				t.Errorf("the end of the file: %v", err)
			}
			lines := strings.Join(r.all(), "")
			for _, want := range []string{"level=ERROR", "ino=2", "offset=0", "image=sha256:", test.cause, filepath.Base(path)} {
				if !strings.Contains(lines, want) {
					t.Errorf("the log lacks %q:\n%s", want, lines)
				}
			}
			if err := os.WriteFile(path, good, 0o644); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, content) {
				t.Errorf("after mending: %d bytes, %v", len(b), err)
			}
		})
	}
}

// TestLogBounded fails many reads: the log takes few lines, and says how many it dropped.
func TestLogBounded(t *testing.T) {
	r := &records{}
	m := &memory{}
	img := m.image(t, format.InodeVector{
		{Ino: 1, Kind: format.KindDir, Perm: 0o755, Entries: entries(2, "file")},
		{Ino: 2, Kind: format.KindFile, Perm: 0o644, Chunks: m.add(pattern(8192))},
	})
	m.get = func(context.Context, format.Digest) error { return store.ErrDigestMismatch }
	_, dir := mount(t, img, func(c *fuse.Config) { c.Logger = r.logger() })
	for range 50 * fuse.LogBurst {
		if _, err := direct(filepath.Join(dir, "file"), 0, 4096); !errors.Is(err, unix.EIO) {
			t.Fatalf("%v, want EIO", err)
		}
	}
	if n := len(r.all()); n < fuse.LogBurst || n > 10*fuse.LogBurst {
		t.Errorf("%d lines, want little more than %d", n, fuse.LogBurst)
	}
}

// stuck is an image of a file whose content does not come before it is let go. A message
// on waiting says that somebody waits for it, one on gone that the wait was given up.
func stuck(t *testing.T) (img *image.Image, waiting, gone, release chan struct{}) {
	m := &memory{}
	img = m.image(t, format.InodeVector{
		{Ino: 1, Kind: format.KindDir, Perm: 0o755, Entries: entries(2, "file")},
		{Ino: 2, Kind: format.KindFile, Perm: 0o644, Chunks: m.add(pattern(8192))},
	})
	waiting, gone, release = make(chan struct{}, 100), make(chan struct{}, 100), make(chan struct{})
	m.get = func(ctx context.Context, _ format.Digest) error {
		waiting <- struct{}{}
		select {
		case <-ctx.Done():
			gone <- struct{}{}
			return fmt.Errorf("fetch: %w", ctx.Err())
		case <-release:
			return nil
		}
	}
	return img, waiting, gone, release
}

// TestInterrupt interrupts a reader that waits for content: it gets EINTR at once, and
// nobody waits on in its name.
func TestInterrupt(t *testing.T) {
	img, waiting, gone, release := stuck(t)
	_, dir := mount(t, img)
	cmd := helper(t, 0, "direct", filepath.Join(dir, "file"))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	line, err := lines.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	thread, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	<-waiting
	if err := unix.Tgkill(cmd.Process.Pid, thread, unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	<-gone
	if line, err = lines.ReadString('\n'); line != "EINTR\n" {
		t.Errorf("the reader got %q, %v, want EINTR", line, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	close(release)
	if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(b, pattern(8192)) {
		t.Errorf("the next reader: %d bytes, %v", len(b), err)
	}
}

// TestKill kills a reader that waits for content through the page cache: it dies at once.
// The kernel's own request goes on.
func TestKill(t *testing.T) {
	img, waiting, _, release := stuck(t)
	_, dir := mount(t, img)
	cmd := helper(t, 0, "cat", filepath.Join(dir, "file"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-waiting
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the reader ended well")
	}
	close(release)
}

// TestAbort ends a connection while a request is under way: the request is given up and the
// server ends.
func TestAbort(t *testing.T) {
	img, waiting, gone, _ := stuck(t)
	s, dir := mount(t, img)
	cmd := helper(t, 0, "cat", filepath.Join(dir, "file"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-waiting
	if err := unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	<-gone
	if err := cmd.Wait(); err == nil {
		t.Error("the reader ended well")
	}
	s.Wait()
}

// TestParallel reads two files whose contents come only when both are waited for.
func TestParallel(t *testing.T) {
	m := &memory{}
	img := m.image(t, format.InodeVector{
		{Ino: 1, Kind: format.KindDir, Perm: 0o755, Entries: entries(2, "a", "b", "c", "d")},
		{Ino: 2, Kind: format.KindFile, Perm: 0o644, Chunks: m.add([]byte("content a"))},
		{Ino: 3, Kind: format.KindFile, Perm: 0o644, Chunks: m.add([]byte("content b"))},
		{Ino: 4, Kind: format.KindFile, Perm: 0o644, Chunks: m.add([]byte("content c"))},
		{Ino: 5, Kind: format.KindFile, Perm: 0o644, Chunks: m.add([]byte("content d"))},
	})
	var all sync.WaitGroup
	all.Add(4)
	m.get = func(context.Context, format.Digest) error {
		all.Done()
		all.Wait()
		return nil
	}
	_, dir := mount(t, img)
	var g errgroup.Group
	for _, name := range []string{"a", "b", "c", "d"} {
		g.Go(func() error {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err == nil && string(b) != "content "+name {
				err = fmt.Errorf("%s holds %q", name, b)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// TestConcurrentReaders reads random ranges of a file with 64 readers, half of them past
// the page cache.
func TestConcurrentReaders(t *testing.T) {
	content := pattern(8<<20 + 12345)
	dir, _ := built(t, content)
	file := filepath.Join(dir, "file")
	var g errgroup.Group
	for i := range 64 {
		g.Go(func() error {
			f, err := os.Open(file)
			if err != nil {
				return err
			}
			defer f.Close()
			r := rand.New(rand.NewPCG(1, uint64(i)))
			for range 12 {
				off := r.Int64N(int64(len(content))) &^ 4095
				n := (r.IntN(1<<20) + 4096) &^ 4095
				want := content[off:min(off+int64(n), int64(len(content)))]
				var got []byte
				if i%2 == 0 {
					got = make([]byte, n)
					var k int
					k, err = f.ReadAt(got, off)
					got = got[:k]
				} else {
					got, err = direct(file, off, n)
				}
				if err != nil && !errors.Is(err, io.EOF) {
					return err
				}
				if !bytes.Equal(got, want) {
					return fmt.Errorf("reader %d: %d bytes at %d differ", i, n, off)
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// TestMmap reads a file through a mapping, in another process: this one could not answer
// while one of its threads waits for a page.
func TestMmap(t *testing.T) {
	content := pattern(3<<20 + 7)
	dir, _ := built(t, content)
	if got := runs(t, helper(t, 0, "mmap", filepath.Join(dir, "file"))); got != string(content) {
		t.Errorf("%d bytes, not the %d of the file", len(got), len(content))
	}
}

// TestDirect reads a file past the page cache, in pieces as large as one request and larger.
func TestDirect(t *testing.T) {
	content := pattern(5<<20 + 4097)
	dir, _ := built(t, content)
	for _, piece := range []int{4096, 1 << 20, 8 << 20} {
		var got []byte
		for {
			b, err := direct(filepath.Join(dir, "file"), int64(len(got)), piece)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, b...)
			if len(b) < piece {
				break
			}
		}
		if !bytes.Equal(got, content) {
			t.Errorf("in pieces of %d: %d bytes, not the %d of the file", piece, len(got), len(content))
		}
	}
}

// TestPastTheEnd reads at and behind the end of a file.
func TestPastTheEnd(t *testing.T) {
	dir, _ := built(t, []byte("short"))
	f, err := os.Open(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, off := range []int64{5, 4096, 1 << 62} {
		if n, err := f.ReadAt(make([]byte, 10), off); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("at %d: %d, %v", off, n, err)
		}
	}
	if off, err := f.Seek(0, unix.SEEK_HOLE); off != 5 || err != nil {
		t.Errorf("the first hole is at %d, %v, want the end", off, err)
	}
	if err := f.Sync(); err != nil {
		t.Errorf("sync: %v", err)
	}
}
