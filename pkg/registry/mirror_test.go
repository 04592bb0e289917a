package registry_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

// The registry that the mirrors of these tests stand in for; nobody has that name.
const upstream = "registry.invalid:5000"

// mirrors writes a hosts.toml for upstream: mirrors in order, then server.
func mirrors(t *testing.T, server string, hosts ...string) string {
	t.Helper()
	text := fmt.Sprintf("server = \"http://%s\"\n", server)
	for _, h := range hosts {
		addr, caps, _ := strings.Cut(h, " ")
		text += fmt.Sprintf("[host.\"http://%s\"]\ncapabilities = [%s]\n", addr, caps)
	}
	return certsDir(t, "registry.invalid_5000_", text)
}

const (
	pullOnly    = ` "pull"`
	pullResolve = ` "pull", "resolve"`
)

func TestMirrorOrder(t *testing.T) {
	im := newImage(t, 5)
	full, server := memory(), memory()
	third, thirdAddr := serve(t, server)
	second, secondAddr := serve(t, full)
	first, firstAddr := serve(t, memory()) // it has nothing
	mustPush(t, im, secondAddr, "team/app:1")
	mustPush(t, im, thirdAddr, "team/app:1")
	dir := mirrors(t, thirdAddr, firstAddr+pullResolve, secondAddr+pullOnly)
	c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })

	for _, h := range []*hook{first, second, third} {
		h.set(nil)
	}
	dst := newStore(t)
	ref := mustParse(t, upstream+"/team/app:1")
	if _, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	im.checkWhole(t, dst)
	// The tag: the first does not know it, the second may not say, the server does.
	if a, b, c := first.count("GET", "/manifests/"), second.count("GET", "/manifests/"), third.count("GET", "/manifests/"); a != 1 || b != 0 || c != 1 {
		t.Errorf("asked for the tag %d, %d, %d times, want 1, 0, 1", a, b, c)
	}
	// Blobs: the first has none, the second all.
	if n := third.count("/blobs/"); n != 0 {
		t.Errorf("the server was asked for %d blobs", n)
	}
	if n := second.count("GET", "/blobs/"); n != len(im.m.Blobs())-1 {
		t.Errorf("the second mirror was asked for %d blobs", n)
	}
	for _, h := range []*hook{first, second, third} {
		if all, ns := h.count(""), h.count("ns=registry.invalid%3A5000"); all != ns {
			t.Errorf("%d of %d requests say what is mirrored", ns, all)
		}
	}

	// By digest any mirror will do.
	second.set(nil)
	third.set(nil)
	if _, _, err := c.Resolve(t.Context(), mustParse(t, upstream+"/team/app@"+im.desc.Digest.String())); err != nil {
		t.Fatal(err)
	}
	if a, b := second.count("GET"), third.count("GET"); a != 1 || b != 0 {
		t.Errorf("asked for the digest %d, %d times, want 1, 0", a, b)
	}

	// All fail: the server's error counts, the others are told.
	_, _, err := c.Resolve(t.Context(), mustParse(t, upstream+"/team/none:1"))
	wantError(t, err, []error{registry.ErrNotFound}, "no repository team/none", thirdAddr, "before that: http://"+firstAddr+" answered 404")
}

func TestBadMirrors(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := closed.Addr().String()
	closed.Close()
	im := newImage(t, 40)
	tests := []struct {
		name  string
		fault func(http.ResponseWriter, *http.Request) bool // nil: nobody listens
	}{
		{"nobody listens", nil},
		{"500", answer(isBlobGet, 500, nil, "")},
		{"401", answer(isBlobGet, 401, nil, "")},
		{"429", answer(isBlobGet, 429, map[string]string{"Retry-After": "3600"}, "")},
		{"wrong bytes", answer(isBlobGet, 200, nil, "wrong")},
		{"web page", answer(isBlobGet, 200, map[string]string{"Content-Type": "text/html"}, "wrong")},
		{"reset", func(w http.ResponseWriter, r *http.Request) bool { reset(t, w); return true }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, serverAddr := serve(t, memory())
			hk, addr := serve(t, memory())
			if tt.fault == nil {
				addr = dead
			}
			mustPush(t, im, serverAddr, "app:1")
			hk.set(tt.fault)
			var log logged
			c := newClient(t, func(cfg *registry.Config) {
				cfg.CertsDir = mirrors(t, serverAddr, addr+pullOnly)
				cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
			})
			dst := newStore(t)
			if _, err := c.Pull(t.Context(), mustParse(t, upstream+"/app:1"), dst, registry.PullOptions{}); err != nil {
				t.Fatal(err)
			}
			im.checkWhole(t, dst)
			// Three failures, and what was under way meanwhile.
			if n := hk.count("GET"); n > 3+4 {
				t.Errorf("a mirror that keeps failing was asked %d times", n)
			}
			if n := strings.Count(log.String(), "mirror keeps failing"); n != 1 || !strings.Contains(log.String(), addr) {
				t.Errorf("%d warnings, want one:\n%s", n, log.String())
			}
		})
	}
}

