package registry_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

// reset breaks the connection with a RST.
func reset(t *testing.T, w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		if err := tcp.SetLinger(0); err != nil {
			t.Error(err)
		}
	}
	conn.Close()
}

// isBlobGet reports whether r fetches a blob.
func isBlobGet(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/sha256:")
}

func isManifestGet(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/")
}

// answer returns a hook that gives every matching request the same answer.
func answer(match func(*http.Request) bool, status int, header map[string]string, body string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !match(r) {
			return false
		}
		for k, v := range header {
			w.Header().Set(k, v)
		}
		w.WriteHeader(status)
		fmt.Fprint(w, body)
		return true
	}
}

func TestAnswers(t *testing.T) {
	const json = "application/json"
	denied := `{"errors":[{"code":"DENIED","message":"requested access is denied","detail":"x"}]}`
	tests := []struct {
		name   string
		match  func(*http.Request) bool
		status int
		header map[string]string
		body   string
		kind   error
		words  []string
		// tries is how often the first thing is asked for.
		tries int
	}{
		{name: "401 without challenge", match: isManifestGet, status: 401, kind: registry.ErrUnauthorized, tries: 1, words: []string{"401 Unauthorized", "docker login", "nodePublishSecretRef"}},
		{name: "401 basic, no credentials", match: isManifestGet, status: 401, header: map[string]string{"Www-Authenticate": `Basic realm="x"`}, kind: registry.ErrUnauthorized, tries: 1, words: []string{"401 Unauthorized", "docker login"}},
		{name: "401 unknown scheme", match: isManifestGet, status: 401, header: map[string]string{"Www-Authenticate": `Negotiate`}, kind: registry.ErrUnauthorized, tries: 1},
		{name: "403", match: isManifestGet, status: 403, header: map[string]string{"Content-Type": json}, body: denied, kind: registry.ErrForbidden, tries: 1, words: []string{`"DENIED: requested access is denied"`}},
		{name: "404 repository", match: isManifestGet, status: 404, body: `{"errors":[{"code":"NAME_UNKNOWN"}]}`, kind: registry.ErrNotFound, tries: 1, words: []string{"no repository app"}},
		{name: "404 tag", match: isManifestGet, status: 404, body: "404 page not found", kind: registry.ErrNotFound, tries: 1, words: []string{"no tag v1", "/app"}},
		{name: "429", match: isManifestGet, status: 429, kind: registry.ErrRateLimited, tries: 4, words: []string{"too many requests", "after 4 attempts"}},
		{name: "429 for an hour", match: isManifestGet, status: 429, header: map[string]string{"Retry-After": "3600"}, kind: registry.ErrRateLimited, tries: 1, words: []string{"1h0m0s"}},
		{name: "429 until a date", match: isManifestGet, status: 429, header: map[string]string{"Retry-After": "Fri, 31 Dec 2049 23:59:59 GMT"}, kind: registry.ErrRateLimited, tries: 1},
		{name: "429 with nonsense", match: isManifestGet, status: 429, header: map[string]string{"Retry-After": "soon"}, kind: registry.ErrRateLimited, tries: 4},
		{name: "500", match: isManifestGet, status: 500, body: "boom", kind: registry.ErrUnavailable, tries: 4, words: []string{"500 Internal Server Error", `"boom"`}},
		{name: "503 web page", match: isManifestGet, status: 503, header: map[string]string{"Content-Type": "text/html"}, body: "<html>", kind: registry.ErrUnavailable, tries: 4, words: []string{"web page"}},
		{name: "501", match: isManifestGet, status: 501, kind: registry.ErrUnavailable, tries: 1},
		{name: "418", match: isManifestGet, status: 418, kind: registry.ErrRefused, tries: 1},
		{name: "204", match: isManifestGet, status: 204, kind: registry.ErrUnexpectedAnswer, tries: 1},
		{name: "hostile text", match: isManifestGet, status: 500, body: "\x1b[31m\x00\xff\n" + strings.Repeat("A", 100000), kind: registry.ErrUnavailable, tries: 4, words: []string{`\x1b[31m`, "…"}},
		{name: "blob 404", match: isBlobGet, status: 404, body: `{"errors":[{"code":"BLOB_UNKNOWN"}]}`, kind: registry.ErrNotFound, words: []string{"get blob sha256:", "push the image again"}},
		{name: "blob 403", match: isBlobGet, status: 403, kind: registry.ErrForbidden, words: []string{"get blob sha256:"}},
		{name: "blob 500", match: isBlobGet, status: 500, kind: registry.ErrUnavailable},
		{name: "blob web page", match: isBlobGet, status: 200, header: map[string]string{"Content-Type": "text/html"}, body: "<html>", kind: registry.ErrUnexpectedAnswer, words: []string{"web page"}},
		{name: "blob of wrong bytes", match: isBlobGet, status: 200, body: "something else", kind: registry.ErrDigestMismatch, words: []string{"14 bytes with digest sha256:", "after 4 attempts"}},
		{name: "manifest of another digest", match: isManifestGet, status: 200, header: map[string]string{"Docker-Content-Digest": "sha256:" + strings.Repeat("1", 64)}, body: `{"schemaVersion":2}`, kind: registry.ErrDigestMismatch, tries: 4},
	}
	hk, addr := serve(t, memory())
	im := newImage(t, 5)
	mustPush(t, im, addr, "app")
	ref := mustPush(t, im, addr, "app:v1")
	c := newClient(t, nil)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			hk.set(answer(tt.match, tt.status, tt.header, tt.body))
			defer hk.set(nil)
			dst := newStore(t)
			_, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{})
			wantError(t, err, []error{tt.kind}, append(tt.words, "pull "+ref.String()+": ")...)
			if len(err.Error()) > 1500 {
				t.Errorf("a message of %d bytes", len(err.Error()))
			}
			if got := hk.count("GET ", "/manifests/"); tt.tries > 0 && got != tt.tries {
				t.Errorf("asked %d times, want %d", got, tt.tries)
			}
			checkTidy(t, dst)
			if _, err := dst.Size(im.desc.Digest); err == nil {
				t.Error("the manifest was stored though the image is not whole")
			}
		})
	}
}

