package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/signature"
)

// signedBy reports whether an image needs no signature, or is known to have one by a key that
// is trusted now. What was verified once holds: digest, signature and key do not change.
func (p *Policy) signedBy(ids []string) bool {
	if p.SignatureKeys == nil {
		return true
	}
	trusted := p.SignatureKeys.IDs()
	return slices.ContainsFunc(ids, func(id string) bool { return slices.Contains(trusted, id) })
}

// checkSigned returns the fingerprint of the key that signed an image, "" if none has to.
func (p *Policy) checkSigned(ctx context.Context, client *registry.Client, ref registry.Reference, manifest format.Digest) (string, error) {
	if p.SignatureKeys == nil {
		return "", nil
	}
	id, err := p.SignatureKeys.Verify(ctx, signatures{client, ref}, manifest)
	if errors.Is(err, signature.ErrNotSigned) {
		repository := ref.Registry + "/" + ref.Repository
		return "", fmt.Errorf("check image %s@%v: no signature by %s at %s:%s: %w; sign it with cosign sign --key, see --signature-key of the driver: %w",
			repository, manifest, p.anyKey(), repository, signature.Tag(manifest), err, ErrDenied)
	}
	if err != nil {
		return "", fmt.Errorf("check signature: %w", err)
	}
	return id, nil
}

// anyKey says by which keys an image may be signed.
func (p *Policy) anyKey() string {
	if n := p.SignatureKeys.Len(); n > 1 {
		return fmt.Sprintf("any of the %d configured keys", n)
	}
	return "the configured key"
}

// signatures reads the signatures of an image with the credentials that the image itself was
// asked for with, and from the same mirrors.
type signatures struct {
	client *registry.Client
	ref    registry.Reference
}

var _ signature.Fetcher = signatures{}

// Manifest implements signature.Fetcher.
func (s signatures) Manifest(ctx context.Context, tag string, limit int64) ([]byte, error) {
	m, err := s.client.Manifest(ctx, registry.Reference{Registry: s.ref.Registry, Repository: s.ref.Repository, Tag: tag}, limit, format.MediaTypeManifest)
	return m.Bytes, notFound(err)
}

// Blob implements signature.Fetcher.
func (s signatures) Blob(ctx context.Context, d format.Digest, size int64) ([]byte, error) {
	r, err := s.client.Blob(ctx, s.ref, d, size)
	if err != nil {
		return nil, notFound(err)
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, size+1))
	return b, notFound(err)
}

// notFound adds the error that package signature knows.
func notFound(err error) error {
	if errors.Is(err, registry.ErrNotFound) {
		return fmt.Errorf("%w: %w", err, signature.ErrNotFound)
	}
	return err
}
