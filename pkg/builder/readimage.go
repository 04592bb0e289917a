package builder

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// Errors of reading container images.
var (
	// ErrNotContainer says that an image is of another kind than a container's, or has layers
	// that cannot be had.
	ErrNotContainer = errors.New("not a container image that can be built from")
	// ErrNoPlatform says that an image is not there for the platform that was asked for.
	ErrNoPlatform = errors.New("no such platform")
)

// Media types of container images, besides those of package format.
const (
	typeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	typeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	typeConfig         = "application/vnd.oci.image.config.v1+json"
	typeDockerConfig   = "application/vnd.docker.container.image.v1+json"
	typeLayer          = "application/vnd.oci.image.layer.v1.tar"
	typeDockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
	typeForeignLayer   = "application/vnd.oci.image.layer.nondistributable.v1.tar"
	typeDockerForeign  = "application/vnd.docker.image.rootfs.foreign.diff.tar"
)

const (
	// maxDocument bounds manifests, indexes and configurations, in bytes: what registries take.
	maxDocument = 4 << 20
	// maxNesting bounds how many indexes may lead from one to the next.
	maxNesting = 4
)

// ManifestTypes returns the media types of the manifests and indexes that [ReadImage]
// understands, to be asked for in a registry.
func ManifestTypes() []string {
	return []string{format.MediaTypeManifest, format.MediaTypeIndex, typeDockerManifest, typeDockerList}
}

// Images is a place where a container image is: an OCI layout or a repository of a registry.
type Images interface {
	// Manifest returns a manifest or an index of at most limit bytes, verified: the one of a
	// digest, or the one that is asked for, where d is zero.
	Manifest(ctx context.Context, d format.Digest, limit int64) ([]byte, error)
	// Blob opens the blob d of size bytes. The reader fails instead of ending where the
	// content is not d's.
	Blob(ctx context.Context, d format.Digest, size int64) (io.ReadCloser, error)
}

// Platform is what a container image was made for.
type Platform struct {
	OS, Architecture string
	Variant          string // "" stands for any, and for what images without one have
}

// ParsePlatform parses OS/ARCHITECTURE[/VARIANT]. "" is linux on this program's architecture.
func ParsePlatform(s string) (Platform, error) {
	if s == "" {
		return Platform{OS: "linux", Architecture: runtime.GOARCH}, nil
	}
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || slices.Contains(parts, "") {
		return Platform{}, fmt.Errorf("parse platform %q: want OS/ARCHITECTURE[/VARIANT], such as linux/arm64: %w", s, ErrConfig)
	}
	p := Platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	return p, nil
}

// String returns the form that ParsePlatform takes.
func (p Platform) String() string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// offers reports whether an image of platform p does where want is wanted.
func (p Platform) offers(want Platform) bool {
	if p.Architecture == "arm64" && p.Variant == "" {
		p.Variant = "v8" // all are
	}
	return p.OS == want.OS && p.Architecture == want.Architecture && (want.Variant == "" || p.Variant == want.Variant)
}

// ReadImage reads a container image, its layers laid one over the other with their
// whiteouts. An image for several platforms is taken for that one; an image for a
// single one whatever it says, unless strict.
//
// Each layer is checked against its digest and, uncompressed, against the image's
// configuration. It fails with the errors of images and those of [ReadTar], with
// ErrNotContainer for images of other kinds, and with ErrNoPlatform.
func ReadImage(ctx context.Context, images Images, platform Platform, strict bool, cfg ReadConfig) (*Tree, error) {
	im := &imageReader{images: images, platform: platform, strict: strict}
	return readTree(ctx, cfg, func(a *archive, root *node) error {
		m, err := im.manifest(ctx)
		if err != nil {
			return err
		}
		diffs, err := im.config(ctx, m)
		if err != nil {
			return err
		}
		for i, d := range m.Layers {
			if err := im.layer(ctx, a, root, d, diffs[i]); err != nil {
				return fmt.Errorf("layer %d of %d: %w", i+1, len(m.Layers), err)
			}
		}
		return nil
	})
}

// imageReader reads one image.
type imageReader struct {
	images   Images
	platform Platform
	strict   bool
}