// Whatever happens a few times is overcome.
func TestOvercomes(t *testing.T) {
	im := newImage(t, 12)
	tests := []struct {
		name string
		// fault answers the n-th request, from 1, for a resource.
		fault func(t *testing.T, w http.ResponseWriter, r *http.Request, n int) bool
	}{
		{"500", func(_ *testing.T, w http.ResponseWriter, _ *http.Request, n int) bool {
			if n == 1 {
				w.WriteHeader(http.StatusInternalServerError)
			}
			return n == 1
		}},
		{"429 with Retry-After", func(_ *testing.T, w http.ResponseWriter, _ *http.Request, n int) bool {
			if n == 1 {
				w.Header().Set("Retry-After", "0")
				w.WriteHeader(http.StatusTooManyRequests)
			}
			return n == 1
		}},
		{"reset before the answer", func(t *testing.T, w http.ResponseWriter, _ *http.Request, n int) bool {
			if n == 1 {
				reset(t, w)
			}
			return n == 1
		}},
		{"wrong bytes", func(_ *testing.T, w http.ResponseWriter, r *http.Request, n int) bool {
			if n == 1 && isBlobGet(r) {
				fmt.Fprint(w, "wrong")
				return true
			}
			return false
		}},
		{"half a body", func(t *testing.T, w http.ResponseWriter, r *http.Request, n int) bool {
			if n > 2 || !isBlobGet(r) || r.Header.Get("Range") != "" {
				return false
			}
			d := digestOf(t, r)
			b := im.blob(t, d)
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			_, _ = w.Write(b[:len(b)/2])
			return true
		}},
		{"half a body, no ranges", func(t *testing.T, w http.ResponseWriter, r *http.Request, n int) bool {
			if !isBlobGet(r) {
				return false
			}
			r.Header.Del("Range")
			if n > 2 {
				return false
			}
			b := im.blob(t, digestOf(t, r))
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			_, _ = w.Write(b[:len(b)*n/3])
			return true
		}},
		{"half a body of unknown length", func(t *testing.T, w http.ResponseWriter, r *http.Request, n int) bool {
			if n > 1 || !isBlobGet(r) {
				return false
			}
			b := im.blob(t, digestOf(t, r))
			_, _ = w.Write(b[:len(b)/2])
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}},
		{"unknown length", func(t *testing.T, w http.ResponseWriter, r *http.Request, _ int) bool {
			if !isBlobGet(r) {
				return false
			}
			b := im.blob(t, digestOf(t, r))
			_, _ = w.Write(b[:len(b)/2])
			_ = http.NewResponseController(w).Flush()
			_, _ = w.Write(b[len(b)/2:])
			return true
		}},
		{"too short a body that says so", func(t *testing.T, w http.ResponseWriter, r *http.Request, n int) bool {
			if n > 1 || !isBlobGet(r) {
				return false
			}
			b := im.blob(t, digestOf(t, r))
			_, _ = w.Write(b[:len(b)*2/3])
			return true
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			hk, addr := serve(t, memory())
			ref := mustPush(t, im, addr, "app")
			seen := make(chan map[string]int, 1)
			seen <- map[string]int{}
			hk.set(func(w http.ResponseWriter, r *http.Request) bool {
				m := <-seen
				m[r.URL.Path]++
				n := m[r.URL.Path]
				seen <- m
				return tt.fault(t, w, r, n)
			})
			dst := newStore(t)
			if _, err := newClient(t, nil).Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
				t.Fatal(err)
			}
			im.checkWhole(t, dst)
		})
	}
}

