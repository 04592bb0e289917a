package registry_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

const (
	user     = "alice"
	password = "pass-word-of-alice"
)

// creds returns the credential c for the registry host and counts how often it is asked.
func creds(host string, c registry.Credential) registry.CredentialFunc {
	return func(_ context.Context, registryHost, _ string) (registry.Credential, error) {
		if registryHost != host {
			return registry.Credential{}, nil
		}
		return c, nil
	}
}

// basicAuth lets alice in.
func basicAuth(w http.ResponseWriter, r *http.Request) bool {
	if u, p, ok := r.BasicAuth(); ok && u == user && p == password {
		return false
	}
	w.Header().Set("Www-Authenticate", `Basic realm="test"`)
	w.WriteHeader(http.StatusUnauthorized)
	fmt.Fprintf(w, `{"errors":[{"code":"UNAUTHORIZED","message":"you sent %s"}]}`, r.Header.Get("Authorization"))
	return true
}

// tokenServer gives tokens to alice and, for pulling, to anyone if anonymous is set; it is
// also the registry's gate.
type tokenServer struct {
	addr      string
	anonymous bool

	mu     sync.Mutex // guards what follows
	valid  map[string]string
	asked  int
	scopes []string
	// uses is how often a token is good; 0: for ever.
	uses int
	left map[string]int
}

