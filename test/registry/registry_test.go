// Package registry_test pushes to and pulls from the registry of the distribution project,
// as it is, behind authentication, and over connections that break.
package registry_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/registrytest"
)

const (
	user     = "alice"
	password = "pass-word-of-alice"
)

// image is an image in a store. Its rootfs is arbitrary bytes: no registry looks into it.
type image struct {
	store *store.Store
	desc  format.Descriptor
	m     *format.Manifest
}

func newStore(t testing.TB) *store.Store {
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

// newImage makes an image with chunks of the given sizes in bytes.
func newImage(t testing.TB, sizes ...int) *image {
	t.Helper()
	im := &image{store: newStore(t)}
	rng := rand.NewChaCha8([32]byte{byte(len(sizes))}) // reproducible
	put := func(n int, mediaType string) format.Descriptor {
		b := make([]byte, n)
		_, _ = rng.Read(b) // never fails
		d := format.Descriptor{MediaType: mediaType, Digest: format.DigestOf(b), Size: int64(n)}
		if err := im.store.Put(b, d.Digest); err != nil {
			t.Fatal(err)
		}
		return d
	}
	rootfs := put(100_000, format.MediaTypeRootfs)
	chunks := make([]format.Descriptor, 0, len(sizes))
	for _, n := range sizes {
		chunks = append(chunks, put(n, format.MediaTypeChunk))
	}
	im.m = format.NewManifest(rootfs, sha256.Sum256([]byte("verity")), chunks)
	if err := im.store.Put([]byte(format.EmptyConfig), im.m.Config.Digest); err != nil {
		t.Fatal(err)
	}
	im.seal(t)
	return im
}

// seal stores the manifest as it is now.
func (im *image) seal(t testing.TB) {
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

// checkWhole fails unless s has every blob of the image and nothing else.
func (im *image) checkWhole(t testing.TB, s *store.Store) {
	t.Helper()
	want := map[format.Digest]bool{im.desc.Digest: true}
	for _, d := range im.m.Blobs() {
		want[d.Digest] = true
	}
	for d := range want {
		if err := s.Verify(context.Background(), d); err != nil {
			t.Error(err)
		}
	}
	for d, err := range s.Blobs() {
		if err != nil || !want[d] {
			t.Errorf("blob %s, which is not of the image: %v", d, err)
		}
	}
	left, err := filepath.Glob(filepath.Join(s.Dir(), ".puzzlefs-tmp-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

// repeat returns n sizes around size.
func repeat(n, size int) []int {
	sizes := make([]int, n)
	for i := range sizes {
		sizes[i] = size + i
	}
	return sizes
}

func start(t testing.TB, cfg registrytest.Config) string {
	t.Helper()
	addr, stop, err := registrytest.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return addr
}

func newClient(t testing.TB, f registry.CredentialFunc) *registry.Client {
	t.Helper()
	c, err := registry.New(registry.Config{
		Credentials: f,
		Retry:       registry.Retry{Attempts: 8, MinWait: time.Millisecond, MaxWait: 20 * time.Millisecond},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

func parse(t testing.TB, s string) registry.Reference {
	t.Helper()
	ref, err := registry.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func static(c registry.Credential) registry.CredentialFunc {
	return func(context.Context, string, string) (registry.Credential, error) { return c, nil }
}

// roundTrip pushes the image and pulls it into a new store.
func roundTrip(t *testing.T, c *registry.Client, im *image, ref registry.Reference) {
	t.Helper()
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	dst := newStore(t)
	desc, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if desc.Digest != im.desc.Digest {
		t.Errorf("pulled %s, want %s", desc.Digest, im.desc.Digest)
	}
	im.checkWhole(t, dst)
}

func TestRoundTrip(t *testing.T) {
	users := map[string]string{user: password}
	alice := static(registry.Credential{Username: user, Password: password})
	tests := []struct {
		name string
		cfg  registrytest.Config
		cred registry.CredentialFunc
	}{
		{"memory", registrytest.Config{}, nil},
		{"files", registrytest.Config{Dir: t.TempDir()}, nil},
		{"needless credentials", registrytest.Config{}, alice},
		{"htpasswd", registrytest.Config{Users: users}, alice},
		{"tokens", registrytest.Config{Users: users, Tokens: true}, alice},
	}
	im := newImage(t, append(repeat(30, 60_000), 0, 5<<20)...)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			addr := start(t, tt.cfg)
			c := newClient(t, tt.cred)
			roundTrip(t, c, im, parse(t, addr+"/team/app:v1"))
			roundTrip(t, c, im, parse(t, addr+"/team/app@"+im.desc.Digest.String()))
		})
	}
}

func TestCredentials(t *testing.T) {
	im := newImage(t, 1000)
	users := map[string]string{user: password}
	alice := static(registry.Credential{Username: user, Password: password})
	mallory := static(registry.Credential{Username: user, Password: "guess"})
	for _, tokens := range []bool{false, true} {
		t.Run(fmt.Sprint("tokens ", tokens), func(t *testing.T) {
			addr := start(t, registrytest.Config{Users: users, Tokens: tokens})
			ref := parse(t, addr+"/app:1")
			c := newClient(t, alice)
			roundTrip(t, c, im, ref)
			_, err := c.WithCredentials(mallory).Pull(t.Context(), ref, newStore(t), registry.PullOptions{})
			if !errors.Is(err, registry.ErrUnauthorized) || strings.Contains(err.Error(), "guess") {
				t.Errorf("wrong password: %v", err)
			}
			_, err = c.WithCredentials(nil).Pull(t.Context(), ref, newStore(t), registry.PullOptions{})
			if tokens != (err == nil) {
				t.Errorf("anonymous pull: %v", err)
			}
			_, err = c.WithCredentials(nil).Push(t.Context(), im.store, im.desc, parse(t, addr+"/app:2"), registry.PushOptions{})
			if !errors.Is(err, registry.ErrUnauthorized) {
				t.Errorf("anonymous push: %v", err)
			}
		})
	}
}

// counting counts requests by method.
func counting(n *[4]atomic.Int64) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.Method {
			case http.MethodHead:
				n[0].Add(1)
			case http.MethodGet:
				n[1].Add(1)
			case http.MethodPost:
				n[2].Add(1)
			case http.MethodPut:
				n[3].Add(1)
			}
			next.ServeHTTP(w, r)
		})
	}
}

// An image of many chunks costs a fixed number of requests a chunk, whatever the login.
func TestManyChunks(t *testing.T) {
	im := newImage(t, repeat(500, 64<<10)...)
	var n [4]atomic.Int64
	addr := start(t, registrytest.Config{Users: map[string]string{user: password}, Tokens: true, Wrap: counting(&n)})
	c := newClient(t, static(registry.Credential{Username: user, Password: password}))
	ref := parse(t, addr+"/big:1")
	roundTrip(t, c, im, ref)
	blobs := int64(len(im.m.Blobs()))
	heads, gets, posts, puts := n[0].Load(), n[1].Load(), n[2].Load(), n[3].Load()
	// One more each where it is the first and is sent to log in.
	if heads > blobs+1 || gets > blobs+1 || posts > blobs+1 || puts > blobs+2 {
		t.Errorf("%d blobs took %d HEAD, %d GET, %d POST, %d PUT requests", blobs, heads, gets, posts, puts)
	}
}

func TestMissing(t *testing.T) {
	im := newImage(t, 1000)
	addr := start(t, registrytest.Config{})
	c := newClient(t, nil)
	roundTrip(t, c, im, parse(t, addr+"/app:1"))
	other := format.DigestOf([]byte("other"))
	for ref, word := range map[string]string{
		"/none:1":                     "no tag 1 in repository ",
		"/app:2":                      "no tag 2",
		"/app:1@" + other.String():    "tag 1 holds " + im.desc.Digest.String(),
		"/app:2@" + other.String():    "nor is there a tag 2",
		"/none@" + other.String():     "none",
		"/app:nope@" + other.String(): other.String(),
	} {
		_, _, err := c.Resolve(t.Context(), parse(t, addr+ref))
		if !errors.Is(err, registry.ErrNotFound) || !strings.Contains(err.Error(), word) {
			t.Errorf("resolve %s: %v, want %q", ref, err, word)
		}
	}
}

// This registry refuses manifests over 4 MiB; the message says why and what to do.
func TestLargeManifestRefused(t *testing.T) {
	im := newImage(t, 1000)
	im.m.Annotations = map[string]string{"filler": strings.Repeat("x", 4<<20)}
	im.seal(t)
	addr := start(t, registrytest.Config{})
	warned := ""
	_, err := newClient(t, nil).Push(t.Context(), im.store, im.desc, parse(t, addr+"/app:1"), registry.PushOptions{Warn: func(m string) { warned += m }})
	if err == nil || !strings.Contains(err.Error(), "most registries refuse more than 4 MiB") {
		t.Errorf("push: %v", err)
	}
	if !strings.Contains(warned, "4 MiB") {
		t.Errorf("warned %q", warned)
	}
}

// proxy puts a toxiproxy before addr and returns its address.
func proxy(t *testing.T, addr string, toxics ...string) string {
	t.Helper()
	srv := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(prometheus.NewRegistry()), zerolog.Nop())
	p := toxiproxy.NewProxy(srv, "test", "127.0.0.1:0", addr)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	for _, toxic := range toxics {
		if _, err := p.Toxics.AddToxicJson(strings.NewReader(toxic)); err != nil {
			t.Fatal(err)
		}
	}
	return p.Listen
}

func TestBrokenConnections(t *testing.T) {
	im := newImage(t, append(repeat(40, 64<<10), 3<<20)...)
	tests := []struct{ name, toxic string }{
		// Each connection is cut after so many bytes, most of them within a blob.
		{"answers cut", `{"type":"limit_data","stream":"downstream","attributes":{"bytes":300000}}`},
		{"requests cut", `{"type":"limit_data","stream":"upstream","attributes":{"bytes":4000000}}`},
		{"small pieces", `{"type":"slicer","stream":"downstream","attributes":{"average_size":3000,"size_variation":1000,"delay":1}}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			addr := start(t, registrytest.Config{})
			roundTrip(t, newClient(t, nil), im, parse(t, proxy(t, addr, tt.toxic)+"/app:1"))
		})
	}
}

func TestRegistryGoesAway(t *testing.T) {
	im := newImage(t, repeat(40, 64<<10)...)
	addr := start(t, registrytest.Config{})
	roundTrip(t, newClient(t, nil), im, parse(t, addr+"/app:1"))
	// Nothing comes back after a while, with a reset.
	through := proxy(t, addr, `{"type":"reset_peer","stream":"downstream","attributes":{"timeout":0}}`)
	dst := newStore(t)
	_, err := newClient(t, nil).Pull(t.Context(), parse(t, through+"/app:1"), dst, registry.PullOptions{})
	if !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("pull: %v", err)
	}
	for d, err := range dst.Blobs() {
		t.Errorf("blob %s was stored, %v", d, err)
	}
}

func BenchmarkPull(b *testing.B) {
	im := newImage(b, repeat(500, 64<<10)...)
	addr := start(b, registrytest.Config{})
	c := newClient(b, nil)
	ref := parse(b, addr+"/app:1")
	if _, err := c.Push(b.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(500 * 64 << 10)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Pull(b.Context(), ref, discard{}, registry.PullOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

// discard is a destination that keeps nothing.
type discard struct{}

func (discard) Size(format.Digest) (int64, error)           { return 0, store.ErrNotFound }
func (discard) Verify(context.Context, format.Digest) error { return store.ErrNotFound }
func (discard) Put([]byte, format.Digest) error             { return nil }
func (discard) Sync() error                                 { return nil }
func (discard) PutReader(_ context.Context, _ format.Digest, _ int64, r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}
