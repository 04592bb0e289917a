package store_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
	"golang.org/x/sys/unix"
)

// putters are the two ways to put a blob.
var putters = map[string]func(*testing.T, *store.Store, []byte, format.Digest) error{
	"Put": func(_ *testing.T, s *store.Store, data []byte, d format.Digest) error {
		return s.Put(data, d)
	},
	"PutReader": func(t *testing.T, s *store.Store, data []byte, d format.Digest) error {
		return s.PutReader(t.Context(), d, int64(len(data)), bytes.NewReader(data))
	},
}

// eachPutter runs a test for each way to put, with and without O_TMPFILE.
func eachPutter(t *testing.T, test func(t *testing.T, s *store.Store, put func(data []byte, d format.Digest) error)) {
	for name, putter := range putters {
		for _, named := range []bool{false, true} {
			if named {
				name += ", temporary names"
			}
			t.Run(name, func(t *testing.T) {
				s := create(t, store.Config{Fault: faults(named, func(store.Step) error { return nil })})
				test(t, s, func(data []byte, d format.Digest) error { return putter(t, s, data, d) })
				checkTree(t, s.Dir())
			})
		}
	}
}

func TestPutFile(t *testing.T) {
	eachPutter(t, func(t *testing.T, s *store.Store, put func([]byte, format.Digest) error) {
		d := format.DigestOf(chunkData)
		if err := put(chunkData, d); err != nil {
			t.Fatal(err)
		}
		info, err := os.Lstat(blobFile(s, d))
		if err != nil {
			t.Fatal(err)
		}
		mask := unix.Umask(0)
		unix.Umask(mask)
		if want := os.FileMode(0o644 &^ mask); info.Mode() != want {
			t.Errorf("mode %v, want %v", info.Mode(), want)
		}
		if !bytes.Equal(readFile(t, blobFile(s, d)), chunkData) {
			t.Error("the file holds something else")
		}
	})
}

// TestPutLeavesGoodBlob puts what is there: the file must be the very same afterwards.
func TestPutLeavesGoodBlob(t *testing.T) {
	eachPutter(t, func(t *testing.T, s *store.Store, put func([]byte, format.Digest) error) {
		for _, n := range []int{0, 1, 300_000} {
			data := storetest.Data(1, n)
			d := format.DigestOf(data)
			var before, after unix.Stat_t
			if err := errors.Join(put(data, d), unix.Lstat(blobFile(s, d), &before), put(data, d), unix.Lstat(blobFile(s, d), &after)); err != nil {
				t.Fatal(err)
			}
			if before.Ino != after.Ino || before.Mtim != after.Mtim || before.Ctim != after.Ctim {
				t.Errorf("the blob of %d bytes was written again", n)
			}
		}
	})
}

// TestPutReplacesDamaged puts a blob whose place is taken by something that is not it.
// Of all that put a blob one is told that it was not there; the next is told so where it was torn.
func TestPutNew(t *testing.T) {
	s := create(t, store.Config{})
	d := format.DigestOf(chunkData)
	for _, test := range []struct {
		what   string
		before func()
	}{
		{"nothing is there", func() {}},
		{"it is torn", func() { writeFile(t, blobFile(s, d), chunkData[:100]) }},
		{"it is removed", func() { must(t, s.Remove(d)) }},
	} {
		test.before()
		var added atomic.Int64
		var putting sync.WaitGroup
		for range 8 {
			putting.Go(func() {
				a, err := s.PutNew(chunkData, d)
				if err != nil {
					t.Error(err)
				}
				if a {
					added.Add(1)
				}
			})
		}
		putting.Wait()
		// Who finds it torn replaces it, and so may another who saw the same.
		if n := added.Load(); n < 1 || n > 1 && test.what != "it is torn" {
			t.Errorf("%s: %d of 8 were told that the layout did not have it", test.what, n)
		}
		if a, err := s.PutNew(chunkData, format.Digest{}); a || err != nil {
			t.Errorf("%s, and put: added %v, %v", test.what, a, err)
		}
	}
	checkTree(t, s.Dir())
}

func TestPutReplacesDamaged(t *testing.T) {
	data := storetest.Data(2, 600_000)
	d := format.DigestOf(data)
	flipped := bytes.Clone(data)
	flipped[599_999] ^= 1
	write := func(b []byte) func(*testing.T, string) {
		return func(t *testing.T, path string) { writeFile(t, path, b) }
	}
	damages := map[string]func(t *testing.T, path string){
		"flipped bit":     write(flipped),
		"truncated":       write(data[:len(data)-1]),
		"empty":           write(nil),
		"longer":          write(append(bytes.Clone(data), 0)),
		"zeros":           write(make([]byte, len(data))),
		"dangling link":   func(t *testing.T, path string) { must(t, os.Symlink("nowhere", path)) },
		"link to content": linkToContent(data),
		"fifo":            func(t *testing.T, path string) { must(t, unix.Mkfifo(path, 0o644)) },
		"socket":          func(t *testing.T, path string) { must(t, unix.Mknod(path, unix.S_IFSOCK|0o644, 0)) },
	}
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			eachPutter(t, func(t *testing.T, s *store.Store, put func([]byte, format.Digest) error) {
				damage(t, blobFile(s, d))
				if err := s.Verify(t.Context(), d); !errors.Is(err, store.ErrDigestMismatch) {
					t.Errorf("Verify: error %v, want ErrDigestMismatch", err)
				}
				if err := put(data, d); err != nil {
					t.Fatal(err)
				}
				if err := s.Verify(t.Context(), d); err != nil {
					t.Error(err)
				}
				if !bytes.Equal(readFile(t, blobFile(s, d)), data) {
					t.Error("the file holds something else")
				}
			})
		})
	}
}