// imageDescriptor names a blob of a container image. The digest is kept as text: an index may
// have some that are not SHA-256.
type imageDescriptor struct {
	MediaType string         `json:"mediaType"`
	Digest    string         `json:"digest"`
	Size      int64          `json:"size"`
	Platform  *imagePlatform `json:"platform"`
}

type imagePlatform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
}

func (p imagePlatform) platform() Platform {
	return Platform(p)
}

// imageDocument is an image manifest or an index.
type imageDocument struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	ArtifactType  string            `json:"artifactType"`
	Config        imageDescriptor   `json:"config"`
	Layers        []imageDescriptor `json:"layers"`
	Manifests     []imageDescriptor `json:"manifests"`
}

// manifest returns the image manifest for the platform.
func (r *imageReader) manifest(ctx context.Context) (*imageDocument, error) {
	var d format.Digest
	for range maxNesting {
		b, err := r.images.Manifest(ctx, d, maxDocument)
		if err != nil {
			return nil, err
		}
		m, err := parseDocument(b)
		if err != nil {
			return nil, err
		}
		if m.Manifests == nil {
			return m, m.checkKind()
		}
		entry, err := m.choose(r.platform)
		if err != nil {
			return nil, err
		}
		if d, err = parseDigest(entry.Digest); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("more than %d indexes lead from one to the next: %w", maxNesting, ErrNotContainer)
}

// parseDocument decodes a manifest or an index.
func parseDocument(b []byte) (*imageDocument, error) {
	m := new(imageDocument)
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("parse its manifest: %w: %w", err, ErrNotContainer)
	}
	isIndex := m.MediaType == format.MediaTypeIndex || m.MediaType == typeDockerList
	isManifest := m.MediaType == format.MediaTypeManifest || m.MediaType == typeDockerManifest
	switch {
	case m.SchemaVersion != 2:
		return nil, fmt.Errorf("its manifest has schemaVersion %d, want 2: %w", m.SchemaVersion, ErrNotContainer)
	case m.Manifests != nil && (m.Layers != nil || isManifest), m.Layers != nil && isIndex:
		// What readers make of it would depend on where they look.
		return nil, fmt.Errorf("its manifest is an image and an index at once: %w", ErrNotContainer)
	case m.MediaType != "" && !isIndex && !isManifest:
		return nil, fmt.Errorf("its manifest is of type %s: %w", quote(m.MediaType), ErrNotContainer)
	}
	if isIndex && m.Manifests == nil {
		m.Manifests = []imageDescriptor{}
	}
	return m, nil
}

// checkKind fails unless m is the manifest of a container image.
func (m *imageDocument) checkKind() error {
	for _, l := range m.Layers {
		if l.MediaType == format.MediaTypeRootfs {
			return fmt.Errorf("it is a PuzzleFS image already: use it as it is, copy it with csi-puzzlefs pull and push, "+
				"or extract it and build from the directory: %w", ErrNotContainer)
		}
	}
	switch m.Config.MediaType {
	case typeConfig, typeDockerConfig:
		return nil
	case "":
		return fmt.Errorf("its manifest names no configuration: %w", ErrNotContainer)
	}
	kind := m.Config.MediaType
	if m.ArtifactType != "" {
		kind = m.ArtifactType
	}
	return fmt.Errorf("it is an artifact of type %s: %w", quote(kind), ErrNotContainer)
}

// choose returns the entry of an index for a platform.
func (m *imageDocument) choose(want Platform) (*imageDescriptor, error) {
	var there []string
	for i := range m.Manifests {
		e := &m.Manifests[i]
		if e.Platform == nil {
			continue
		}
		p := e.Platform.platform()
		if p.offers(want) {
			return e, nil
		}
		if p.OS != "unknown" { // what builders attach: attestations
			there = append(there, p.String())
		}
	}
	if len(m.Manifests) == 1 && m.Manifests[0].Platform == nil {
		return &m.Manifests[0], nil
	}
	if len(there) == 0 {
		return nil, fmt.Errorf("it is not there for %s, nor for any platform that it names: %w", want, ErrNoPlatform)
	}
	slices.Sort(there)
	const most = 30
	list := strings.Join(slices.Compact(there)[:min(most, len(slices.Compact(there)))], ", ")
	return nil, fmt.Errorf("it is not there for %s; choose with --platform from %s: %w", want, strings.Trim(quote(list), `"`), ErrNoPlatform)
}

