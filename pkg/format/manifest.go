package format

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Media types and annotations of a PuzzleFS image (docs/format.md, "Container").
const (
	MediaTypeManifest  = "application/vnd.oci.image.manifest.v1+json"
	MediaTypeIndex     = "application/vnd.oci.image.index.v1+json"
	MediaTypeEmpty     = "application/vnd.oci.empty.v1+json"
	MediaTypeRootfs    = "application/vnd.puzzlefs.image.rootfs.v1"
	MediaTypeChunk     = "application/vnd.puzzlefs.image.filedata.v1"
	MediaTypeChunkZstd = MediaTypeChunk + "+zstd"

	// AnnotationVerity, on the rootfs descriptor, holds the hex fs-verity digest of the rootfs blob.
	AnnotationVerity = "io.puzzlefsoci.puzzlefs.puzzlefs_verity_root_hash"
	// AnnotationRefName, on an index entry, holds the tag.
	AnnotationRefName = "org.opencontainers.image.ref.name"
)

// Limits on what is read from a registry or a layout, in bytes.
const (
	// MaxManifestSize bounds an OCI image manifest: about 1.3 million chunk descriptors.
	MaxManifestSize = 256 << 20
	// MaxRootfsSize bounds a rootfs or inode vector blob: about five million inodes.
	MaxRootfsSize = 1 << 30
)

// EmptyConfig is the content of the config blob of every PuzzleFS image.
const EmptyConfig = "{}"

// Platform is the platform of an index entry. The reference writes the build host's.
type Platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

// Descriptor names a blob in a manifest or an index. Sizes are in bytes.
// The fields are declared in the order of their JSON names, because the
// reference writes canonical JSON: keys sorted, no white space.
type Descriptor struct {
	Annotations map[string]string `json:"annotations,omitempty"`
	Data        []byte            `json:"data,omitempty"`
	Digest      Digest            `json:"digest"`
	MediaType   string            `json:"mediaType"`
	Platform    *Platform         `json:"platform,omitempty"`
	Size        int64             `json:"size"`
}

// Manifest is an OCI image manifest. Encode writes the fields that the reference
// writes; in particular no mediaType.
type Manifest struct {
	Annotations map[string]string `json:"annotations,omitempty"`
	Config      Descriptor        `json:"config"`
	Layers      []Descriptor      `json:"layers"`
	// MediaType is what the document said of itself, usually nothing.
	MediaType     string `json:"mediaType,omitempty"`
	SchemaVersion int    `json:"schemaVersion"`
}

// EmptyDescriptor returns the descriptor of [EmptyConfig].
func EmptyDescriptor() Descriptor {
	return Descriptor{
		MediaType: MediaTypeEmpty,
		Digest:    DigestOf([]byte(EmptyConfig)),
		Size:      int64(len(EmptyConfig)),
		Data:      []byte(EmptyConfig),
	}
}

// NewManifest returns the manifest of an image with the given rootfs blob and chunks.
// rootfsVerity is the fs-verity digest of the rootfs blob. The chunks are listed in the
// order they were produced, repeated as often as they were produced.
func NewManifest(rootfs Descriptor, rootfsVerity [32]byte, chunks []Descriptor) *Manifest {
	rootfs.MediaType = MediaTypeRootfs
	rootfs.Annotations = map[string]string{AnnotationVerity: hex.EncodeToString(rootfsVerity[:])}
	layers := make([]Descriptor, 0, 1+len(chunks))
	layers = append(layers, rootfs)
	layers = append(layers, chunks...)
	return &Manifest{SchemaVersion: 2, Config: EmptyDescriptor(), Layers: layers}
}

// Encode returns the canonical JSON of m, the bytes whose digest names the image.
func (m *Manifest) Encode() ([]byte, error) {
	if b := m.encodeCanonical(); b != nil {
		return b, nil
	}
	return CanonicalJSON(m)
}

// ParseManifest decodes an OCI image manifest. It fails with ErrNotPuzzleFS when b is an
// image index, or an image manifest without a rootfs layer, and with ErrCorrupt when it is
// neither.
func ParseManifest(b []byte) (*Manifest, error) {
	if len(b) > MaxManifestSize {
		return nil, fmt.Errorf("parse manifest: %d bytes, at most %d are read: %w", len(b), MaxManifestSize, ErrTooLarge)
	}
	if m := parseCanonical(b); m != nil {
		return m, nil
	}
	return parseAny(b)
}

