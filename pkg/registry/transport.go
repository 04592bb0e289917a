package registry

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	// maxTransports bounds the sets of connections that are kept: one for each combination of
	// certificates, proxy and dial timeout in use. Registries without any share one.
	maxTransports = 32
	dialTimeout   = 15 * time.Second
	// maxRedirects is net/http's own limit.
	maxRedirects = 10
	// maxHeader bounds the header of an answer, in bytes.
	maxHeader = 256 << 10
	// ioBuffer is the size of a connection's buffers, in bytes: chunks are of that order.
	ioBuffer = 64 << 10
)

// errRedirect says that a redirect would give up what the first request was protected by.
var errRedirect = errors.New("redirect refused")

// transports keeps connections alive between requests and operations, and apart where
// certificates differ. Safe for concurrent use.
type transports struct {
	// perHost is the number of idle connections kept for one host.
	perHost int

	mu sync.Mutex // guards what follows
	m  map[[sha256.Size]byte]*http.Transport
	// order lists the keys of m, the oldest first.
	order [][sha256.Size]byte
}

// forEndpoint returns the way to an endpoint: its own certificates and headers for its own
// host, neither client certificate nor headers for where it redirects to.
func (ts *transports) forEndpoint(ep *endpoint) (http.RoundTripper, error) {
	own, err := ts.get(ep, ep.tls)
	if err != nil {
		return nil, err
	}
	other := own
	if len(ep.tls.pairs) > 0 {
		if other, err = ts.get(ep, tlsFiles{cas: ep.tls.cas}); err != nil {
			return nil, err
		}
	}
	return &endpointTransport{ep: ep, own: own, other: other}, nil
}

// get returns the transport for a combination of certificate files, read anew so that
// renewed certificates take effect.
func (ts *transports) get(ep *endpoint, files tlsFiles) (*http.Transport, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%v %v\n", ep.dialTimeout, ep.proxy)
	read := func(file string) ([]byte, error) {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read certificate: %w: %w", err, ErrInvalidConfig)
		}
		fmt.Fprintf(h, "%d %q\n", len(b), file)
		h.Write(b)
		return b, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	for _, file := range files.cas {
		b, err := read(file)
		if err != nil {
			return nil, err
		}
		if cfg.RootCAs == nil {
			if cfg.RootCAs, err = x509.SystemCertPool(); err != nil {
				cfg.RootCAs = x509.NewCertPool()
			}
		}
		if !cfg.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("read certificate %s: there is no PEM certificate in it: %w", file, ErrInvalidConfig)
		}
	}
	for _, p := range files.pairs {
		cert, err := read(p[0])
		if err != nil {
			return nil, err
		}
		key := cert
		if p[1] != "" {
			if key, err = read(p[1]); err != nil {
				return nil, err
			}
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("read client certificate %s: %w: %w", p[0], err, ErrInvalidConfig)
		}
		cfg.Certificates = append(cfg.Certificates, pair)
	}
	return ts.lookup([sha256.Size]byte(h.Sum(nil)), ep, cfg), nil
}

func (ts *transports) lookup(key [sha256.Size]byte, ep *endpoint, cfg *tls.Config) *http.Transport {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if t, ok := ts.m[key]; ok {
		return t
	}
	if len(ts.order) >= maxTransports {
		// Requests under way end as they would have; only idle connections close.
		ts.m[ts.order[0]].CloseIdleConnections()
		delete(ts.m, ts.order[0])
		ts.order = ts.order[1:]
	}
	dial := &net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}
	if ep.dialTimeout > 0 {
		dial.Timeout = ep.dialTimeout
	}
	proxy := http.ProxyFromEnvironment
	if ep.proxy != nil {
		proxy = http.ProxyURL(ep.proxy)
	}
	t := &http.Transport{
		Proxy:                  proxy,
		DialContext:            dial.DialContext,
		TLSClientConfig:        cfg,
		ForceAttemptHTTP2:      true,
		MaxIdleConns:           4 * ts.perHost,
		MaxIdleConnsPerHost:    ts.perHost,
		IdleConnTimeout:        90 * time.Second,
		TLSHandshakeTimeout:    dialTimeout,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: maxHeader,
		ReadBufferSize:         ioBuffer,
		WriteBufferSize:        ioBuffer,
		// Blobs are named by their stored bytes.
		DisableCompression: true,
	}
	if ts.m == nil {
		ts.m = make(map[[sha256.Size]byte]*http.Transport)
	}
	ts.m[key] = t
	ts.order = append(ts.order, key)
	return t
}

// closeIdle closes the connections that no request uses.
func (ts *transports) closeIdle() {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for _, t := range ts.m {
		t.CloseIdleConnections()
	}
}

// endpointTransport is an http.RoundTripper for the requests of one endpoint and the
// redirects that follow.
type endpointTransport struct {
	ep         *endpoint
	own, other http.RoundTripper
}

var _ http.RoundTripper = (*endpointTransport)(nil)

// RoundTrip sends req by the transport for its host.
func (t *endpointTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if !strings.EqualFold(req.URL.Hostname(), t.ep.base.Hostname()) {
		return t.other.RoundTrip(req)
	}
	if len(t.ep.header) > 0 && t.ep.sameOrigin(req.URL) {
		req = req.Clone(req.Context())
		for k, v := range t.ep.header {
			if _, set := req.Header[k]; !set {
				req.Header[k] = v
			}
		}
	}
	return t.own.RoundTrip(req)
}

// checkRedirect follows redirects as net/http does, but never from https to plain http.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("stopped after %d redirects: %w", maxRedirects, errRedirect)
	}
	for _, v := range via {
		if v.URL.Scheme == "https" && req.URL.Scheme != "https" {
			return fmt.Errorf("%s redirects to plain HTTP at %s: let it redirect to https: %w", originOf(v.URL), originOf(req.URL), errRedirect)
		}
	}
	return nil
}

// originOf names a URL in messages, without path and query.
func originOf(u *url.URL) string { return (&url.URL{Scheme: u.Scheme, Host: u.Host}).String() }