func digestOf(t *testing.T, r *http.Request) format.Digest {
	d, err := format.ParseDigest(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:])
	if err != nil {
		t.Error(err)
	}
	return d
}

// A large blob that breaks off again and again arrives as long as there is headway, with
// ranges, so that no byte comes twice.
func TestResumesLargeBlob(t *testing.T) {
	hk, addr := serve(t, memory())
	im := newImage(t, 0)
	ref := mustPush(t, im, addr, "app")
	big := im.m.Layers[2].Digest
	b := im.blob(t, big)
	const piece = 200 << 10 // bytes until it breaks: more breaks than attempts
	var sent atomic.Int64
	hk.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlobGet(r) || digestOf(t, r) != big {
			return false
		}
		first := 0
		if s := r.Header.Get("Range"); s != "" {
			if _, err := fmt.Sscanf(s, "bytes=%d-", &first); err != nil {
				t.Error(err)
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, len(b)-1, len(b)))
			w.Header().Set("Content-Length", fmt.Sprint(len(b)-first))
			w.WriteHeader(http.StatusPartialContent)
		} else {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		}
		n, _ := w.Write(b[first:min(len(b), first+piece)])
		sent.Add(int64(n))
		return true
	})
	dst := newStore(t)
	var last registry.Progress
	_, err := newClient(t, nil).Pull(t.Context(), ref, dst, registry.PullOptions{Progress: func(p registry.Progress) { last = p }})
	if err != nil {
		t.Fatal(err)
	}
	im.checkWhole(t, dst)
	if sent.Load() != int64(len(b)) {
		t.Errorf("%d bytes were sent of a blob of %d", sent.Load(), len(b))
	}
	if last.DoneBytes != last.TotalBytes {
		t.Errorf("progress ends at %+v", last)
	}
}

func TestAlwaysHalfABody(t *testing.T) {
	for _, i := range []int{0, 2} { // a blob for memory, a large one
		t.Run(fmt.Sprint("layer ", i), func(t *testing.T) {
			hk, addr := serve(t, memory())
			im := newImage(t, 0)
			ref := mustPush(t, im, addr, "app")
			hk.set(func(w http.ResponseWriter, r *http.Request) bool {
				if !isBlobGet(r) || digestOf(t, r) != im.m.Layers[i].Digest {
					return false
				}
				b := im.blob(t, im.m.Layers[i].Digest)
				w.Header().Set("Content-Length", fmt.Sprint(len(b)))
				_, _ = w.Write(b[:len(b)/2])
				return true
			})
			dst := newStore(t)
			_, err := newClient(t, nil).Pull(t.Context(), ref, dst, registry.PullOptions{})
			wantError(t, err, []error{registry.ErrUnavailable, io.ErrUnexpectedEOF}, "broke off", "after 4 attempts")
			if n := hk.count("GET ", im.m.Layers[i].Digest.Hex()); n > 8 {
				t.Errorf("asked %d times", n)
			}
			checkTidy(t, dst)
		})
	}
}

func TestUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	tests := []struct {
		name, ref string
		kind      error
		words     []string
	}{
		{"nobody listens", addr + "/app", registry.ErrUnavailable, []string{"cannot reach http://" + addr + ": dial tcp " + addr + ": connection refused: check", "after 4 attempts"}},
		{"no such host", "registry.invalid/app", registry.ErrUnavailable, []string{"registry.invalid", "check"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := newClient(t, nil).Resolve(t.Context(), mustParse(t, tt.ref))
			wantError(t, err, []error{tt.kind}, tt.words...)
		})
	}
}

