package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	foreignType    = "application/vnd.example+json"
)

// putManifest puts a document into a registry and returns its digest.
func putManifest(t *testing.T, addr, repo, target, mediaType, doc string) format.Digest {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+addr+"/v2/"+repo+"/manifests/"+target, strings.NewReader(doc))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("put manifest: %s", resp.Status)
	}
	return format.DigestOf([]byte(doc))
}

// Manifests of any kind come as they are, by tag and by digest.
func TestManifest(t *testing.T) {
	hk, addr := serve(t, memory())
	c := newClient(t, nil)
	for _, tt := range []struct{ name, doc, stored, want string }{
		{"says what it is", `{"schemaVersion":2,"mediaType":"` + dockerManifest + `","layers":[]}`, dockerManifest, dockerManifest},
		{"the header says it", `{"schemaVersion":2}`, foreignType, foreignType},
		{"document and header differ", `{"mediaType":"` + foreignType + `"}`, dockerManifest, foreignType},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := putManifest(t, addr, "app", "v1", tt.stored, tt.doc)
			hk.set(nil)
			for _, ref := range []string{"/app:v1", "/app@" + d.String(), "/app:gone@" + d.String()} {
				got, err := c.Manifest(t.Context(), mustParse(t, addr+ref), 1<<20, dockerManifest, foreignType)
				if err != nil {
					t.Fatal(err)
				}
				if got.Digest != d || got.MediaType != tt.want || string(got.Bytes) != tt.doc {
					t.Errorf("%s: %s %s %q, want %s %s %q", ref, got.Digest, got.MediaType, got.Bytes, d, tt.want, tt.doc)
				}
			}
		})
	}
}

// What the caller accepts is what the registry is told.
func TestManifestAccept(t *testing.T) {
	hk, addr := serve(t, memory())
	putManifest(t, addr, "app", "v1", foreignType, `{}`)
	accepted := make(chan string, 2)
	hk.set(func(_ http.ResponseWriter, r *http.Request) bool {
		accepted <- r.Header.Get("Accept")
		return false
	})
	for _, accept := range [][]string{{dockerManifest, foreignType}, nil} {
		if _, err := newClient(t, nil).Manifest(t.Context(), mustParse(t, addr+"/app:v1"), 1<<20, accept...); err != nil {
			t.Fatal(err)
		}
		if got, want := <-accepted, strings.Join(accept, ", "); got != want {
			t.Errorf("accepts %q, want %q", got, want)
		}
	}
}

func TestManifestErrors(t *testing.T) {
	hk, addr := serve(t, memory())
	d := putManifest(t, addr, "app", "v1", foreignType, `{"a":"document"}`)
	other := format.DigestOf([]byte("other"))
	for _, tt := range []struct {
		name, ref string
		limit     int64
		hook      func(http.ResponseWriter, *http.Request) bool
		kind      error
		words     []string
	}{
		{"too large", "/app:v1", 15, nil, format.ErrTooLarge, []string{"more than 15 bytes"}},
		{"no such tag", "/app:none", 100, nil, registry.ErrNotFound, []string{"there is no tag none"}},
		{"no such digest", "/app:v1@" + other.String(), 100, nil, registry.ErrNotFound, []string{"tag v1 holds " + d.String()}},
		{"other bytes", "/app@" + d.String(), 100, answer(isManifestGet, 200, nil, `{"b":1}`), registry.ErrDigestMismatch, []string{"after 4 attempts"}},
		{"a web page", "/app:v1", 100, answer(isManifestGet, 200, nil, "<html>"), registry.ErrUnexpectedAnswer, []string{"web page"}},
		{"not a document", "/app:v1", 100, answer(isManifestGet, 200, nil, "hello"), registry.ErrUnexpectedAnswer, nil},
		{"no access", "/app:v1", 100, answer(isManifestGet, 403, nil, ""), registry.ErrForbidden, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			hk.set(tt.hook)
			defer hk.set(nil)
			ref := mustParse(t, addr+tt.ref)
			_, err := newClient(t, nil).Manifest(t.Context(), ref, tt.limit, foreignType)
			wantError(t, err, []error{tt.kind}, append(tt.words, "get manifest "+ref.String())...)
		})
	}
	if _, err := newClient(t, nil).Manifest(t.Context(), registry.Reference{}, 100); !errors.Is(err, registry.ErrInvalidReference) {
		t.Errorf("empty reference: %v", err)
	}
}