func (ts *tokenServer) gate(w http.ResponseWriter, r *http.Request) bool {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if r.URL.Path == "/token" {
		ts.token(w, r)
		return true
	}
	need := "pull"
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		need = "push"
	}
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if actions, ok := ts.valid[token]; ok && strings.Contains(actions, need) {
		if ts.left[token]--; ts.uses == 0 || ts.left[token] >= 0 {
			return false
		}
	}
	w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="reg",scope="repository:app:%s"`, ts.addr, need))
	w.WriteHeader(http.StatusUnauthorized)
	fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
	return true
}

func (ts *tokenServer) token(w http.ResponseWriter, r *http.Request) {
	ts.asked++
	if err := r.ParseForm(); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	ts.scopes = append(ts.scopes, strings.Join(r.Form["scope"], " "))
	u, p, ok := r.BasicAuth()
	known := ok && u == user && p == password || r.Form.Get("refresh_token") == "refresh-of-alice"
	actions := "pull,push"
	switch {
	case known:
	case ts.anonymous && !ok:
		actions = "pull"
	default:
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	token := fmt.Sprintf("token-%d-secret", ts.asked)
	if ts.valid == nil {
		ts.valid, ts.left = map[string]string{}, map[string]int{}
	}
	ts.valid[token], ts.left[token] = actions, ts.uses
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": 60})
}

func TestBasicAuth(t *testing.T) {
	hk, addr := serve(t, memory())
	hk.set(basicAuth)
	im := newImage(t, 10)
	ref := mustParse(t, addr+"/app:1")
	good := newClient(t, func(cfg *registry.Config) {
		cfg.Credentials = creds(addr, registry.Credential{Username: user, Password: password})
	})
	if _, err := good.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	dst := newStore(t)
	if _, err := good.Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	im.checkWhole(t, dst)

	bad := map[string]registry.CredentialFunc{
		"nobody":             nil,
		"other host's":       creds("other.example", registry.Credential{Username: user, Password: password}),
		"wrong password":     creds(addr, registry.Credential{Username: user, Password: "wrong-secret"}),
		"no password":        creds(addr, registry.Credential{Username: user}),
		"only refresh token": creds(addr, registry.Credential{IdentityToken: "refresh-secret"}),
		"failing keychain": func(context.Context, string, string) (registry.Credential, error) {
			return registry.Credential{}, fmt.Errorf("the helper is out for lunch: %w", registry.ErrInvalidConfig)
		},
	}
	for name, f := range bad {
		t.Run(name, func(t *testing.T) {
			// The same connections, other credentials: nothing of alice's is left.
			_, err := good.WithCredentials(f).Pull(t.Context(), ref, newStore(t), registry.PullOptions{})
			wantError(t, err, []error{registry.ErrUnauthorized}, addr)
			wantNoSecrets(t, err.Error())
		})
	}
}

// wantNoSecrets fails if the text has a secret, plain or encoded.
func wantNoSecrets(t *testing.T, text string) {
	t.Helper()
	for _, s := range []string{password, "wrong-secret", "refresh-of-alice", "refresh-secret", "-secret", "X-Signature"} {
		for _, form := range []string{s, base64.StdEncoding.EncodeToString([]byte(user + ":" + s))} {
			if strings.Contains(text, form) {
				t.Errorf("a secret is in %q", text)
			}
		}
	}
}

func TestTokenAuth(t *testing.T) {
	im := newImage(t, 20)
	tests := []struct {
		name      string
		cred      registry.Credential
		anonymous bool
		uses      int
		push      bool
		kind      error
		// tokens is how many are asked for at most for one pull.
		tokens int
	}{
		{name: "anonymous", anonymous: true, tokens: 1},
		{name: "anonymous refused", kind: registry.ErrUnauthorized, tokens: 1},
		{name: "password", cred: registry.Credential{Username: user, Password: password}, push: true, tokens: 1},
		{name: "wrong password", cred: registry.Credential{Username: user, Password: "wrong-secret"}, kind: registry.ErrUnauthorized, tokens: 1},
		{name: "identity token", cred: registry.Credential{IdentityToken: "refresh-of-alice"}, push: true, tokens: 1},
		{name: "wrong identity token", cred: registry.Credential{IdentityToken: "refresh-secret"}, kind: registry.ErrUnauthorized, tokens: 1},
		{name: "registry token", cred: registry.Credential{RegistryToken: "ready-made-secret"}, push: true},
		{name: "wrong registry token", cred: registry.Credential{RegistryToken: "foreign-secret"}, kind: registry.ErrUnauthorized},
		// Tokens that run out in the middle, for several workers at once.
		{name: "short-lived", cred: registry.Credential{Username: user, Password: password}, uses: 9, push: true, tokens: 100},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			hk, addr := serve(t, memory())
			ref := mustPush(t, im, addr, "app")
			ts := &tokenServer{
				addr: addr, anonymous: tt.anonymous, uses: tt.uses,
				valid: map[string]string{"ready-made-secret": "pull,push"}, left: map[string]int{},
			}
			hk.set(ts.gate)
			var log logged
			c := newClient(t, func(cfg *registry.Config) {
				cfg.Credentials = creds(addr, tt.cred)
				cfg.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
			})
			dst := newStore(t)
			_, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{})
			if ts.asked > tt.tokens {
				t.Errorf("asked for %d tokens, want at most %d", ts.asked, tt.tokens)
			}
			wantNoSecrets(t, log.String())
			if tt.kind != nil {
				wantError(t, err, []error{tt.kind}, "docker login")
				wantNoSecrets(t, err.Error())
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			im.checkWhole(t, dst)
			if tt.push {
				ts.asked = 0
				im2 := newImage(t, 21)
				if _, err := c.Push(t.Context(), im2.store, im2.desc, ref, registry.PushOptions{}); err != nil {
					t.Fatal(err)
				}
				if ts.asked > tt.tokens {
					t.Errorf("asked for %d tokens to push, want at most %d: %q", ts.asked, tt.tokens, ts.scopes)
				}
			}
		})
	}
}

// Reading a repository does not mean writing to it.
func TestTokenWithoutPush(t *testing.T) {
	hk, addr := serve(t, memory())
	ts := &tokenServer{addr: addr, anonymous: true}
	hk.set(ts.gate)
	im := newImage(t, 1)
	_, err := newClient(t, nil).Push(t.Context(), im.store, im.desc, mustParse(t, addr+"/app"), registry.PushOptions{})
	wantError(t, err, []error{registry.ErrUnauthorized}, "push "+addr, "docker login")
}

func TestTokenServerFails(t *testing.T) {
	tests := []struct {
		name   string
		status int
		body   string
		kind   error
	}{
		{"400", 400, "", registry.ErrUnauthorized},
		{"403", 403, "", registry.ErrForbidden},
		{"404", 404, "", registry.ErrUnauthorized},
		{"429", 429, "", registry.ErrRateLimited},
		{"500", 500, "", registry.ErrUnavailable},
		{"web page", 200, "<html>", registry.ErrUnexpectedAnswer},
		{"no token", 200, "{}", registry.ErrUnauthorized},
		{"half an answer", 200, `{"token":"abc`, registry.ErrUnavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			hk, addr := serve(t, memory())
			ts := &tokenServer{addr: addr}
			hk.set(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/token" {
					w.WriteHeader(tt.status)
					fmt.Fprint(w, tt.body)
					return true
				}
				return ts.gate(w, r)
			})
			_, _, err := newClient(t, nil).Resolve(t.Context(), mustParse(t, addr+"/app"))
			wantError(t, err, []error{tt.kind}, addr)
		})
	}
}

