package signature_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	sigstore "github.com/sigstore/sigstore/pkg/signature"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/signature"
)

const (
	payloadMediaType = "application/vnd.dev.cosign.simplesigning.v1+json"
	sigAnnotation    = "dev.cosignproject.cosign/signature"
)

// repository holds what a Fetcher reads.
type repository struct {
	tags  map[string][]byte
	blobs map[format.Digest][]byte
	// err is returned for blobs that are not there.
	err error
}

func newRepository() *repository {
	return &repository{tags: map[string][]byte{}, blobs: map[format.Digest][]byte{}, err: signature.ErrNotFound}
}

func (r *repository) Manifest(_ context.Context, tag string, limit int64) ([]byte, error) {
	b, ok := r.tags[tag]
	if !ok {
		return nil, fmt.Errorf("get %s: %w", tag, r.err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("get %s: %w", tag, format.ErrTooLarge)
	}
	return b, nil
}

func (r *repository) Blob(_ context.Context, d format.Digest, _ int64) ([]byte, error) {
	b, ok := r.blobs[d]
	if !ok {
		return nil, fmt.Errorf("get %v: %w", d, r.err)
	}
	return b, nil
}

// layer is a signature in a manifest.
type layer struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// add puts a payload and a signature into the repository and returns the layer.
func (r *repository) add(payload, sig []byte) layer {
	d := format.DigestOf(payload)
	r.blobs[d] = payload
	return layer{
		MediaType: payloadMediaType, Digest: d.String(), Size: len(payload),
		Annotations: map[string]string{sigAnnotation: base64.StdEncoding.EncodeToString(sig)},
	}
}

// tag writes the manifest with the signatures of an image.
func (r *repository) tag(t *testing.T, image format.Digest, layers ...layer) {
	t.Helper()
	b, err := json.Marshal(map[string]any{"schemaVersion": 2, "layers": layers})
	if err != nil {
		t.Fatal(err)
	}
	r.tags["sha256-"+image.Hex()+".sig"] = b
}

// pair is a key pair, and how it signs.
type pair struct {
	private crypto.PrivateKey
	pem     []byte
}

func newPair(t *testing.T, private crypto.Signer) pair {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pair{private, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})}
}

func ecdsaPair(t *testing.T, curve elliptic.Curve) pair {
	t.Helper()
	private, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return newPair(t, private)
}

