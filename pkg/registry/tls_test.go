package registry_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

// keyPair makes a self-signed certificate for 127.0.0.1 and returns both as PEM.
func keyPair(t *testing.T, notAfter time.Time) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: notAfter, DNSNames: []string{"client"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	kb, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kb}))
}

// serveTLS starts a TLS server on loopback. It returns its HOST:PORT, the directory name
// for it below a certs directory, and its CA as PEM.
func serveTLS(t *testing.T, h http.Handler, change func(*tls.Config)) (hk *hook, addr, dirName, ca string) {
	t.Helper()
	hk = &hook{next: h}
	srv := httptest.NewUnstartedServer(hk)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.EnableHTTP2 = true
	srv.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	if change != nil {
		change(srv.TLS)
	}
	srv.StartTLS()
	t.Cleanup(func() {
		checkLeaks(t)
		srv.CloseClientConnections()
		srv.Close()
	})
	addr = strings.TrimPrefix(srv.URL, "https://")
	ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
	return hk, addr, strings.Replace(addr, ":", "_", 1) + "_", ca
}

func TestTLS(t *testing.T) {
	hk, addr, name, ca := serveTLS(t, memory(), nil)
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, name, "ca.crt"), ca)
	c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })
	im := newImage(t, 20)
	ref := mustParse(t, addr+"/app:1")
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	dst := newStore(t)
	if _, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	im.checkWhole(t, dst)

	_, plain := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("was asked") }))
	t.Run("redirect to plain HTTP", func(t *testing.T) {
		hk.set(func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "http://"+plain+r.URL.Path+"?X-Signature=1", http.StatusFound)
			return true
		})
		_, _, err := c.Resolve(t.Context(), ref)
		wantError(t, err, []error{registry.ErrUnexpectedAnswer}, "redirects to plain HTTP at http://"+plain)
		wantNoSecrets(t, err.Error())
	})
	t.Run("upload to plain HTTP", func(t *testing.T) {
		hk.set(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodPost {
				w.WriteHeader(http.StatusNotFound)
				return true
			}
			w.Header().Set("Location", "http://"+addr+"/x?X-Signature=1")
			w.WriteHeader(http.StatusAccepted)
			return true
		})
		_, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{})
		wantError(t, err, []error{registry.ErrUnexpectedAnswer}, "X-Forwarded-Proto")
		wantNoSecrets(t, err.Error())
	})
	t.Run("token over plain HTTP", func(t *testing.T) {
		hk.set(func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Www-Authenticate", `Bearer realm="http://`+plain+`/token"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		})
		_, _, err := c.Resolve(t.Context(), ref)
		wantError(t, err, []error{registry.ErrUnauthorized}, "cannot log in")
	})
}

func TestTLSRefused(t *testing.T) {
	_, addr, name, ca := serveTLS(t, memory(), nil)
	otherCA, _ := keyPair(t, time.Now().Add(time.Hour))
	expiredCert, expiredKey := keyPair(t, time.Now().Add(-24*time.Hour))
	pair, err := tls.X509KeyPair([]byte(expiredCert), []byte(expiredKey))
	if err != nil {
		t.Fatal(err)
	}
	_, expired, expiredName, _ := serveTLS(t, memory(), func(cfg *tls.Config) { cfg.Certificates = []tls.Certificate{pair} })
	_, plain := serve(t, memory())
	tests := []struct {
		name, registry string
		files          map[string]string
		words          []string
	}{
		{"unknown CA", addr, map[string]string{name + "/ca.crt": otherCA}, []string{"certificate", addr + "/ca.crt"}},
		{"https in hosts.toml, unknown CA", addr, map[string]string{name + "/hosts.toml": `server = "https://` + addr + `"`}, []string{"ca.crt"}},
		{"name not in the certificate", strings.Replace(addr, "127.0.0.1", "localhost", 1), map[string]string{"_default/ca.crt": ca}, []string{"not valid for this host"}},
		{"expired", expired, map[string]string{expiredName + "/ca.crt": expiredCert}, []string{"not valid for this host now"}},
		{"plain HTTP where TLS is wanted", plain, map[string]string{"_default/ca.crt": ca}, []string{"speaks plain HTTP", "hosts.toml"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, content := range tt.files {
				writeFile(t, filepath.Join(dir, name), content)
			}
			c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })
			_, _, err := c.Resolve(t.Context(), mustParse(t, tt.registry+"/app"))
			wantError(t, err, []error{registry.ErrUnavailable}, tt.words...)
			if strings.Contains(err.Error(), "attempts") {
				t.Errorf("it was tried again: %v", err)
			}
		})
	}
}

