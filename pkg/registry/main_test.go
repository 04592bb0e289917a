package registry_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// quick retries without making tests wait.
var quick = registry.Retry{Attempts: 4, MinWait: time.Millisecond, MaxWait: 4 * time.Millisecond, MaxRetryAfter: 2 * time.Second}

// clients are all that tests made. Closing a connection of HTTP/2 that has just become idle
// may take a second call.
var clients sync.Map

// newClient returns a client that retries quickly. The end of serve checks what it leaves
// behind.
func newClient(t *testing.T, change func(*registry.Config)) *registry.Client {
	t.Helper()
	cfg := registry.Config{Retry: quick, Concurrency: 4, IdleTimeout: 20 * time.Second}
	if change != nil {
		change(&cfg)
	}
	c, err := registry.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	clients.Store(c, nil)
	return c
}

// checkLeaks fails if a goroutine of the package, or a connection of it, is left.
func checkLeaks(t *testing.T) {
	t.Helper()
	var left string
	for range 200 {
		clients.Range(func(c, _ any) bool {
			if c, ok := c.(*registry.Client); ok {
				c.CloseIdleConnections()
			}
			return true
		})
		buf := make([]byte, 1<<20)
		left = ""
		for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			ours := strings.Contains(g, "csi-puzzlefs/pkg/registry.") || strings.Contains(g, "net/http.(*persistConn)") ||
				strings.Contains(g, "net/http.(*http2ClientConn)")
			if ours && !strings.Contains(g, "checkLeaks") && !strings.Contains(g, "testing.(*T).Run") {
				left = g
			}
		}
		if left == "" {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("goroutine left behind:\n%s", left)
}

// memory returns a registry that keeps everything in memory.
func memory() http.Handler { return ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))) }

// hook is a registry that may answer in place of the one behind it.
type hook struct {
	next http.Handler

	mu   sync.Mutex // guards what follows
	f    func(w http.ResponseWriter, r *http.Request) (answered bool)
	reqs []string // METHOD PATH?QUERY of all requests
}

func (h *hook) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	f := h.f
	h.reqs = append(h.reqs, r.Method+" "+r.URL.RequestURI())
	h.mu.Unlock()
	if f != nil && f(w, r) {
		return
	}
	h.next.ServeHTTP(w, r)
}

func (h *hook) set(f func(w http.ResponseWriter, r *http.Request) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.f, h.reqs = f, nil
}

// count returns how many requests since set contain all of the words.
func (h *hook) count(words ...string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
next:
	for _, r := range h.reqs {
		for _, w := range words {
			if !strings.Contains(r, w) {
				continue next
			}
		}
		n++
	}
	return n
}

// serve starts a plain HTTP server on loopback and returns it with a hook before h and its
// HOST:PORT.
func serve(t *testing.T, h http.Handler) (*hook, string) {
	t.Helper()
	hk := &hook{next: h}
	srv := httptest.NewUnstartedServer(hk)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.Start()
	t.Cleanup(func() {
		checkLeaks(t)
		srv.CloseClientConnections()
		srv.Close()
	})
	return hk, strings.TrimPrefix(srv.URL, "http://")
}

// testImage is an image in a store.
type testImage struct {
	store *store.Store
	desc  format.Descriptor
	m     *format.Manifest
}

// large is the size of the image's large chunk in bytes: over what is read into memory.
const large = 3<<20 + 7

// newImage makes an image of a rootfs, some small chunks, one of them listed twice, an
// empty one and a large one. No part of it needs to be a valid PuzzleFS rootfs.
func newImage(t *testing.T, chunks int) *testImage {
	t.Helper()
	im := &testImage{store: newStore(t)}
	rng := rand.NewChaCha8([32]byte{byte(chunks)}) // reproducible
	put := func(n int, mediaType string) format.Descriptor {
		b := make([]byte, n)
		_, _ = rng.Read(b) // never fails
		d := format.Descriptor{MediaType: mediaType, Digest: format.DigestOf(b), Size: int64(n)}
		if err := im.store.Put(b, d.Digest); err != nil {
			t.Fatal(err)
		}
		return d
	}
	rootfs := put(5000, format.MediaTypeRootfs)
	list := []format.Descriptor{put(0, format.MediaTypeChunk), put(large, format.MediaTypeChunk)}
	for i := range chunks {
		list = append(list, put(1000+i, format.MediaTypeChunk))
	}
	list = append(list, list[len(list)-1])
	im.m = format.NewManifest(rootfs, sha256.Sum256([]byte("verity")), list)
	if err := im.store.Put([]byte(format.EmptyConfig), im.m.Config.Digest); err != nil {
		t.Fatal(err)
	}
	im.seal(t)
	return im
}

// seal stores the manifest as it is now.
func (im *testImage) seal(t *testing.T) {
	t.Helper()
	b, err := im.m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	im.desc = format.Descriptor{MediaType: format.MediaTypeManifest, Digest: format.DigestOf(b), Size: int64(len(b))}
	if err := im.store.Put(b, im.desc.Digest); err != nil {
		t.Fatal(err)
	}
}

func newStore(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "layout"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// checkWhole fails unless s holds every blob of the image, verified, and nothing unfinished.
func (im *testImage) checkWhole(t *testing.T, s *store.Store) {
	t.Helper()
	for _, d := range append(im.m.Blobs(), im.desc) {
		if err := s.Verify(context.Background(), d.Digest); err != nil {
			t.Error(err)
		}
	}
	checkTidy(t, s)
}

// checkTidy fails if s holds an unfinished file or a blob under a wrong name.
func checkTidy(t *testing.T, s *store.Store) {
	t.Helper()
	err := filepath.WalkDir(s.Dir(), func(path string, _ os.DirEntry, err error) error {
		if err == nil && strings.Contains(path, "tmp") && strings.HasPrefix(filepath.Base(path), ".") {
			err = fmt.Errorf("left behind: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	for d, err := range s.Blobs() {
		if err == nil {
			err = s.Verify(context.Background(), d)
		}
		if err != nil {
			t.Error(err)
		}
	}
}

// mustPush pushes the image as repo to the registry at addr and returns the reference.
func mustPush(t *testing.T, im *testImage, addr, repo string) registry.Reference {
	t.Helper()
	ref := mustParse(t, addr+"/"+repo)
	c := newClient(t, nil)
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	return ref
}

func mustParse(t *testing.T, s string) registry.Reference {
	t.Helper()
	ref, err := registry.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// wantError fails unless err is all of kinds and its text has all of the words.
func wantError(t *testing.T, err error, kinds []error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, k := range kinds {
		if !errors.Is(err, k) {
			t.Errorf("error %q is not %q", err, k)
		}
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
	if strings.ContainsAny(err.Error(), "\n\r\x00\x1b") {
		t.Errorf("error %q has control characters", err)
	}
}

// getBlob returns a blob of the image.
func (im *testImage) blob(t *testing.T, d format.Digest) []byte {
	t.Helper()
	b, err := im.store.Get(context.Background(), d, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// logged collects log lines.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