// parseDigest parses a digest of a container image.
func parseDigest(s string) (format.Digest, error) {
	d, err := format.ParseDigest(s)
	if err != nil {
		return d, fmt.Errorf("%w: %w", err, ErrNotContainer)
	}
	return d, nil
}

// config returns the digests of the uncompressed layers, from the image's configuration.
func (r *imageReader) config(ctx context.Context, m *imageDocument) (diffs []format.Digest, err error) {
	d, err := parseDigest(m.Config.Digest)
	if err != nil {
		return nil, err
	}
	if m.Config.Size < 0 || m.Config.Size > maxDocument {
		return nil, fmt.Errorf("its configuration has %d bytes, at most %d are read: %w", m.Config.Size, maxDocument, format.ErrTooLarge)
	}
	b, err := readBlob(ctx, r.images, d, m.Config.Size)
	if err != nil {
		return nil, fmt.Errorf("read its configuration: %w", err)
	}
	var c struct {
		imagePlatform
		RootFS struct {
			Type    string   `json:"type"`
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("parse its configuration: %w: %w", err, ErrNotContainer)
	}
	p := c.platform()
	if p.Variant == "" {
		p.Variant = r.platform.Variant // few say it
	}
	if r.strict && !p.offers(r.platform) {
		return nil, fmt.Errorf("it is for %s only, not for %s: %w", quote(p.String()), r.platform, ErrNoPlatform)
	}
	if c.RootFS.Type != "layers" || len(c.RootFS.DiffIDs) != len(m.Layers) {
		return nil, fmt.Errorf("its configuration lists %d layers of type %s, its manifest %d: %w",
			len(c.RootFS.DiffIDs), quote(c.RootFS.Type), len(m.Layers), ErrNotContainer)
	}
	for _, text := range c.RootFS.DiffIDs {
		d, err := parseDigest(text)
		if err != nil {
			return nil, err
		}
		diffs = append(diffs, d)
	}
	return diffs, nil
}

// readBlob reads a small blob.
func readBlob(ctx context.Context, images Images, d format.Digest, size int64) ([]byte, error) {
	r, err := images.Blob(ctx, d, size)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, size+1))
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, err
	}
	if int64(len(b)) != size {
		return nil, fmt.Errorf("it has %d bytes, the manifest says %d: %w", len(b), size, ErrNotContainer)
	}
	return b, nil
}

// checkLayerType fails unless a media type is that of a layer that can be read.
func checkLayerType(mediaType string) error {
	base := mediaType
	for _, compression := range []string{"+gzip", "+zstd", ".gzip", ".zstd"} {
		base = strings.TrimSuffix(base, compression)
	}
	switch base {
	case typeLayer, typeDockerLayer:
		return nil
	case typeForeignLayer, typeDockerForeign:
		return fmt.Errorf("it is one that may not be distributed (%s), and has to be had from its maker: "+
			"export a container of this image as a tar archive and build from that: %w", mediaType, ErrNotContainer)
	}
	return fmt.Errorf("it is of the unsupported type %s: %w", quote(mediaType), ErrNotContainer)
}

// layer lays one layer over what is there. diff is the digest of its uncompressed form.
func (r *imageReader) layer(ctx context.Context, a *archive, root *node, desc imageDescriptor, diff format.Digest) (err error) {
	if err := checkLayerType(desc.MediaType); err != nil {
		return err
	}
	d, err := parseDigest(desc.Digest)
	if err != nil {
		return err
	}
	if desc.Size < 0 {
		return fmt.Errorf("its size is %d: %w", desc.Size, ErrNotContainer)
	}
	blob, err := r.images.Blob(ctx, d, desc.Size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, blob.Close()) }()
	l, err := newLayer(a.t, root, true)
	if err != nil {
		return err
	}
	sum := sha256.New()
	if err := a.read(blob, l, sum, false); err != nil {
		return fmt.Errorf("%s: %w", d, err)
	}
	if got := format.Digest(sum.Sum(nil)); got != diff {
		return fmt.Errorf("%s: uncompressed it is %s, the image's configuration says %s: %w", d, got, diff, ErrArchive)
	}
	return l.apply(ctx)
}
