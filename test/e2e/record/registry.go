package record

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// registryName is the registry of the documentation.
const registryName = "registry.example.com"

// Registry is a registry of the name registry.example.com, in this process and in memory, open to all. It is spoken to
// by HTTPS, with a certificate of an authority of its own, and through a proxy, which is what makes the name work without
// anybody's DNS: to a proxy the name is said, and it alone has to know where that is.
type Registry struct {
	proxyURL    string
	certificate []byte // PEM

	proxy, registry *http.Server
	conns           *connListener
	done            sync.WaitGroup
}

// StartRegistry starts a registry whose proxy listens at a free port of the address.
func StartRegistry(address netip.Addr) (*Registry, error) {
	cert, certPEM, err := newCertificate()
	if err != nil {
		return nil, fmt.Errorf("start registry: make certificate: %w", err)
	}
	l, err := net.Listen("tcp", netip.AddrPortFrom(address, 0).String())
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	quiet := log.New(io.Discard, "", 0)
	r := &Registry{
		proxyURL:    "http://" + l.Addr().String(),
		certificate: certPEM,
		conns:       &connListener{conns: make(chan net.Conn), closed: make(chan struct{}), addr: l.Addr()},
		registry: &http.Server{
			Handler:           registry.New(registry.Logger(quiet)),
			TLSConfig:         &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12},
			ErrorLog:          quiet,
			ReadHeaderTimeout: time.Minute,
		},
	}
	r.proxy = &http.Server{Handler: http.HandlerFunc(r.connect), ErrorLog: quiet, ReadHeaderTimeout: time.Minute}
	// Both end with http.ErrServerClosed.
	r.done.Go(func() { _ = r.proxy.Serve(l) })
	r.done.Go(func() { _ = r.registry.ServeTLS(r.conns, "", "") })
	return r, nil
}

// Close ends all connections and waits until nothing runs any more.
func (r *Registry) Close() error {
	err := errors.Join(r.proxy.Close(), r.registry.Close())
	r.done.Wait()
	return err
}

// env returns what makes programs find the registry: who is its proxy, for everything but the host noProxy, and in which
// file its authority is.
func (r *Registry) env(caFile, noProxy string) []string {
	return []string{"HTTPS_PROXY=" + r.proxyURL, "NO_PROXY=" + noProxy, "SSL_CERT_FILE=" + caFile}
}

// hosts returns the value registries.hosts of the chart, which says the same to the driver.
func (r *Registry) hosts() map[string]any {
	hosts := fmt.Sprintf("server = %q\nproxy = %q\nca = \"ca.crt\"\n", "https://"+registryName, r.proxyURL)
	return map[string]any{registryName: map[string]any{
		"hostsToml": hosts,
		"files":     map[string]any{"ca.crt": string(r.certificate)},
	}}
}

// connect is the proxy: it hands connections for the registry over to it, and refuses all others.
func (r *Registry) connect(w http.ResponseWriter, req *http.Request) {
	if req.Method != http.MethodConnect || req.Host != registryName+":443" {
		http.Error(w, "this proxy leads to "+registryName+" only", http.StatusForbidden)
		return
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if _, err := rw.WriteString("HTTP/1.1 200 Connection established\r\n\r\n"); err == nil {
		err = rw.Flush()
		if err == nil && r.conns.give(req.Context(), conn) {
			return
		}
	}
	_ = conn.Close() // the client sees it
}

// newCertificate makes a certificate for the registry's name that is its own authority, and returns it in PEM too.
func newCertificate() (tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: registryName},
		DNSNames:              []string{registryName},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// connListener is a net.Listener of connections that it is given.
type connListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	addr   net.Addr
}

// give waits until a connection is accepted and says whether it was.
func (l *connListener) give(ctx context.Context, c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.closed:
	case <-ctx.Done():
	}
	return false
}

func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *connListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *connListener) Addr() net.Addr { return l.addr }
