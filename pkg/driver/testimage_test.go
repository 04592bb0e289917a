package driver_test

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// testImage is a small PuzzleFS image in memory.
type testImage struct {
	manifest []byte
	digest   format.Digest
	verity   verity.Digest
	rootfs   format.Digest
	chunks   []format.Digest
	blobs    map[format.Digest][]byte
	// files are the contents by path.
	files map[string]string
}

const chunkSize = 64 << 10

// makeImage returns an image with the tree
//
//	hello.txt      text
//	dir/sub/deep   some bytes
//	dir/up    -> ..
//	link      -> dir
//	big            blocks chunks of random bytes
func makeImage(t *testing.T, text string, blocks int) *testImage {
	t.Helper()
	im := &testImage{blobs: map[format.Digest][]byte{}, files: map[string]string{}}
	var chunks []format.Descriptor
	var verities []format.VerityData
	add := func(path, content string) []format.FileChunk {
		im.files[path] = content
		var list []format.FileChunk
		for piece := range slices.Chunk([]byte(content), chunkSize) {
			d := format.DigestOf(piece)
			if _, dup := im.blobs[d]; !dup {
				im.blobs[d] = piece
				im.chunks = append(im.chunks, d)
				verities = append(verities, format.VerityData{Digest: d, Verity: verity.Sum(piece)})
			}
			chunks = append(chunks, format.Descriptor{MediaType: format.MediaTypeChunk, Digest: d, Size: int64(len(piece))})
			list = append(list, format.FileChunk{Blob: format.BlobRef{Digest: d}, Len: uint64(len(piece))})
		}
		return list
	}
	// The same text gives the same image.
	seed := format.DigestOf([]byte(text))
	random := rand.NewChaCha8(seed)
	big := make([]byte, blocks*chunkSize)
	_, _ = random.Read(big)
	entry := func(ino uint64, name string) format.DirEntry { return format.DirEntry{Ino: ino, Name: []byte(name)} }
	inodes := format.InodeVector{
		{Ino: 1, Kind: format.KindDir, Perm: 0o755, Entries: []format.DirEntry{entry(2, "big"), entry(3, "dir"), entry(4, "hello.txt"), entry(5, "link")}},
		{Ino: 2, Kind: format.KindFile, Perm: 0o644, Chunks: add("big", string(big))},
		{Ino: 3, Kind: format.KindDir, Perm: 0o755, Entries: []format.DirEntry{entry(6, "sub"), entry(7, "up")}},
		{Ino: 4, Kind: format.KindFile, Perm: 0o644, Chunks: add("hello.txt", text)},
		{Ino: 5, Kind: format.KindSymlink, Perm: 0o777, Symlink: []byte("dir")},
		{Ino: 6, Kind: format.KindDir, Perm: 0o755, Entries: []format.DirEntry{entry(8, "deep")}},
		{Ino: 7, Kind: format.KindSymlink, Perm: 0o777, Symlink: []byte("..")},
		{Ino: 8, Kind: format.KindFile, Perm: 0o644, Chunks: add("dir/sub/deep", "deep "+text)},
	}
	slices.SortFunc(verities, func(a, b format.VerityData) int { return bytes.Compare(a.Digest[:], b.Digest[:]) })
	rootfs, err := format.EncodeRootfs(&format.Rootfs{Version: format.Version3, Layers: []format.InodeVector{inodes}, Verity: verities})
	if err != nil {
		t.Fatal(err)
	}
	im.rootfs = format.DigestOf(rootfs)
	im.blobs[im.rootfs] = rootfs
	m := format.NewManifest(format.Descriptor{Digest: im.rootfs, Size: int64(len(rootfs))}, verity.Sum(rootfs), chunks)
	if im.manifest, err = m.Encode(); err != nil {
		t.Fatal(err)
	}
	im.digest, im.verity = format.DigestOf(im.manifest), verity.Sum(im.manifest)
	im.blobs[format.DigestOf([]byte(format.EmptyConfig))] = []byte(format.EmptyConfig)
	return im
}