// An exchange that stands still is given up and tried again.
func TestStalls(t *testing.T) {
	for _, where := range []string{"before the answer", "within the body"} {
		t.Run(where, func(t *testing.T) {
			hk, addr := serve(t, memory())
			im := newImage(t, 2)
			ref := mustPush(t, im, addr, "app")
			big := im.m.Layers[2].Digest
			var stalled atomic.Bool
			hk.set(func(w http.ResponseWriter, r *http.Request) bool {
				if !isBlobGet(r) || digestOf(t, r) != big || stalled.Swap(true) {
					return false
				}
				if where == "within the body" {
					b := im.blob(t, big)
					w.Header().Set("Content-Length", fmt.Sprint(len(b)))
					_, _ = w.Write(b[:len(b)/2])
					_ = http.NewResponseController(w).Flush()
				}
				<-r.Context().Done()
				return true
			})
			dst := newStore(t)
			c := newClient(t, func(cfg *registry.Config) { cfg.IdleTimeout = 200 * time.Millisecond })
			if _, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
				t.Fatal(err)
			}
			im.checkWhole(t, dst)
		})
	}
}

func TestStallsForEver(t *testing.T) {
	hk, addr := serve(t, memory())
	hk.set(func(_ http.ResponseWriter, r *http.Request) bool {
		<-r.Context().Done()
		return true
	})
	c := newClient(t, func(cfg *registry.Config) { cfg.IdleTimeout = 30 * time.Millisecond })
	_, _, err := c.Resolve(t.Context(), mustParse(t, addr+"/app"))
	wantError(t, err, []error{registry.ErrUnavailable}, "sent nothing for 30ms", "after 4 attempts")
}

func TestCancel(t *testing.T) {
	im := newImage(t, 30)
	stop := errors.New("the user went home")
	for _, where := range []string{"manifest", "blobs", "pause", "upload"} {
		t.Run(where, func(t *testing.T) {
			hk, addr := serve(t, memory())
			ref := mustPush(t, im, addr, "app")
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			hk.set(func(w http.ResponseWriter, r *http.Request) bool {
				switch {
				case where == "pause":
					w.Header().Set("Retry-After", "2")
					w.WriteHeader(http.StatusTooManyRequests)
					time.AfterFunc(20*time.Millisecond, func() { cancel(stop) })
					return true
				case where == "upload" && r.Method == http.MethodHead:
					w.WriteHeader(http.StatusNotFound)
					return true
				case where == "manifest" && isManifestGet(r), where == "upload" && r.Method == http.MethodPut:
					// The server notices that the client is gone when the body has been read.
					_, _ = io.Copy(io.Discard, r.Body)
					cancel(stop)
					<-r.Context().Done()
					return true
				case where == "blobs" && isBlobGet(r):
					b := im.blob(t, digestOf(t, r))
					w.Header().Set("Content-Length", fmt.Sprint(len(b)))
					_, _ = w.Write(b[:len(b)/2])
					_ = http.NewResponseController(w).Flush()
					cancel(stop)
					<-r.Context().Done()
					return true
				}
				return false
			})
			dst := newStore(t)
			c := newClient(t, nil)
			var err error
			if where == "upload" {
				_, err = c.Push(ctx, im.store, im.desc, ref, registry.PushOptions{})
			} else {
				_, err = c.Pull(ctx, ref, dst, registry.PullOptions{})
			}
			wantError(t, err, []error{stop}, ref.String())
			checkTidy(t, dst)
		})
	}
}

func TestLogsRetriesWithoutSecrets(t *testing.T) {
	hk, addr := serve(t, memory())
	hk.set(answer(isManifestGet, 500, nil, "boom"))
	var log logged
	c := newClient(t, func(cfg *registry.Config) {
		cfg.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	if _, _, err := c.Resolve(t.Context(), mustParse(t, addr+"/app")); err == nil {
		t.Fatal("no error")
	}
	if got := strings.Count(log.String(), "trying again"); got != 3 {
		t.Errorf("%d retries were logged, want 3:\n%s", got, log.String())
	}
}
