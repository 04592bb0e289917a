package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// pki is a directory with the keys, certificates and tokens of one cluster.
type pki struct {
	dir string
	// ca is the certificate of the authority in PEM.
	ca []byte
	// tokens are those who may talk to the API server, in its format.
	tokens strings.Builder
}

func (p *pki) file(name string) string           { return filepath.Join(p.dir, name) }
func (p *pki) kubeconfig(user string) string     { return p.file(user + ".kubeconfig") }
func (p *pki) nodeDir(node string) string        { return p.file(node) }
func (p *pki) nodeFile(node, name string) string { return filepath.Join(p.nodeDir(node), name) }

// writeSecrets writes what a cluster of that many nodes needs. Everybody has the name and groups that
// they have in other clusters, so that the permissions are those which Kubernetes gives them.
func writeSecrets(dir string, nodes int) (*pki, error) {
	p := &pki{dir: dir}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := p.writeCertificates(); err != nil {
		return nil, fmt.Errorf("make certificates: %w", err)
	}
	err := p.writeUser(p.kubeconfig("admin"), "admin", "system:masters")
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"kube-controller-manager", "kube-scheduler"} {
		if err := p.writeUser(p.kubeconfig(name), "system:"+name, ""); err != nil {
			return nil, err
		}
	}
	for i := range nodes {
		name := fmt.Sprintf("node-%d", i+1)
		if err := os.MkdirAll(p.nodeDir(name), 0o700); err != nil {
			return nil, err
		}
		if err := p.writeUser(p.nodeFile(name, "kubelet.kubeconfig"), "system:node:"+name, "system:nodes"); err != nil {
			return nil, err
		}
		if err := p.writeUser(p.nodeFile(name, "kube-proxy.kubeconfig"), "system:kube-proxy", ""); err != nil {
			return nil, err
		}
		if err := os.WriteFile(p.nodeFile(name, "ca.crt"), p.ca, 0o644); err != nil {
			return nil, err
		}
	}
	return p, os.WriteFile(p.file("tokens.csv"), []byte(p.tokens.String()), 0o600)
}

// writeUser makes a user and writes a kubeconfig with which one is that user.
func (p *pki) writeUser(file, name, group string) error {
	var secret [16]byte
	if _, err := rand.Read(secret[:]); err != nil {
		return err
	}
	token := hex.EncodeToString(secret[:])
	fmt.Fprintf(&p.tokens, "%s,%s,%s,%q\n", token, name, name, group)
	cfg := api.NewConfig()
	cfg.Clusters["e2e"] = &api.Cluster{Server: apiServerURL(), CertificateAuthorityData: p.ca}
	cfg.AuthInfos[name] = &api.AuthInfo{Token: token}
	cfg.Contexts["e2e"] = &api.Context{Cluster: "e2e", AuthInfo: name}
	cfg.CurrentContext = "e2e"
	if err := clientcmd.WriteToFile(*cfg, file); err != nil {
		return fmt.Errorf("write kubeconfig of %s: %w", name, err)
	}
	return nil
}

// writeCertificates writes an authority's certificate, and the API server's.
func (p *pki) writeCertificates() error {
	authority := &x509.Certificate{
		Subject: pkix.Name{CommonName: "e2e"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	key, err := p.newKey("ca.key")
	if err != nil {
		return err
	}
	if p.ca, err = p.writeCertificate("ca.crt", authority, authority, key, key); err != nil {
		return err
	}
	if _, err := p.newKey("sa.key"); err != nil {
		return err
	}
	serverKey, err := p.newKey("apiserver.key")
	if err != nil {
		return err
	}
	_, err = p.writeCertificate("apiserver.crt", &x509.Certificate{
		Subject:     pkix.Name{CommonName: "kube-apiserver"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"},
		IPAddresses: []net.IP{Address.AsSlice(), net.ParseIP(apiServerVIP), net.IPv4(127, 0, 0, 1)},
	}, authority, serverKey, key)
	return err
}

// newKey makes a key and writes it.
func (p *pki) newKey(name string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	content := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	return key, os.WriteFile(p.file(name), content, 0o600)
}

// writeCertificate signs a certificate, writes it and returns what it wrote.
func (p *pki) writeCertificate(name string, c, authority *x509.Certificate, key, signer *ecdsa.PrivateKey) ([]byte, error) {
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, c, authority, &key.PublicKey, signer)
	if err != nil {
		return nil, err
	}
	content := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return content, os.WriteFile(p.file(name), content, 0o644)
}