// loadImage reads an image from a layout. Its files are not known.
func loadImage(t *testing.T, layout, tag string) *testImage {
	t.Helper()
	s, err := store.Open(store.Config{Dir: layout})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	root, err := s.Resolve(tag)
	if err != nil {
		t.Fatal(err)
	}
	im := &testImage{digest: root.Digest, blobs: map[format.Digest][]byte{}}
	if im.manifest, err = s.Get(t.Context(), root.Digest, format.MaxManifestSize); err != nil {
		t.Fatal(err)
	}
	im.verity = verity.Sum(im.manifest)
	m, err := format.ParseManifest(im.manifest)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range m.Blobs() {
		if im.blobs[d.Digest], err = s.Get(t.Context(), d.Digest, format.MaxRootfsSize); err != nil {
			t.Fatal(err)
		}
	}
	return im
}

// testRegistry is a registry in this process whose mood a test can change.
type testRegistry struct {
	host string

	mu sync.Mutex // guards what follows
	// password is wanted, for the user "user", where it is not "".
	password string
	// down answers 503 to everything, stalled holds back the chunks until it is closed.
	down    bool
	stalled chan struct{}
	// hold are the blobs that stalled is about.
	hold map[format.Digest]bool
	// paths are the requests so far: "GET /v2/…".
	paths []string
}

func newRegistry(t *testing.T) *testRegistry {
	t.Helper()
	r := &testRegistry{}
	backend := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		r.paths = append(r.paths, req.Method+" "+req.URL.Path)
		password, down, stalled := r.password, r.down, r.stalled
		if stalled != nil {
			_, hex, _ := strings.Cut(req.URL.Path, "/blobs/sha256:")
			if d, err := format.ParseHex(hex); err != nil || !r.hold[d] {
				stalled = nil
			}
		}
		r.mu.Unlock()
		if down {
			http.Error(w, "down", http.StatusServiceUnavailable)
			return
		}
		if user, pass, _ := req.BasicAuth(); password != "" && (user != "user" || pass != password) {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		if stalled != nil {
			select {
			case <-stalled:
			case <-req.Context().Done():
				return
			}
		}
		backend.ServeHTTP(w, req)
	}))
	t.Cleanup(srv.Close)
	r.host = strings.TrimPrefix(srv.URL, "http://")
	return r
}

// set changes the registry's mood.
func (r *testRegistry) set(change func(*testRegistry)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(r)
}

// requests returns and forgets the requests so far.
func (r *testRegistry) requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	paths := r.paths
	r.paths = nil
	return paths
}

// push puts an image into the registry and returns its reference.
func (r *testRegistry) push(t *testing.T, im *testImage, repository, tag string) string {
	t.Helper()
	for d, b := range im.blobs {
		r.upload(t, http.MethodPost, fmt.Sprintf("/v2/%s/blobs/uploads/?digest=%v", repository, d), b)
	}
	r.upload(t, http.MethodPut, fmt.Sprintf("/v2/%s/manifests/%s", repository, tag), im.manifest)
	r.requests()
	return fmt.Sprintf("%s/%s:%s", r.host, repository, tag)
}

// newLiar serves an image under the name app as a registry does, but for one blob, of which it
// changes a bit. It returns its host.
func newLiar(t *testing.T, im *testImage, about format.Digest) string {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if strings.Contains(req.URL.Path, "/manifests/") {
			w.Header().Set("Content-Type", format.MediaTypeManifest)
			_, _ = w.Write(im.manifest)
			return
		}
		_, hex, _ := strings.Cut(req.URL.Path, "/blobs/sha256:")
		d, err := format.ParseHex(hex)
		if err != nil {
			http.NotFound(w, req)
			return
		}
		b := bytes.Clone(im.blobs[d])
		if d == about {
			b[0] ^= 1
		}
		_, _ = w.Write(b)
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// upload sends a blob or a manifest, which the registry must take.
func (r *testRegistry) upload(t *testing.T, method, path string, body []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+r.host+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", format.MediaTypeManifest)
	r.mu.Lock()
	password := r.password
	r.mu.Unlock()
	if password != "" {
		req.SetBasicAuth("user", password)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		b, _ := io.ReadAll(resp.Body)
		t.Fatalf("%s %s: %s: %s", method, path, resp.Status, b)
	}
}
