package registry

import (
	"fmt"
	"net/url"
	"strings"

	"github.com/distribution/reference"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

const (
	// defaultTag is used where a reference has neither tag nor digest, as kubelet does.
	defaultTag = "latest"
	// dockerHub is the registry of references that name none; its API is elsewhere.
	dockerHub    = "docker.io"
	dockerHubAPI = "registry-1.docker.io"
	// maxReference bounds a reference in bytes: 255 of name, 128 of tag and a digest, doubled.
	maxReference = 1024
)

// Reference names an image in a registry. It is a comparable value. With a Digest the image
// is fetched by it and Tag only serves messages; pushing writes Tag and checks Digest.
type Reference struct {
	// Registry is the host with the port, if one was given; "docker.io" for Docker Hub.
	Registry string
	// Repository is the path without the registry, such as "library/app".
	Repository string
	// Tag is empty only where Digest is not zero.
	Tag string
	// Digest is the SHA-256 of the manifest, or zero.
	Digest format.Digest
}

// ParseReference parses [REGISTRY[:PORT]/]REPOSITORY[:TAG][@sha256:HEX] and fills in what
// kubelet fills in: docker.io (and library/) where no registry is named, "latest" where there
// is neither tag nor digest. It fails with ErrInvalidReference.
func ParseReference(s string) (Reference, error) {
	bad := func(cause string) (Reference, error) {
		return Reference{}, fmt.Errorf("parse reference %s: %s; want REGISTRY/REPOSITORY[:TAG][@sha256:DIGEST]: %w",
			quote(s), cause, ErrInvalidReference)
	}
	switch {
	case s == "":
		return bad("it is empty")
	case len(s) > maxReference:
		return bad(fmt.Sprintf("it is %d bytes long, at most %d are read", len(s), maxReference))
	case strings.TrimSpace(s) != s:
		return bad("there is white space around it, leave that out")
	case strings.Contains(s, "://"):
		return bad("leave out the scheme before the registry")
	}
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return bad(quoteCause(err))
	}
	ref := Reference{Registry: reference.Domain(named), Repository: reference.Path(named)}
	if _, err := url.Parse("https://" + ref.Registry); err != nil {
		return bad("what is in brackets is no IPv6 address")
	}
	if t, ok := named.(reference.Tagged); ok {
		ref.Tag = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		if ref.Digest, err = format.ParseDigest(d.Digest().String()); err != nil {
			return bad("PuzzleFS images are named by SHA-256 only, 64 lower-case hex digits")
		}
	}
	if ref.Tag == "" && ref.Digest.IsZero() {
		ref.Tag = defaultTag
	}
	return ref, nil
}

// String returns the full form, which ParseReference parses to the same value.
func (r Reference) String() string {
	s := r.name()
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if !r.Digest.IsZero() {
		s += "@" + r.Digest.String()
	}
	return s
}

// name returns registry and repository.
func (r Reference) name() string { return r.Registry + "/" + r.Repository }

// target returns what a manifest is asked for by: the digest, if there is one.
func (r Reference) target() string {
	if !r.Digest.IsZero() {
		return r.Digest.String()
	}
	return r.Tag
}

// normalize checks a reference that may have been put together by hand.
func (r Reference) normalize() (Reference, error) {
	if r.Registry == "" || r.Repository == "" {
		return Reference{}, fmt.Errorf("check reference %s: registry or repository is empty: %w", quote(r.String()), ErrInvalidReference)
	}
	return ParseReference(r.String())
}

// quoteCause shortens the text of a library's error about hostile input.
func quoteCause(err error) string {
	return strings.Trim(quote(err.Error()), `"`)
}