// A mirror that may resolve is trusted with tags, and only then.
func TestMirrorLies(t *testing.T) {
	good, evil := newImage(t, 1), newImage(t, 2)
	_, server := serve(t, memory())
	_, mirror := serve(t, memory())
	mustPush(t, good, server, "app:1")
	mustPush(t, evil, mirror, "app:1")
	ref := mustParse(t, upstream+"/app:1")
	for caps, want := range map[string]format.Digest{pullOnly: good.desc.Digest, pullResolve: evil.desc.Digest} {
		c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = mirrors(t, server, mirror+caps) })
		desc, _, err := c.Resolve(t.Context(), ref)
		if err != nil || desc.Digest != want {
			t.Errorf("mirror for%s: resolved %s, %v, want %s", caps, desc.Digest, err, want)
		}
	}
	// It sends another manifest for a digest: that is noticed, and the server has it.
	hk, liar := serve(t, memory())
	b := evil.blob(t, evil.desc.Digest)
	hk.set(answer(isManifestGet, 200, nil, string(b)))
	c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = mirrors(t, server, liar+pullResolve) })
	ref.Digest = good.desc.Digest
	if desc, got, err := c.Resolve(t.Context(), ref); err != nil || desc.Digest != good.desc.Digest || format.DigestOf(got) != good.desc.Digest {
		t.Errorf("resolved %s, %v", desc.Digest, err)
	}
	// Nobody has it but the liar.
	ref.Digest = format.DigestOf([]byte("other"))
	_, _, err := c.Resolve(t.Context(), ref)
	wantError(t, err, []error{registry.ErrNotFound}, "no manifest "+ref.Digest.String(), "sent a manifest with digest "+evil.desc.Digest.String())
}

// Each endpoint gets the credentials for its own name, and no other's.
func TestMirrorCredentials(t *testing.T) {
	im := newImage(t, 2)
	var server, mirror *hook
	var serverAddr, mirrorAddr string
	server, serverAddr = serve(t, memory())
	mirror, mirrorAddr = serve(t, memory())
	mustPush(t, im, serverAddr, "app:1")
	gate := func(name, pass string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			u, p, ok := r.BasicAuth()
			if ok && (u != name || p != pass) {
				t.Errorf("%s got the credentials of %s", name, u)
			}
			if !ok {
				w.Header().Set("Www-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
			}
			return !ok
		}
	}
	mirror.set(gate("mirror", "m"))
	server.set(gate("server", "s"))
	asked := make(chan string, 100)
	c := newClient(t, func(cfg *registry.Config) {
		cfg.CertsDir = mirrors(t, serverAddr, mirrorAddr+pullResolve)
		cfg.Credentials = func(_ context.Context, host, repository string) (registry.Credential, error) {
			asked <- host + " " + repository
			switch host {
			case mirrorAddr:
				return registry.Credential{Username: "mirror", Password: "m"}, nil
			case serverAddr:
				return registry.Credential{Username: "server", Password: "s"}, nil
			}
			return registry.Credential{Username: "other", Password: "o"}, nil
		}
	})
	dst := newStore(t)
	if _, err := c.Pull(t.Context(), mustParse(t, upstream+"/app:1"), dst, registry.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	im.checkWhole(t, dst)
	close(asked)
	for a := range asked {
		if a != mirrorAddr+" app" && a != serverAddr+" app" {
			t.Errorf("asked for the credentials of %q", a)
		}
	}
}

func TestPushGoesToTheFirstThatMayBePushedTo(t *testing.T) {
	im := newImage(t, 2)
	server, serverAddr := serve(t, memory())
	mirror, mirrorAddr := serve(t, memory())
	pushable, pushableAddr := serve(t, memory())
	ref := mustParse(t, upstream+"/app:1")
	c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = mirrors(t, serverAddr, mirrorAddr+pullResolve) })
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	if mirror.count("") != 0 || server.count("PUT", "/manifests/1") != 1 {
		t.Error("the push did not go to the server alone")
	}
	server.set(nil)
	c = newClient(t, func(cfg *registry.Config) { cfg.CertsDir = mirrors(t, serverAddr, pushableAddr+` "push"`) })
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	if server.count("") != 0 || pushable.count("PUT", "/manifests/1") != 1 {
		t.Error("the push did not go to the host that may be pushed to alone")
	}
	dir := certsDir(t, "registry.invalid_5000_", `capabilities = ["pull"]`)
	c = newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })
	_, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{})
	wantError(t, err, []error{registry.ErrInvalidConfig}, "capability push")
	_, _, err = c.Resolve(t.Context(), ref)
	wantError(t, err, []error{registry.ErrInvalidConfig}, "capabilities")
}

// hosts.toml is read anew for each operation.
func TestHostsChange(t *testing.T) {
	im := newImage(t, 1)
	_, a := serve(t, memory())
	_, b := serve(t, memory())
	mustPush(t, im, b, "app:1")
	dir := mirrors(t, a)
	c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })
	ref := mustParse(t, upstream+"/app:1")
	_, _, err := c.Resolve(t.Context(), ref)
	wantError(t, err, []error{registry.ErrNotFound}, "no repository")
	writeFile(t, filepath.Join(dir, "registry.invalid_5000_", "hosts.toml"), `server = "http://`+b+`"`)
	if _, _, err := c.Resolve(t.Context(), ref); err != nil {
		t.Error(err)
	}
}

// A mirror below a path, with a header of its own.
func TestOverridePathAndHeader(t *testing.T) {
	im := newImage(t, 1)
	reg := memory()
	hk, addr := serve(t, reg)
	mustPush(t, im, addr, "app:1")
	hk.set(func(w http.ResponseWriter, r *http.Request) bool {
		rest, ok := strings.CutPrefix(r.URL.Path, "/api/mirror/")
		if !ok || r.Header.Get("X-Key") != "k" {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		r.URL.Path = "/v2/" + rest
		reg.ServeHTTP(w, r)
		return true
	})
	dir := certsDir(t, "_default", fmt.Sprintf("[host.\"http://%s/api/mirror/\"]\noverride_path = true\nheader = {x-key = \"k\"}\n", addr))
	c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })
	dst := newStore(t)
	if _, err := c.Pull(t.Context(), mustParse(t, "any.invalid/app:1"), dst, registry.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	im.checkWhole(t, dst)
}