// readBlob reads a blob to its end.
func readBlob(ctx context.Context, c *registry.Client, ref registry.Reference, d format.Digest, size int64) ([]byte, error) {
	r, err := c.Blob(ctx, ref, d, size)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

func TestBlob(t *testing.T) {
	_, addr := serve(t, memory())
	im := newImage(t, 2)
	ref := mustPush(t, im, addr, "app")
	c := newClient(t, nil)
	for _, d := range im.m.Blobs() {
		for _, size := range []int64{d.Size, -1} {
			b, err := readBlob(t.Context(), c, ref, d.Digest, size)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(b, im.blob(t, d.Digest)) {
				t.Errorf("%d bytes of %s, said to be %d, are others", len(b), d.Digest, size)
			}
		}
	}
}

// A stream that goes wrong never ends well, and a break of the connection is overcome.
func TestBlobFaults(t *testing.T) {
	hk, addr := serve(t, memory())
	im := newImage(t, 0)
	ref := mustPush(t, im, addr, "app")
	small, big := im.m.Layers[0], im.m.Layers[2]
	// breaks returns a hook that ends each answer after part bytes, the first n times.
	breaks := func(part int, n int32, ranges, length bool) func(http.ResponseWriter, *http.Request) bool {
		var asked atomic.Int32
		return func(w http.ResponseWriter, r *http.Request) bool {
			if !isBlobGet(r) || asked.Add(1) > n {
				return false
			}
			b := im.blob(t, digestOf(t, r))
			first := 0
			if s := r.Header.Get("Range"); s != "" && ranges {
				if _, err := fmt.Sscanf(s, "bytes=%d-", &first); err != nil {
					t.Error(err)
				}
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, len(b)-1, len(b)))
			}
			if length {
				w.Header().Set("Content-Length", fmt.Sprint(len(b)-first))
			}
			if first > 0 {
				w.WriteHeader(http.StatusPartialContent)
			}
			_, _ = w.Write(b[first:min(len(b), first+part)])
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
	}
	changed := bytes.Clone(im.blob(t, big.Digest))
	changed[len(changed)-1] ^= 1
	const always = 1 << 30
	for _, tt := range []struct {
		name  string
		d     format.Descriptor
		size  int64 // as asked for, if not d's
		hook  func(http.ResponseWriter, *http.Request) bool
		kind  error // nil: it arrives
		words []string
	}{
		{name: "breaks with headway", d: big, hook: breaks(200<<10, always, true, true)},
		{name: "breaks, no ranges", d: big, hook: breaks(1<<20, 2, false, true)},
		{name: "breaks, no length", d: big, hook: breaks(200<<10, 9, true, false)},
		{name: "breaks, nobody knows the length", d: big, size: -1, hook: breaks(200<<10, 3, true, false)},
		{name: "breaks before the first byte", d: big, hook: breaks(0, 2, true, true)},
		{name: "small one breaks", d: small, hook: breaks(100, 2, true, true)},
		{name: "always breaks", d: big, hook: breaks(0, always, true, true), kind: registry.ErrUnavailable, words: []string{"after 4 attempts"}},
		{name: "breaks at the same place", d: big, hook: breaks(1<<20, always, false, true), kind: registry.ErrUnavailable, words: []string{"after 4 attempts"}},
		{name: "other bytes at the end", d: big, hook: answer(isBlobGet, 200, nil, string(changed)), kind: registry.ErrDigestMismatch},
		{name: "too short, and says so", d: big, hook: answer(isBlobGet, 200, nil, string(changed[:2<<20])), kind: registry.ErrDigestMismatch},
		{name: "too long", d: big, size: large - 1, kind: format.ErrTooLarge, words: []string{"announces"}},
		{name: "shorter than said", d: big, size: large + 1, kind: registry.ErrDigestMismatch, words: []string{"the manifest says"}},
		{name: "small one of other bytes", d: small, hook: answer(isBlobGet, 200, nil, "x"), kind: registry.ErrDigestMismatch, words: []string{"after 4 attempts"}},
		{name: "not there", d: format.Descriptor{Digest: format.DigestOf([]byte("none")), Size: large}, kind: registry.ErrNotFound},
		{name: "a web page", d: big, hook: answer(isBlobGet, 200, map[string]string{"Content-Type": "text/html"}, "<html>"), kind: registry.ErrUnexpectedAnswer},
		{name: "no access", d: big, hook: answer(isBlobGet, 401, nil, ""), kind: registry.ErrUnauthorized},
	} {
		t.Run(tt.name, func(t *testing.T) {
			hk.set(tt.hook)
			defer hk.set(nil)
			if tt.size == 0 {
				tt.size = tt.d.Size
			}
			b, err := readBlob(t.Context(), newClient(t, nil), ref, tt.d.Digest, tt.size)
			if tt.kind != nil {
				wantError(t, err, []error{tt.kind}, append(tt.words, "get blob "+tt.d.Digest.String()+" from "+addr+"/app: ")...)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if format.DigestOf(b) != tt.d.Digest {
				t.Errorf("%d bytes, not those of the blob", len(b))
			}
		})
	}
}

// A mirror that dies in the middle is replaced by the next one, from where it was.
func TestBlobChangesMirror(t *testing.T) {
	im := newImage(t, 0)
	big := im.m.Layers[2]
	_, serverAddr := serve(t, memory())
	hk, addr := serve(t, memory())
	mustPush(t, im, serverAddr, "app:1")
	mustPush(t, im, addr, "app:1")
	var asked atomic.Int32
	hk.set(func(w http.ResponseWriter, r *http.Request) bool {
		if isBlobGet(r) && asked.Add(1) == 1 {
			b := im.blob(t, big.Digest)
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			_, _ = w.Write(b[:len(b)/2])
			_ = http.NewResponseController(w).Flush()
		}
		reset(t, w)
		return true
	})
	c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = mirrors(t, serverAddr, addr+pullOnly) })
	b, err := readBlob(t.Context(), c, mustParse(t, upstream+"/app:1"), big.Digest, big.Size)
	if err != nil {
		t.Fatal(err)
	}
	if format.DigestOf(b) != big.Digest {
		t.Errorf("%d bytes, not those of the blob", len(b))
	}
}

// A stream ends with its context, and when it is closed; checkLeaks looks at what is left.
func TestBlobEndsEarly(t *testing.T) {
	hk, addr := serve(t, memory())
	im := newImage(t, 0)
	ref := mustPush(t, im, addr, "app")
	big := im.m.Layers[2]
	hk.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlobGet(r) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(big.Size))
		_, _ = w.Write(im.blob(t, big.Digest)[:1000])
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		return true
	})
	stop := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	r, err := newClient(t, nil).Blob(ctx, ref, big.Digest, big.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	cancel(stop)
	_, err = io.ReadAll(r)
	wantError(t, err, []error{stop}, "get blob")

	r, err = newClient(t, nil).Blob(t.Context(), ref, big.Digest, big.Size)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read after close: %v", err)
	}
}