func (p pair) sign(t *testing.T, hash crypto.Hash, payload []byte) []byte {
	t.Helper()
	s, err := sigstore.LoadSigner(p.private, hash)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := s.SignMessage(bytes.NewReader(payload))
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

// statement is a payload.
func statement(image, kind string) []byte {
	return fmt.Appendf(nil, `{"critical":{"identity":{"docker-reference":"registry.example/app"},"image":{"docker-manifest-digest":%q},"type":%q},"optional":null}`, image, kind)
}

const kind = "cosign container image signature"

var (
	image = format.DigestOf([]byte("image"))
	other = format.DigestOf([]byte("other"))
)

func parse(t *testing.T, pems ...[]byte) *signature.Keys {
	t.Helper()
	k, err := signature.ParseKeys(pems...)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestAlgorithms: each kind of key verifies what it signed, in all ways that cosign used.
func TestAlgorithms(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, p384, p521 := ecdsaPair(t, elliptic.P256()), ecdsaPair(t, elliptic.P384()), ecdsaPair(t, elliptic.P521())
	rsaPair, edPair := newPair(t, rsaKey), newPair(t, edKey)
	stranger := ecdsaPair(t, elliptic.P256())
	payload := statement(image.String(), kind)
	prehashed := func() []byte {
		s, err := sigstore.LoadED25519phSigner(edKey)
		if err != nil {
			t.Fatal(err)
		}
		sig, err := s.SignMessage(bytes.NewReader(payload))
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}()
	for _, tt := range []struct {
		name string
		pair pair
		sig  []byte
	}{
		{"ECDSA P-256", p256, p256.sign(t, crypto.SHA256, payload)},
		{"ECDSA P-384 with SHA-256", p384, p384.sign(t, crypto.SHA256, payload)},
		{"ECDSA P-384", p384, p384.sign(t, crypto.SHA384, payload)},
		{"ECDSA P-521", p521, p521.sign(t, crypto.SHA512, payload)},
		{"RSA", rsaPair, rsaPair.sign(t, crypto.SHA256, payload)},
		{"Ed25519", edPair, edPair.sign(t, crypto.SHA256, payload)},
		{"Ed25519, hashed before", edPair, prehashed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRepository()
			r.tag(t, image, r.add(payload, tt.sig))
			keys := parse(t, stranger.pem, tt.pair.pem)
			id, err := keys.Verify(t.Context(), r, image)
			if err != nil || id != keys.IDs()[1] {
				t.Errorf("got %s, %v; want %s", id, err, keys.IDs()[1])
			}
			if _, err := parse(t, stranger.pem).Verify(t.Context(), r, image); !errors.Is(err, signature.ErrNotSigned) {
				t.Errorf("another key: got %v, want ErrNotSigned", err)
			}
			// Every part of the signature and of the payload counts.
			for i := range 8 {
				broken := slices.Clone(tt.sig)
				broken[i*len(broken)/8] ^= 1 << i
				r.tag(t, image, r.add(payload, broken))
				if _, err := keys.Verify(t.Context(), r, image); !errors.Is(err, signature.ErrNotSigned) {
					t.Errorf("signature changed at %d: got %v, want ErrNotSigned", i*len(broken)/8, err)
				}
			}
			for i := 0; i < len(payload); i += 20 {
				broken := slices.Clone(payload)
				broken[i] ^= 1
				r.tag(t, image, r.add(broken, tt.sig))
				if _, err := keys.Verify(t.Context(), r, image); !errors.Is(err, signature.ErrNotSigned) {
					t.Errorf("payload changed at %d: got %v, want ErrNotSigned", i, err)
				}
			}
		})
	}
}

func TestRefused(t *testing.T) {
	mine, theirs := ecdsaPair(t, elliptic.P256()), ecdsaPair(t, elliptic.P256())
	signed := func(r *repository, p pair, payload []byte) layer {
		return r.add(payload, p.sign(t, crypto.SHA256, payload))
	}
	good := statement(image.String(), kind)
	changed := func(change func(*layer)) func(*testing.T, *repository) {
		return func(t *testing.T, r *repository) {
			l := signed(r, mine, good)
			change(&l)
			r.tag(t, image, l)
		}
	}
	for _, tt := range []struct {
		name string
		make func(*testing.T, *repository)
		says string
	}{
		{"nothing there", func(*testing.T, *repository) {}, "there is no tag sha256-" + image.Hex() + ".sig"},
		{"for another image, under its own tag", func(t *testing.T, r *repository) {
			r.tag(t, other, signed(r, mine, statement(other.String(), kind)))
		}, "there is no tag"},
		{"for another image", func(t *testing.T, r *repository) {
			r.tag(t, image, signed(r, mine, statement(other.String(), kind)))
		}, "another image"},
		{"by another key, twice", func(t *testing.T, r *repository) {
			r.tag(t, image, signed(r, theirs, good), signed(r, theirs, good))
		}, "of 2 signatures there, one is by another key, or is not for its payload (2 times)"},
		{"of another type", func(t *testing.T, r *repository) {
			r.tag(t, image, signed(r, mine, statement(image.String(), "atomic container signature")))
		}, "no image"},
		{"not JSON", func(t *testing.T, r *repository) { r.tag(t, image, signed(r, mine, []byte("{"))) }, "no JSON"},
		{"the signature of something else", func(t *testing.T, r *repository) {
			r.tag(t, image, r.add(good, mine.sign(t, crypto.SHA256, []byte("something else"))))
		}, "not for its payload"},
		{"payload with another digest", func(t *testing.T, r *repository) {
			l := signed(r, mine, good)
			d, err := format.ParseDigest(l.Digest)
			if err != nil {
				t.Fatal(err)
			}
			r.blobs[d] = bytes.ToUpper(good)
			r.tag(t, image, l)
		}, "another payload"},
		{"payload missing", func(t *testing.T, r *repository) {
			r.tag(t, image, signed(r, mine, good))
			clear(r.blobs)
		}, "lacks its payload"},
		{"another size", changed(func(l *layer) { l.Size++ }), "another payload"},
		{"negative size", changed(func(l *layer) { l.Size = -1 }), "no payload"},
		{"huge size", changed(func(l *layer) { l.Size = 1 << 40 }), "no payload"},
		{"no digest", changed(func(l *layer) { l.Digest = "" }), "no payload"},
		{"another media type", changed(func(l *layer) { l.MediaType = "text/plain" }), "holds no signature"},
		{"no annotation", changed(func(l *layer) { l.Annotations = nil }), "holds no signature"},
		{"annotation not in base64", changed(func(l *layer) { l.Annotations[sigAnnotation] += "!" }), "base64"},
		{"annotation too long", changed(func(l *layer) { l.Annotations[sigAnnotation] = strings.Repeat("A", 5000) }), "too long"},
		{"annotation empty", changed(func(l *layer) { l.Annotations[sigAnnotation] = "" }), "holds no signature"},
		{"no manifest", func(_ *testing.T, r *repository) { r.tags[signature.Tag(image)] = []byte("[]") }, "no manifest"},
		{"huge manifest", func(_ *testing.T, r *repository) { r.tags[signature.Tag(image)] = make([]byte, 2<<20) }, "more than 1048576 bytes"},
		{"too many", func(t *testing.T, r *repository) {
			layers := slices.Repeat([]layer{signed(r, theirs, good)}, 100)
			r.tag(t, image, append(layers, signed(r, mine, good))...)
		}, "cosign clean"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRepository()
			tt.make(t, r)
			_, err := parse(t, mine.pem).Verify(t.Context(), r, image)
			if !errors.Is(err, signature.ErrNotSigned) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want ErrNotSigned and %q", err, tt.says)
			}
		})
	}
}