// A registry must not send the client, with its credentials, to addresses of this network.
func TestTokenServerElsewhere(t *testing.T) {
	_, other := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("was asked") }))
	hk, addr := serve(t, memory())
	hk.set(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Www-Authenticate", `Bearer realm="http://`+strings.Replace(other, "127.0.0.1", "localhost", 1)+`/token?X-Signature=1"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	c := newClient(t, func(cfg *registry.Config) {
		cfg.Credentials = creds(addr, registry.Credential{Username: user, Password: password})
	})
	_, _, err := c.Resolve(t.Context(), mustParse(t, addr+"/app"))
	wantError(t, err, []error{registry.ErrUnauthorized}, "cannot log in", "loopback")
	wantNoSecrets(t, err.Error())
}

// Blobs may be elsewhere; credentials and headers stay.
func TestRedirectElsewhere(t *testing.T) {
	im := newImage(t, 3)
	const signature = "?X-Signature=secret-signature"
	var mu sync.Mutex
	var header []http.Header
	other, otherAddr := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		header = append(header, r.Header.Clone())
		mu.Unlock()
		d, err := format.ParseDigest(strings.TrimPrefix(r.URL.Path, "/"))
		if err != nil || "?"+r.URL.RawQuery != signature {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(im.blob(t, d))))
	}))
	otherAddr = strings.Replace(otherAddr, "127.0.0.1", "localhost", 1)
	hk, addr := serve(t, memory())
	ref := mustPush(t, im, addr, "app")
	hk.set(func(w http.ResponseWriter, r *http.Request) bool {
		if basicAuth(w, r) {
			return true
		}
		if isBlobGet(r) {
			http.Redirect(w, r, "http://"+otherAddr+"/"+digestOf(t, r).String()+signature, http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	c := newClient(t, func(cfg *registry.Config) {
		cfg.CertsDir = certsDir(t, addr, fmt.Sprintf("server = \"http://%s\"\n[header]\nx-custom = \"custom\"\n", addr))
		cfg.Credentials = creds(addr, registry.Credential{Username: user, Password: password})
	})
	dst := newStore(t)
	if _, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	im.checkWhole(t, dst)
	if len(header) == 0 {
		t.Error("the other host was not asked")
	}
	for _, h := range header {
		if h.Get("Authorization") != "" || h.Get("X-Custom") != "" {
			t.Errorf("credentials went to another host: %v", h)
		}
	}

	// It fails, says something, or asks for credentials: nothing of that gets through.
	for _, status := range []int{401, 403, 500} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			other.set(func(w http.ResponseWriter, r *http.Request) bool {
				if r.Header.Get("Authorization") != "" {
					t.Error("credentials went to another host")
				}
				w.Header().Set("Www-Authenticate", `Basic realm="give me"`)
				w.WriteHeader(status)
				fmt.Fprint(w, "internal page")
				return true
			})
			_, err := c.Pull(t.Context(), ref, newStore(t), registry.PullOptions{})
			wantError(t, err, nil, fmt.Sprint(status))
			if strings.Contains(err.Error(), "internal page") {
				t.Errorf("what another host says got through: %v", err)
			}
			wantNoSecrets(t, err.Error())
		})
	}
	t.Run("gone", func(t *testing.T) {
		other.set(func(w http.ResponseWriter, _ *http.Request) bool { reset(t, w); return true })
		_, err := c.Pull(t.Context(), ref, newStore(t), registry.PullOptions{})
		wantError(t, err, []error{registry.ErrUnavailable}, otherAddr)
		wantNoSecrets(t, err.Error())
	})
}

func TestRedirectLoop(t *testing.T) {
	hk, addr := serve(t, memory())
	hk.set(func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, r.URL.Path, http.StatusFound)
		return true
	})
	_, _, err := newClient(t, nil).Resolve(t.Context(), mustParse(t, addr+"/app"))
	wantError(t, err, []error{registry.ErrUnexpectedAnswer}, "10 redirects")
	if n := hk.count("GET"); n != 10 {
		t.Errorf("%d requests, want 10", n)
	}
}

func TestCredentialPrintsNoSecret(t *testing.T) {
	c := registry.Credential{Username: user, Password: password, IdentityToken: "refresh-secret", RegistryToken: "a-secret"}
	var log logged
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "cred", c)
	text := fmt.Sprintf("%v %+v %s %#v %v", c, c, c, c, errors.New(c.String())) + log.String()
	wantNoSecrets(t, text)
}