// linkToContent puts a symbolic link to a file with the right content.
func linkToContent(data []byte) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		target := filepath.Join(t.TempDir(), "content")
		writeFile(t, target, data)
		must(t, os.Symlink(target, path))
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestDirectoryInPlaceOfBlob is the one thing that a file cannot be renamed over.
func TestDirectoryInPlaceOfBlob(t *testing.T) {
	eachPutter(t, func(t *testing.T, s *store.Store, put func([]byte, format.Digest) error) {
		d := format.DigestOf(chunkData)
		must(t, os.Mkdir(blobFile(s, d), 0o755))
		if err := put(chunkData, d); !errors.Is(err, unix.EISDIR) || !strings.Contains(err.Error(), blobFile(s, d)) {
			t.Errorf("error %v, want EISDIR that names the path", err)
		}
		must(t, s.Remove(d))
		must(t, put(chunkData, d))
		must(t, s.Verify(t.Context(), d))
	})
}

func TestPutConcurrently(t *testing.T) {
	eachPutter(t, func(t *testing.T, s *store.Store, put func([]byte, format.Digest) error) {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for i := range 50 {
					data := storetest.Data(uint64(i%10), 10_000)
					if i == 7 {
						// Somebody damages a blob meanwhile.
						_ = os.Truncate(blobFile(s, format.DigestOf(data)), 5)
					}
					if err := put(data, format.DigestOf(data)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		n := 0
		for d, err := range s.Blobs() {
			if err != nil {
				t.Fatal(err)
			}
			n++
			if err := s.Put(storetest.Data(7, 10_000), format.Digest{}); err != nil {
				t.Error(err)
			}
			if err := s.Verify(t.Context(), d); err != nil {
				t.Error(err)
			}
		}
		if n != 10 {
			t.Errorf("%d blobs, want 10", n)
		}
	})
}

func TestPutWrongDigest(t *testing.T) {
	s := create(t, store.Config{})
	good := put(t, s, chunkData)
	// Put trusts its caller, but never spoils a good blob with something else.
	if err := s.Put([]byte("something else"), good); !errors.Is(err, store.ErrDigestMismatch) {
		t.Errorf("error %v, want ErrDigestMismatch", err)
	}
	must(t, s.Verify(t.Context(), good))
	checkTree(t, s.Dir())
}

// endless yields zeros.
type endless struct{}

func (endless) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// silent yields nothing and no error.
type silent struct{}

func (silent) Read([]byte) (int, error) { return 0, nil }

func TestPutReaderFaults(t *testing.T) {
	data := storetest.Data(3, 600_000)
	d := format.DigestOf(data)
	n := int64(len(data))
	reset := errors.New("connection reset")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	tests := []struct {
		name string
		ctx  context.Context
		d    format.Digest
		size int64
		r    io.Reader
		want error
	}{
		{"other content", t.Context(), format.DigestOf([]byte("x")), n, bytes.NewReader(data), store.ErrDigestMismatch},
		{"other content, unknown size", t.Context(), format.DigestOf([]byte("x")), -1, bytes.NewReader(data), store.ErrDigestMismatch},
		{"short", t.Context(), d, n, bytes.NewReader(data[:n-1]), store.ErrDigestMismatch},
		{"nothing", t.Context(), d, n, bytes.NewReader(nil), store.ErrDigestMismatch},
		{"short, unknown size", t.Context(), d, -1, bytes.NewReader(data[:n-1]), store.ErrDigestMismatch},
		{"long", t.Context(), d, n, io.MultiReader(bytes.NewReader(data), strings.NewReader("x")), store.ErrDigestMismatch},
		{"endless", t.Context(), d, n, endless{}, store.ErrDigestMismatch},
		{"size is wrong", t.Context(), d, n + 1, bytes.NewReader(data), store.ErrDigestMismatch},
		{"reset", t.Context(), d, n, io.MultiReader(bytes.NewReader(data[:300_000]), iotest.ErrReader(reset)), reset},
		{"cut off", t.Context(), d, n, io.MultiReader(bytes.NewReader(data[:300_000]), iotest.ErrReader(io.ErrUnexpectedEOF)), io.ErrUnexpectedEOF},
		{"cut off at the end", t.Context(), d, n, io.MultiReader(bytes.NewReader(data), iotest.ErrReader(io.ErrUnexpectedEOF)), io.ErrUnexpectedEOF},
		{"silent", t.Context(), d, n, silent{}, io.ErrNoProgress},
		{"cancelled", cancelled, d, n, bytes.NewReader(data), context.Canceled},
	}
	for _, named := range []bool{false, true} {
		for _, test := range tests {
			t.Run(test.name, func(t *testing.T) {
				s := create(t, store.Config{Fault: faults(named, func(store.Step) error { return nil })})
				if err := s.PutReader(test.ctx, test.d, test.size, test.r); !errors.Is(err, test.want) {
					t.Errorf("error %v, want %v", err, test.want)
				}
				for d, err := range s.Blobs() {
					t.Errorf("left behind: %v, %v", d, err)
				}
				checkTree(t, s.Dir())
			})
		}
	}
	t.Run("no digest", func(t *testing.T) {
		s := create(t, store.Config{})
		if err := s.PutReader(t.Context(), format.Digest{}, -1, bytes.NewReader(data)); err == nil {
			t.Error("no error")
		}
	})
}

func TestPutReaderSources(t *testing.T) {
	data := storetest.Data(4, 600_000)
	d := format.DigestOf(data)
	for name, r := range map[string]io.Reader{
		"one byte at a time": iotest.OneByteReader(bytes.NewReader(data)),
		"data with EOF":      iotest.DataErrReader(bytes.NewReader(data)),
		"halves":             iotest.HalfReader(bytes.NewReader(data)),
	} {
		t.Run(name, func(t *testing.T) {
			s := create(t, store.Config{})
			must(t, s.PutReader(t.Context(), d, -1, r))
			must(t, s.Verify(t.Context(), d))
		})
	}
}

func TestRemove(t *testing.T) {
	s := create(t, store.Config{})
	d := put(t, s, chunkData)
	must(t, s.Remove(d))
	if _, err := s.Size(d); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Size: error %v, want ErrNotFound", err)
	}
	if err := s.Remove(d); !errors.Is(err, store.ErrNotFound) || !strings.Contains(err.Error(), d.String()) {
		t.Errorf("second Remove: error %v, want ErrNotFound that names the digest", err)
	}
	put(t, s, chunkData)
	must(t, s.Verify(t.Context(), d))
}

// atErr is a context that calls do when it is asked whether it has ended, as happens between the
// pieces that are read of a blob.
type atErr struct {
	context.Context
	do func()
}

func (c atErr) Err() error { c.do(); return c.Context.Err() }

// TestRemoveCorrupt: what is not what its digest names goes; a good blob stays, even where it takes
// the place of the one that is being read.
func TestRemoveCorrupt(t *testing.T) {
	data := storetest.Data(1, 1<<20)
	bad := bytes.Clone(data)
	bad[len(bad)/2] ^= 1
	tests := []struct {
		name      string
		content   []byte
		meanwhile func(s *store.Store, d format.Digest) error
		corrupt   bool
		stays     error // of Verify, afterwards
	}{
		{"good", data, nil, false, nil},
		{"corrupt", bad, nil, true, store.ErrNotFound},
		{"short", data[:100], nil, true, store.ErrNotFound},
		{"replaced meanwhile", bad, func(s *store.Store, d format.Digest) error {
			return errors.Join(s.Remove(d), s.Put(data, d))
		}, false, nil},
		{"removed meanwhile", bad, func(s *store.Store, d format.Digest) error { return s.Remove(d) }, false, store.ErrNotFound},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := create(t, store.Config{})
			d := put(t, s, data)
			must(t, os.Chmod(blobFile(s, d), 0o600))
			writeFile(t, blobFile(s, d), test.content)
			var once sync.Once
			ctx := atErr{t.Context(), func() {
				once.Do(func() {
					if test.meanwhile != nil {
						must(t, test.meanwhile(s, d))
					}
				})
			}}
			corrupt, err := s.RemoveCorrupt(ctx, d)
			if corrupt != test.corrupt || err != nil {
				t.Errorf("got %v, %v; want %v", corrupt, err, test.corrupt)
			}
			if err := s.Verify(t.Context(), d); !errors.Is(err, test.stays) {
				t.Errorf("afterwards: %v, want %v", err, test.stays)
			}
		})
	}
	s := create(t, store.Config{})
	if _, err := s.RemoveCorrupt(t.Context(), format.Digest{1}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("what is not there: %v, want ErrNotFound", err)
	}
	must(t, os.Mkdir(blobFile(s, format.Digest{1}), 0o700))
	if corrupt, err := s.RemoveCorrupt(t.Context(), format.Digest{1}); err != nil || !corrupt {
		t.Errorf("a directory: %v, %v; want it removed", corrupt, err)
	}
}