// TestOneIsEnough: bad signatures beside a good one do not matter, and neither do those that
// cannot be fetched. Where none is good, what could not be fetched may have been.
func TestOneIsEnough(t *testing.T) {
	mine, theirs := ecdsaPair(t, elliptic.P256()), ecdsaPair(t, elliptic.P256())
	keys := parse(t, mine.pem)
	r := newRepository()
	down := errors.New("registry down")
	r.err = down
	if _, err := keys.Verify(t.Context(), r, image); !errors.Is(err, down) || errors.Is(err, signature.ErrNotSigned) {
		t.Errorf("got %v, want the registry's error", err)
	}
	good := statement(image.String(), kind)
	lost := layer{
		MediaType: payloadMediaType, Digest: other.String(), Size: 5,
		Annotations: map[string]string{sigAnnotation: "AAAA"},
	}
	stranger := r.add(good, theirs.sign(t, crypto.SHA256, good))
	r.tag(t, image, lost, stranger)
	if _, err := keys.Verify(t.Context(), r, image); !errors.Is(err, down) || errors.Is(err, signature.ErrNotSigned) {
		t.Errorf("got %v, want the registry's error", err)
	}
	r.tag(t, image, lost, stranger, r.add(good, mine.sign(t, crypto.SHA256, good)))
	if id, err := keys.Verify(t.Context(), r, image); err != nil || id != keys.IDs()[0] {
		t.Errorf("got %s, %v; want %s", id, err, keys.IDs()[0])
	}
}

func TestParseKeys(t *testing.T) {
	a, b := ecdsaPair(t, elliptic.P256()), ecdsaPair(t, elliptic.P384())
	if got := parse(t, slices.Concat(a.pem, []byte("\n"), b.pem), a.pem).Len(); got != 2 {
		t.Errorf("got %d keys, want 2 different ones", got)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p224 := ecdsaPair(t, elliptic.P224())
	private, err := x509.MarshalPKCS8PrivateKey(a.private)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		files [][]byte
		says  string
	}{
		{"none", nil, "none is given"},
		{"empty", [][]byte{{}}, "empty"},
		{"no PEM", [][]byte{[]byte("ssh-ed25519 AAAA")}, "cosign generate-key-pair"},
		{"something behind it", [][]byte{append(slices.Clone(a.pem), "x"...)}, "no PEM block"},
		{"broken", [][]byte{a.pem[:len(a.pem)/2]}, "broken"},
		{"a private key", [][]byte{pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})}, "PRIVATE KEY"},
		{"garbage inside", [][]byte{pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte("x")})}, "asn1"},
		{"short RSA key", [][]byte{newPair(t, small).pem}, "1024 bits"},
		{"another curve", [][]byte{p224.pem}, "P-224"},
		{"one good, one bad", [][]byte{a.pem, nil}, "empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := signature.ParseKeys(tt.files...)
			if !errors.Is(err, signature.ErrInvalidKey) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want ErrInvalidKey and %q", err, tt.says)
			}
		})
	}
}

// FuzzVerify: whatever is in the repository, nothing panics, and only the real payload with
// the real signature counts.
func FuzzVerify(f *testing.F) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		f.Fatal(err)
	}
	keys, err := signature.ParseKeys(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	if err != nil {
		f.Fatal(err)
	}
	good := statement(image.String(), kind)
	f.Add([]byte(`{"layers":[{"mediaType":"`+payloadMediaType+`","digest":"`+format.DigestOf(good).String()+`","size":200,"annotations":{"`+sigAnnotation+`":"MEUCIQ=="}}]}`), good)
	f.Fuzz(func(t *testing.T, manifest, payload []byte) {
		r := newRepository()
		r.tags[signature.Tag(image)] = manifest
		r.blobs[format.DigestOf(payload)] = payload
		if id, err := keys.Verify(t.Context(), r, image); !errors.Is(err, signature.ErrNotSigned) {
			t.Errorf("got %s, %v; want ErrNotSigned: nothing was signed by this key", id, err)
		}
	})
}
