package builder

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// LayoutImages is a container image in an OCI image layout, as [Images] for [ReadImage].
type LayoutImages struct {
	store *store.Store
	tag   string
}

var _ Images = (*LayoutImages)(nil)

// NewLayoutImages returns the image that tag names in an open layout, which stays the
// caller's. The tag may name an index too.
func NewLayoutImages(s *store.Store, tag string) *LayoutImages { return &LayoutImages{s, tag} }

// Manifest implements Images.
func (l *LayoutImages) Manifest(ctx context.Context, d format.Digest, limit int64) ([]byte, error) {
	if d.IsZero() {
		var err error
		if d, err = l.resolve(); err != nil {
			return nil, err
		}
	}
	return l.store.Get(ctx, d, limit)
}

// resolve looks the tag up. The store's own Resolve passes over what is no image manifest.
func (l *LayoutImages) resolve() (format.Digest, error) {
	name := filepath.Join(l.store.Dir(), "index.json")
	fail := func(err error) (format.Digest, error) {
		return format.Digest{}, fmt.Errorf("find tag %q in %s: %w", l.tag, name, err)
	}
	f, err := os.Open(name)
	if err != nil {
		return format.Digest{}, err
	}
	const most = 64 << 20 // what package store reads
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return fail(err)
	}
	if len(b) > most {
		return fail(format.ErrTooLarge)
	}
	var index struct {
		Manifests []struct {
			Digest      string            `json:"digest"`
			Annotations map[string]string `json:"annotations"`
		} `json:"manifests"`
	}
	if err := json.Unmarshal(b, &index); err != nil {
		return fail(fmt.Errorf("%w: %w", err, ErrNotContainer))
	}
	var there []string
	// Of several the last counts, as with the store.
	for _, e := range slices.Backward(index.Manifests) {
		tag := e.Annotations[format.AnnotationRefName]
		if tag == l.tag {
			return parseDigest(e.Digest)
		}
		if tag != "" && len(there) < 20 {
			there = append(there, quote(tag))
		}
	}
	if len(there) == 0 {
		return fail(fmt.Errorf("there are no tags in it: %w", store.ErrNotFound))
	}
	slices.Sort(there)
	return fail(fmt.Errorf("there is no such tag, there are %s: %w", strings.Join(there, ", "), store.ErrNotFound))
}

// Blob implements Images.
func (l *LayoutImages) Blob(_ context.Context, d format.Digest, size int64) (io.ReadCloser, error) {
	f, err := l.store.OpenBlob(d)
	if err != nil {
		return nil, err
	}
	return &checkedFile{f: f, d: d, left: size, hash: sha256.New()}, nil
}

// checkedFile reads a blob's file and fails at its end if it is not the blob's content.
type checkedFile struct {
	f    *os.File
	d    format.Digest
	left int64
	hash hash.Hash
}

func (c *checkedFile) Read(p []byte) (int, error) {
	n, err := c.f.Read(p)
	c.hash.Write(p[:n])
	c.left -= int64(n)
	if c.left < 0 || errors.Is(err, io.EOF) && (c.left > 0 || format.Digest(c.hash.Sum(nil)) != c.d) {
		return 0, fmt.Errorf("read %s: the layout is damaged: %w", c.f.Name(), store.ErrDigestMismatch)
	}
	return n, err
}

func (c *checkedFile) Close() error { return c.f.Close() }
