// Package apiserver runs a real API server with its etcd for a test, on loopback ports and in a
// directory of the test's. Nothing else of Kubernetes runs: what is created stays as it is, no pod
// starts. That is enough to know whether objects are accepted.
//
// The programs are those that hack/kube.sh builds.
package apiserver

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/process"
	"k8s.io/client-go/rest"
)

const (
	// startTimeout is how long the API server may take until it is ready: 5 s on an idle
	// machine.
	startTimeout = 3 * time.Minute
	// startAttempts is how often other ports are tried when somebody was faster to take one.
	startAttempts = 3
)

// Config says how to run an API server.
type Config struct {
	// Programs is the directory that hack/kube.sh printed.
	Programs string
	// Dir is an empty directory for data, keys and logs, which the caller removes.
	Dir string
}

// Server is a running API server. It is safe for use by several goroutines.
type Server struct {
	client          *rest.Config
	etcd, apiserver *process.Process
}

// Start starts etcd and the API server and waits until they are ready. Both end with Stop, and
// with the process that called Start.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	if err := writeSecrets(cfg.Dir); err != nil {
		return nil, fmt.Errorf("start API server: %w", err)
	}
	for attempt := 1; ; attempt++ {
		s, err := start(ctx, cfg)
		if err == nil {
			return s, nil
		}
		if attempt == startAttempts || !strings.Contains(err.Error(), "address already in use") {
			return nil, fmt.Errorf("start API server: %w", err)
		}
	}
}

// ClientConfig returns a configuration for clients that may do everything. It is the caller's.
func (s *Server) ClientConfig() *rest.Config { return rest.CopyConfig(s.client) }

// Logs returns the ends of the logs, for a test that has failed.
func (s *Server) Logs() string { return s.etcd.LogEnd() + s.apiserver.LogEnd() }

// Stop ends both at once; there is nothing worth saving.
func (s *Server) Stop() {
	s.apiserver.Kill()
	s.etcd.Kill()
}

// The user of all requests.
const adminToken = "admin-of-a-test"

// writeSecrets writes what the API server wants to be given: keys for the tokens of service
// accounts, and who its administrator is.
func writeSecrets(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	files := map[string][]byte{
		"sa.key":     pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}),
		"tokens.csv": []byte(adminToken + ",admin,admin,system:masters\n"),
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func start(ctx context.Context, cfg Config) (_ *Server, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	client, peer := loopback("http", ports[0]), loopback("http", ports[1])
	in := func(name string) string { return filepath.Join(cfg.Dir, name) }

	s := &Server{client: &rest.Config{
		Host:            loopback("https", ports[2]),
		BearerToken:     adminToken,
		TLSClientConfig: rest.TLSClientConfig{CAFile: in("pki/apiserver.crt")},
		QPS:             -1,
	}}
	s.etcd, err = process.Run(filepath.Join(cfg.Programs, "etcd"), in("etcd.log"),
		"--data-dir="+in("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+client, "--advertise-client-urls="+client,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=default="+peer)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.etcd.Kill()
		}
	}()
	s.apiserver, err = process.Run(filepath.Join(cfg.Programs, "kube-apiserver"), in("kube-apiserver.log"),
		"--etcd-servers="+client, "--cert-dir="+in("pki"),
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", ports[2]),
		// Nobody looks for this API server in the cluster, and its address may not be a loopback one there.
		"--endpoint-reconciler-type=none",
		"--token-auth-file="+in("tokens.csv"), "--authorization-mode=RBAC",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-signing-key-file="+in("sa.key"), "--service-account-key-file="+in("sa.key"),
		"--service-cluster-ip-range=10.79.0.0/24", "--allow-privileged=true")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.apiserver.Kill()
		}
	}()
	return s, s.waitReady(ctx)
}

// waitReady waits until the API server says that it is ready, and does not wait for the dead.
func (s *Server) waitReady(ctx context.Context) error {
	var last error
	for {
		if last = s.ready(ctx); last == nil {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-s.etcd.Done():
			return fmt.Errorf("etcd has ended\n%s", s.Logs())
		case <-s.apiserver.Done():
			return fmt.Errorf("kube-apiserver has ended\n%s", s.Logs())
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w\n%s", errors.Join(ctx.Err(), last), s.Logs())
		}
	}
}

// ready asks once. The certificate is there some time after the start.
func (s *Server) ready(ctx context.Context) error {
	client, err := rest.HTTPClientFor(s.client)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.client.Host+"/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz: %s", resp.Status)
	}
	return nil
}

func loopback(scheme string, port int) string { return fmt.Sprintf("%s://127.0.0.1:%d", scheme, port) }

// freePorts returns different ports that nobody listens on.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return nil, fmt.Errorf("find a free port: %w", err)
		}
		defer l.Close()
		addr, _ := l.Addr().(*net.TCPAddr) // which a TCP listener has
		ports = append(ports, addr.Port)
	}
	return ports, nil
}
