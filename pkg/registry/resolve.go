package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// Media types of Docker's own manifests, which are asked for only to say what they are.
const (
	mediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaTypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// headerDigest carries the digest of a manifest as the registry computed it.
const headerDigest = "Docker-Content-Digest"

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
	var b []byte
	need := canPull
	if s.ref.Digest.IsZero() {
		need = canResolve
	}
	err := s.retry(ctx, func(ctx context.Context) error {
		return s.each(ctx, need, func(ctx context.Context, r *remote) (err error) {
			b, err = s.fetchManifest(ctx, r)
			return err
		})
	})
	if err != nil {
		return format.Descriptor{}, nil, nil, s.explainMissing(ctx, err)
	}
	m, err := format.ParseManifest(b)
	if errors.Is(err, format.ErrNotPuzzleFS) {
		err = fmt.Errorf("it is %s: %w", kindOf(b), err)
	}
	if err != nil {
		return format.Descriptor{}, nil, nil, err
	}
	if _, err := m.Rootfs(); err != nil {
		return format.Descriptor{}, nil, nil, err
	}
	desc := format.Descriptor{MediaType: format.MediaTypeManifest, Digest: format.DigestOf(b), Size: int64(len(b))}
	return desc, b, m, nil
}

// fetchManifest gets the manifest from one endpoint and checks its digest.
func (s *session) fetchManifest(ctx context.Context, r *remote) ([]byte, error) {
	x, err := r.do(ctx, request{
		method: http.MethodGet,
		url:    r.ep.url(s.ref.Repository, "manifests", s.ref.target()),
		header: http.Header{"Accept": {strings.Join([]string{
			format.MediaTypeManifest, format.MediaTypeIndex, mediaTypeDockerManifest, mediaTypeDockerList,
		}, ", ")}},
		want: []int{http.StatusOK},
	})
	if err != nil {
		return nil, err
	}
	defer x.close()
	b, err := io.ReadAll(io.LimitReader(x, format.MaxManifestSize+1))
	if err != nil {
		return nil, err
	}
	if len(b) > format.MaxManifestSize {
		return nil, fmt.Errorf("%s sent a manifest of more than %d bytes: %w", r.ep, format.MaxManifestSize, format.ErrTooLarge)
	}
	if isHTML(x.resp, b) {
		return nil, &failure{kind: ErrUnexpectedAnswer, msg: fmt.Sprintf(
			"%s answered with a web page instead of a manifest: it is no registry, or a login page or proxy is in the way", r.ep)}
	}
	got := format.DigestOf(b)
	if want := s.ref.Digest; !want.IsZero() && got != want {
		return nil, &failure{kind: ErrDigestMismatch, retry: true, msg: fmt.Sprintf(
			"%s sent a manifest with digest %s: the registry, or what is in between, changes content", r.ep, got)}
	}
	if said, err := format.ParseDigest(x.resp.Header.Get(headerDigest)); err == nil && said != got {
		return nil, &failure{kind: ErrDigestMismatch, retry: true, msg: fmt.Sprintf(
			"%s sent a manifest with digest %s and says that it is %s: the registry, or what is in between, changes content", r.ep, got, said)}
	}
	if head := bytes.TrimSpace(b); len(head) == 0 || head[0] != '{' {
		return nil, &failure{kind: ErrUnexpectedAnswer, msg: fmt.Sprintf(
			"%s answered with %d bytes that are no manifest: it is no registry, or a proxy is in the way", r.ep, len(b))}
	}
	return b, nil
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
			hint = fmt.Sprintf("nor is there a tag %s", s.ref.Tag)
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
