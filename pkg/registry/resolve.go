package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// Media types of Docker's own manifests, which are asked for only to say what they are.
const (
	mediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaTypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// puzzlefsManifests is what Resolve accepts: images of PuzzleFS, and what may be there instead.
var puzzlefsManifests = []string{format.MediaTypeManifest, format.MediaTypeIndex, mediaTypeDockerManifest, mediaTypeDockerList}

// Resolve fetches the manifest that ref names and checks that it is that of a PuzzleFS
// image. The bytes have the descriptor's digest, and ref.Digest if that is not zero; then
// ref.Tag is not consulted. They are the caller's. The descriptor has the media type, digest
// and size only.
//
// Errors: ErrNotFound (naming what the tag holds now, where a digest with a tag is not
// there), ErrUnauthorized, ErrForbidden, ErrRateLimited, ErrUnavailable, ErrDigestMismatch,
// ErrUnexpectedAnswer, ErrInvalidReference, ErrInvalidConfig; format.ErrNotPuzzleFS for
// indexes and images of other kinds, format.ErrCorrupt, format.ErrTooLarge.
func (c *Client) Resolve(ctx context.Context, ref Reference) (format.Descriptor, []byte, error) {
	ref, err := ref.normalize()
	if err != nil {
		return format.Descriptor{}, nil, err
	}
	s, err := c.open(ref)
	if err != nil {
		return format.Descriptor{}, nil, fmt.Errorf("resolve %s: %w", ref, err)
	}
	desc, b, _, err := s.resolve(s.scopes(ctx, actionPull))
	if err != nil {
		return format.Descriptor{}, nil, fmt.Errorf("resolve %s: %w", ref, err)
	}
	return desc, b, nil
}

// resolve fetches, verifies and parses the manifest.
func (s *session) resolve(ctx context.Context) (format.Descriptor, []byte, *format.Manifest, error) {
	raw, err := s.manifest(ctx, s.cfg.MaxManifestBytes, puzzlefsManifests)
	if err != nil {
		return format.Descriptor{}, nil, nil, err
	}
	m, err := format.ParseManifest(raw.Bytes)
	if errors.Is(err, format.ErrNotPuzzleFS) {
		err = fmt.Errorf("it is %s: %w", kindOf(raw.Bytes), err)
	}
	if err != nil {
		return format.Descriptor{}, nil, nil, err
	}
	if _, err := m.Rootfs(); err != nil {
		return format.Descriptor{}, nil, nil, err
	}
	desc := format.Descriptor{MediaType: format.MediaTypeManifest, Digest: raw.Digest, Size: int64(len(raw.Bytes))}
	return desc, raw.Bytes, m, nil
}

// explainMissing says of a manifest that is not there what could be meant instead.
func (s *session) explainMissing(ctx context.Context, err error) error {
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	var f *failure
	if errors.As(err, &f) && f.has("NAME_UNKNOWN") {
		return fmt.Errorf("there is no repository %s in %s: check the name, or push the image first: %w", s.ref.Repository, s.ref.Registry, err)
	}
	if s.ref.Digest.IsZero() {
		return fmt.Errorf("there is no tag %s in repository %s: check the tag, or push the image first: %w", s.ref.Tag, s.ref.name(), err)
	}
	hint := "check the digest, or push the image first"
	if s.ref.Tag != "" {
		if d, e := s.tagDigest(ctx); e == nil {
			hint = fmt.Sprintf("tag %s holds %s now", s.ref.Tag, d)
		} else if errors.Is(e, ErrNotFound) {
			hint = fmt.Sprintf("nor is there a tag %s: check the name, or push the image first", s.ref.Tag)
		}
	}
	return fmt.Errorf("there is no manifest %s in repository %s: %s: %w", s.ref.Digest, s.ref.name(), hint, err)
}

// tagDigest asks once what ref.Tag holds.
func (s *session) tagDigest(ctx context.Context) (d format.Digest, err error) {
	err = s.each(ctx, canResolve, func(ctx context.Context, r *remote) error {
		var said string
		if d, said, err = s.headTag(ctx, r); err == nil && said == "" {
			return fmt.Errorf("%s does not say: %w", r.ep, ErrUnexpectedAnswer)
		}
		return err
	})
	return d, err
}

// headTag asks one endpoint which digest ref.Tag holds; said is "" if it does not tell.
func (s *session) headTag(ctx context.Context, r *remote) (d format.Digest, said string, err error) {
	x, err := r.do(ctx, request{
		method: http.MethodHead,
		url:    r.ep.url(s.ref.Repository, "manifests", s.ref.Tag),
		header: http.Header{"Accept": {format.MediaTypeManifest + ", " + format.MediaTypeIndex}},
		want:   []int{http.StatusOK},
	})
	if err != nil {
		return d, "", err
	}
	defer x.close()
	said = x.resp.Header.Get(headerDigest)
	if said == "" {
		return d, "", nil
	}
	d, err = format.ParseDigest(said)
	return d, said, err
}

// kindOf says in words what a manifest is that is not of a PuzzleFS image.
func kindOf(b []byte) string {
	var doc struct {
		MediaType    string            `json:"mediaType"`
		ArtifactType string            `json:"artifactType"`
		Manifests    []json.RawMessage `json:"manifests"`
		FSLayers     []json.RawMessage `json:"fsLayers"`
		Config       struct {
			MediaType string `json:"mediaType"`
		} `json:"config"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return "something else"
	}
	const convert = "; build a PuzzleFS image from it with csi-puzzlefs build"
	switch {
	case doc.Manifests != nil:
		return "an image index, which names images for several platforms; name one of them by its digest"
	case doc.FSLayers != nil:
		return "a container image of Docker's schema 1" + convert
	case doc.MediaType == mediaTypeDockerManifest:
		return "a Docker container image" + convert
	case doc.Config.MediaType == "application/vnd.oci.image.config.v1+json":
		return "an OCI container image" + convert
	case doc.ArtifactType != "":
		return "an OCI artifact of type " + quote(doc.ArtifactType)
	case doc.Config.MediaType != "":
		return "an OCI artifact of type " + quote(doc.Config.MediaType)
	}
	return "something else"
}