func TestClientCertificate(t *testing.T) {
	cert, key := keyPair(t, time.Now().Add(time.Hour))
	_, addr, name, ca := serveTLS(t, memory(), func(cfg *tls.Config) {
		cfg.ClientAuth = tls.RequireAnyClientCert
	})
	im := newImage(t, 3)
	ref := mustParse(t, addr+"/app:1")
	tests := []struct {
		name  string
		files map[string]string
		fails bool
	}{
		{"Docker's layout", map[string]string{"ca.crt": ca, "client.cert": cert, "client.key": key}, false},
		{"key in the certificate's file", map[string]string{"ca.crt": ca, "client.cert": cert + key}, false},
		{"hosts.toml", map[string]string{"ca.pem": ca, "c.pem": cert, "k.pem": key, "hosts.toml": "ca = 'ca.pem'\nclient = [['c.pem', 'k.pem']]\n"}, false},
		{"none", map[string]string{"ca.crt": ca}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for file, content := range tt.files {
				writeFile(t, filepath.Join(dir, name, file), content)
			}
			c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })
			_, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{})
			if tt.fails {
				// Whether the alert or the end of the connection arrives first is up to the
				// kernel; both are explained.
				wantError(t, err, nil, "client.cert")
				if !errors.Is(err, registry.ErrUnauthorized) && !errors.Is(err, registry.ErrUnavailable) {
					t.Errorf("error %q is of another kind", err)
				}
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// A host that blobs are redirected to does not get to see the client certificate.
func TestClientCertificateStaysHome(t *testing.T) {
	cert, key := keyPair(t, time.Now().Add(time.Hour))
	im := newImage(t, 2)
	_, other, _, ca2 := serveTLS(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) > 0 {
			t.Error("the client certificate went to another host")
		}
		_, _ = w.Write(im.blob(t, digestOf(t, r)))
	}), func(cfg *tls.Config) { cfg.ClientAuth = tls.RequestClientCert })
	hk, addr, _, ca := serveTLS(t, memory(), func(cfg *tls.Config) { cfg.ClientAuth = tls.RequireAnyClientCert })
	// The certificate of httptest is for example.com and 127.0.0.1 both: ask for the one by
	// the mirror's name, redirect to the other's. They differ in port alone otherwise.
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "_default", "hosts.toml"),
		"server = \"https://"+strings.Replace(addr, "127.0.0.1", "[::ffff:127.0.0.1]", 1)+"\"\nca = ['ca.pem', 'ca2.pem']\nclient = [['c.pem', 'k.pem']]\n")
	for name, content := range map[string]string{"ca.pem": ca, "ca2.pem": ca2, "c.pem": cert, "k.pem": key} {
		writeFile(t, filepath.Join(dir, "_default", name), content)
	}
	c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })
	ref := mustParse(t, "any.invalid/app:1")
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	hk.set(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlobGet(r) {
			return false
		}
		http.Redirect(w, r, "https://"+other+"/"+digestOf(t, r).String(), http.StatusFound)
		return true
	})
	dst := newStore(t)
	if _, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	im.checkWhole(t, dst)
}

// A renewed certificate takes effect without a new client.
func TestRenewedCertificate(t *testing.T) {
	_, addr, name, ca := serveTLS(t, memory(), nil)
	im := newImage(t, 1)
	other, _ := keyPair(t, time.Now().Add(time.Hour))
	dir := t.TempDir()
	file := filepath.Join(dir, name, "ca.crt")
	writeFile(t, file, other)
	c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })
	ref := mustParse(t, addr+"/app:1")
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err == nil {
		t.Fatal("no error")
	}
	writeFile(t, file, ca)
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Error(err)
	}
}
