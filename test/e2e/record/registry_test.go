package record_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/record"
)

// TestRegistry asks the registry as those who are told of it do: by its name, through the proxy, and trusting its authority.
func TestRegistry(t *testing.T) {
	r, err := record.StartRegistry(netip.MustParseAddr("127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	env := map[string]string{}
	for _, e := range r.Env("ca.crt", "10.0.0.1") {
		name, value, _ := strings.Cut(e, "=")
		env[name] = value
	}
	if env["NO_PROXY"] != "10.0.0.1" || env["SSL_CERT_FILE"] != "ca.crt" {
		t.Errorf("the environment is %v", env)
	}
	proxy, err := url.Parse(env["HTTPS_PROXY"])
	if err != nil {
		t.Fatal(err)
	}
	trusted := x509.NewCertPool()
	if !trusted.AppendCertsFromPEM(r.Certificate()) {
		t.Fatal("the authority has no certificate in PEM")
	}
	client := &http.Client{Transport: &http.Transport{
		Proxy:           http.ProxyURL(proxy),
		TLSClientConfig: &tls.Config{RootCAs: trusted, MinVersion: tls.VersionTLS12},
	}}
	get := func(address string) (int, string, error) {
		resp, err := client.Get(address)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body), err
	}
	if status, _, err := get("https://registry.example.com/v2/"); err != nil || status != http.StatusOK {
		t.Errorf("GET /v2/: %d, %v", status, err)
	}
	status, body, err := get("https://registry.example.com/v2/a/manifests/v1")
	if err != nil || status != http.StatusNotFound || !strings.Contains(body, "NAME_UNKNOWN") {
		t.Errorf("GET a manifest that is not there: %d %s, %v", status, body, err)
	}
	if _, _, err := get("https://elsewhere.example.com/"); err == nil || !strings.Contains(err.Error(), "Forbidden") {
		t.Errorf("GET from elsewhere through the proxy: %v, want it to be refused", err)
	}
	client.CloseIdleConnections()
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if _, _, err := get("https://registry.example.com/v2/"); err == nil {
		t.Error("the registry answers after Close")
	}
}
