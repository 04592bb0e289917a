package signature

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"

	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
)

// ErrInvalidKey says that something is not a public key that can be used.
var ErrInvalidKey = errors.New("invalid public key")

// Sizes of RSA keys that are used, in bits.
const (
	minRSA = 2048
	maxRSA = 8192
)

// Keys are public keys, one of which must have signed. They do not change.
type Keys struct {
	keys []key
}

// key is a public key and the ways in which it may have signed.
type key struct {
	id        string
	verifiers []signature.Verifier
}

// ParseKeys reads public keys from PEM files: ECDSA on P-256, P-384 or P-521, RSA from 2048
// bits, and Ed25519, in a block PUBLIC KEY or RSA PUBLIC KEY. A file may hold several, and
// nothing but keys. It fails with ErrInvalidKey.
func ParseKeys(files ...[]byte) (*Keys, error) {
	k := &Keys{}
	for _, b := range files {
		rest := bytes.TrimSpace(b)
		if len(rest) == 0 {
			return nil, fmt.Errorf("read public key: the file is empty: %w", ErrInvalidKey)
		}
		for len(rest) > 0 {
			if !bytes.HasPrefix(rest, []byte("-----BEGIN ")) {
				return nil, fmt.Errorf("read public key: there is something that is no PEM block; want cosign.pub as cosign generate-key-pair wrote it: %w", ErrInvalidKey)
			}
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				return nil, fmt.Errorf("read public key: a PEM block is broken: %w", ErrInvalidKey)
			}
			rest = bytes.TrimSpace(rest)
			one, err := parseKey(block)
			if err != nil {
				return nil, fmt.Errorf("read public key: %w: %w", err, ErrInvalidKey)
			}
			if !slices.Contains(k.IDs(), one.id) {
				k.keys = append(k.keys, one)
			}
		}
	}
	if len(k.keys) == 0 {
		return nil, fmt.Errorf("read public keys: none is given: %w", ErrInvalidKey)
	}
	return k, nil
}

func parseKey(block *pem.Block) (key, error) {
	pub, err := cryptoutils.UnmarshalPEMToPublicKey(pem.EncodeToMemory(block))
	if err != nil {
		return key{}, err
	}
	der, err := cryptoutils.MarshalPublicKeyToDER(pub)
	if err != nil {
		return key{}, err
	}
	sum := sha256.Sum256(der)
	k := key{id: "sha256:" + hex.EncodeToString(sum[:])}
	k.verifiers, err = verifiers(pub)
	return k, err
}

// verifiers returns the ways in which a key may have signed. Releases of cosign differ in the
// hash that they use with a curve, and in the variant of Ed25519.
func verifiers(pub crypto.PublicKey) ([]signature.Verifier, error) {
	hashes := []crypto.Hash{crypto.SHA256}
	switch p := pub.(type) {
	case *ecdsa.PublicKey:
		switch p.Curve {
		case elliptic.P256():
		case elliptic.P384():
			hashes = append(hashes, crypto.SHA384)
		case elliptic.P521():
			hashes = append(hashes, crypto.SHA512)
		default:
			return nil, fmt.Errorf("an ECDSA key on the curve %s; want P-256, P-384 or P-521", p.Params().Name)
		}
	case *rsa.PublicKey:
		if bits := p.N.BitLen(); bits < minRSA || bits > maxRSA {
			return nil, fmt.Errorf("an RSA key of %d bits; want %d to %d", bits, minRSA, maxRSA)
		}
	case ed25519.PublicKey:
		prehashed, err := signature.LoadED25519phVerifier(p)
		if err != nil {
			return nil, err
		}
		pure, err := signature.LoadVerifier(p, crypto.SHA256)
		return []signature.Verifier{prehashed, pure}, err
	default:
		return nil, fmt.Errorf("a key of type %T; want ECDSA, RSA or Ed25519", pub)
	}
	var list []signature.Verifier
	for _, h := range hashes {
		v, err := signature.LoadVerifier(pub, h)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, nil
}

// Len returns how many different keys there are.
func (k *Keys) Len() int { return len(k.keys) }

// IDs returns the fingerprints of the keys: "sha256:" and the hex SHA-256 of the DER form of
// each (SubjectPublicKeyInfo).
func (k *Keys) IDs() []string {
	ids := make([]string, len(k.keys))
	for i := range k.keys {
		ids[i] = k.keys[i].id
	}
	return ids
}

// signer returns the fingerprint of the key that signed the payload.
func (k *Keys) signer(payload, sig []byte) (id string, ok bool) {
	for i := range k.keys {
		for _, v := range k.keys[i].verifiers {
			if v.VerifySignature(bytes.NewReader(sig), bytes.NewReader(payload)) == nil {
				return k.keys[i].id, true
			}
		}
	}
	return "", false
}