// parseAny is ParseManifest for documents of any form.
func parseAny(b []byte) (*Manifest, error) {
	// Unknown fields are allowed by the OCI specification; a wrong shape is not.
	// An index, and a Docker manifest, are told apart before digests are parsed,
	// so that an image of another kind gets the error that says so.
	var kind struct {
		MediaType     string          `json:"mediaType"`
		SchemaVersion int             `json:"schemaVersion"`
		Manifests     json.RawMessage `json:"manifests"`
		Layers        layerSummary    `json:"layers"`
	}
	if err := decodeJSON(b, &kind); err != nil {
		return nil, fmt.Errorf("parse manifest: %w: %w", err, ErrCorrupt)
	}
	switch {
	case len(kind.Manifests) > 0 && kind.Manifests[0] == '[':
		return nil, fmt.Errorf("parse manifest: this is an image index; name one of its manifests by digest: %w", ErrNotPuzzleFS)
	case kind.SchemaVersion != 2:
		return nil, fmt.Errorf("parse manifest: schemaVersion %d, want 2: %w", kind.SchemaVersion, ErrCorrupt)
	case kind.MediaType != "" && kind.MediaType != MediaTypeManifest:
		return nil, fmt.Errorf("parse manifest: media type %q, want %s: %w", shorten(kind.MediaType), MediaTypeManifest, ErrNotPuzzleFS)
	case kind.Layers.count == 0:
		return nil, fmt.Errorf("parse manifest: no layers; a PuzzleFS image has at least one of type %s: %w", MediaTypeRootfs, ErrNotPuzzleFS)
	case kind.Layers.rootfses == 0:
		return nil, fmt.Errorf("parse manifest: the first layer is %q, a PuzzleFS image has one of type %s: %w",
			shorten(kind.Layers.first), MediaTypeRootfs, ErrNotPuzzleFS)
	case kind.Layers.rootfses > 1:
		return nil, fmt.Errorf("parse manifest: %d rootfs layers, want one: %w", kind.Layers.rootfses, ErrCorrupt)
	case kind.Layers.anonymous > 0:
		return nil, fmt.Errorf("parse manifest: %d layers without a digest: %w", kind.Layers.anonymous, ErrCorrupt)
	}
	m := new(Manifest)
	if err := decodeJSON(b, m); err != nil {
		return nil, fmt.Errorf("parse manifest: %w: %w", err, ErrCorrupt)
	}
	if err := m.Config.validate(); err != nil {
		return nil, fmt.Errorf("parse manifest: config: %w", err)
	}
	for i := range m.Layers {
		if err := m.Layers[i].validate(); err != nil {
			return nil, fmt.Errorf("parse manifest: layer %d: %w", i, err)
		}
	}
	return m, nil
}

// validate checks what the decoder lets pass: a field that is null or not there.
func (d *Descriptor) validate() error {
	switch {
	case d.Digest.IsZero():
		return fmt.Errorf("no digest: %w", ErrCorrupt)
	case d.Size < 0:
		return fmt.Errorf("the negative size %d: %w", d.Size, ErrCorrupt)
	}
	return nil
}

// layerSummary is what has to be known of the layers before they are decoded. It is gathered
// without keeping any of them: a descriptor takes three bytes of a hostile manifest, and
// fifty times that in memory.
type layerSummary struct {
	count     int
	first     string // media type of the first
	rootfses  int
	anonymous int // layers without a digest
}

// UnmarshalJSON implements json.Unmarshaler.
func (s *layerSummary) UnmarshalJSON(b []byte) error {
	*s = layerSummary{}
	dec := json.NewDecoder(bytes.NewReader(b))
	switch t, err := dec.Token(); {
	case err != nil:
		return err
	case t == nil:
		return nil // null
	case t != json.Delim('['):
		return errors.New("layers is not a list")
	}
	for dec.More() {
		var l struct {
			MediaType string `json:"mediaType"`
			Digest    any    `json:"digest"`
		}
		if err := dec.Decode(&l); err != nil {
			return err
		}
		if s.count == 0 {
			s.first = l.MediaType
		}
		s.count++
		if l.MediaType == MediaTypeRootfs {
			s.rootfses++
		}
		if l.Digest == nil {
			s.anonymous++
		}
	}
	return nil
}

// Rootfs returns the descriptor of the rootfs blob, wherever it stands in the layers,
// as readers of the reference look for it.
func (m *Manifest) Rootfs() (Descriptor, error) {
	for _, l := range m.Layers {
		if l.MediaType == MediaTypeRootfs {
			return l, nil
		}
	}
	return Descriptor{}, fmt.Errorf("find rootfs: no layer of type %s: %w", MediaTypeRootfs, ErrNotPuzzleFS)
}

// Blobs returns the descriptors of all blobs of the image, each digest once: the config,
// the rootfs and the chunks in the order of the manifest.
func (m *Manifest) Blobs() []Descriptor {
	seen := make(map[Digest]struct{}, len(m.Layers)+1)
	blobs := make([]Descriptor, 0, len(m.Layers)+1)
	for _, d := range append([]Descriptor{m.Config}, m.Layers...) {
		if _, dup := seen[d.Digest]; dup {
			continue
		}
		seen[d.Digest] = struct{}{}
		blobs = append(blobs, d)
	}
	return blobs
}

// RootfsVerity returns the fs-verity digest that the rootfs descriptor d carries.
func RootfsVerity(d Descriptor) ([32]byte, error) {
	var v [32]byte
	s, ok := d.Annotations[AnnotationVerity]
	if !ok {
		return v, fmt.Errorf("read rootfs descriptor: no annotation %s: %w", AnnotationVerity, ErrCorrupt)
	}
	if len(s) != hex.EncodedLen(len(v)) {
		return v, fmt.Errorf("read rootfs descriptor: annotation %s is %q, want 64 hex digits: %w", AnnotationVerity, shorten(s), ErrCorrupt)
	}
	if _, err := hex.Decode(v[:], []byte(s)); err != nil {
		return v, fmt.Errorf("read rootfs descriptor: annotation %s is %q, want 64 hex digits: %w", AnnotationVerity, shorten(s), ErrCorrupt)
	}
	return v, nil
}

// CanonicalJSON encodes v as the reference does: keys in the order of v's fields, which
// the types of this package declare sorted, no white space, no HTML escaping.
func CanonicalJSON(v any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("encode JSON: %w", err)
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n")), nil
}

// decodeJSON decodes exactly one JSON value.
func decodeJSON(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("data after the JSON value")
	}
	return nil
}
