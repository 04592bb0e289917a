package image

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// Inspection is an image's metadata as it is stored, for people and their tools to read.
// Its JSON form is the output of the inspect command.
type Inspection struct {
	Manifest InspectedManifest `json:"manifest"`
	// Rootfs has the content that `capnp convert binary:json` prints for the rootfs blob.
	Rootfs *format.Rootfs `json:"rootfs"`
	// Layers has the same for each metadata blob of an image of version 1 or 2, topmost
	// first. It is empty for version 3, whose rootfs holds the layers.
	Layers []json.RawMessage `json:"layers"`
}

// InspectedManifest says what names the image: a manifest, or the rootfs blob of an image
// of version 1 or 2.
type InspectedManifest struct {
	Digest    format.Digest `json:"digest"`
	Verity    string        `json:"verity"` // hex
	MediaType string        `json:"mediaType"`
	// Annotations are the manifest's own, not those of its descriptors.
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Inspect reads the metadata of the image that root names. Its errors are those of Open,
// but a tree that makes no sense is shown, not refused.
func Inspect(ctx context.Context, src Source, root format.Descriptor) (*Inspection, error) {
	im := &Image{src: src, root: root}
	out, err := im.inspect(ctx)
	if err != nil {
		return nil, fmt.Errorf("inspect image %s: %w", root.Digest, err)
	}
	return out, nil
}

func (im *Image) inspect(ctx context.Context) (*Inspection, error) {
	rootfs, err := im.readRootfs(ctx)
	if err != nil {
		return nil, err
	}
	out := &Inspection{
		Manifest: InspectedManifest{Digest: im.root.Digest, Verity: im.verity.String(), MediaType: im.root.MediaType},
		Rootfs:   im.rootfs,
		Layers:   []json.RawMessage{},
	}
	if im.manifest != nil {
		out.Manifest.Annotations = im.manifest.Annotations
	}
	if im.version == format.Version3 {
		return out, nil
	}
	layers, err := im.layers(ctx)
	if err != nil {
		return nil, fmt.Errorf("rootfs %s: %w", rootfs, err)
	}
	for _, l := range layers {
		b, err := l.JSON(im.version)
		if err != nil {
			return nil, err
		}
		out.Layers = append(out.Layers, b)
	}
	return out, nil
}

// readRootfs reads and decodes what comes before the tree: the manifest, if there is one,
// and the rootfs message. It returns the latter's digest.
func (im *Image) readRootfs(ctx context.Context) (format.Digest, error) {
	digest, b, err := im.getRootfs(ctx, im.get)
	if err != nil {
		return digest, err
	}
	return digest, im.decodeRootfs(digest, b)
}

// getFunc returns a whole blob. Content that has the fs-verity digest may be taken for right.
type getFunc = func(ctx context.Context, d format.VerityData, limit int64) ([]byte, error)

// get is Source.Get.
func (im *Image) get(ctx context.Context, d format.VerityData, limit int64) ([]byte, error) {
	return im.src.Get(ctx, d.Digest, limit)
}

// getRootfs reads the manifest, if there is one, and the rootfs message by get, and returns the latter.
func (im *Image) getRootfs(ctx context.Context, get getFunc) (format.Digest, []byte, error) {
	rootfs := im.root
	if im.root.MediaType != format.MediaTypeRootfs {
		b, err := im.getMetadata(ctx, get, format.VerityData{Digest: im.root.Digest}, format.MaxManifestSize)
		if err != nil {
			return rootfs.Digest, nil, err
		}
		im.verity = verity.Sum(b)
		if im.manifest, err = format.ParseManifest(b); err != nil {
			return rootfs.Digest, nil, err
		}
		if rootfs, err = im.manifest.Rootfs(); err != nil {
			return rootfs.Digest, nil, err
		}
	}
	d := format.VerityData{Digest: rootfs.Digest}
	if v, err := format.RootfsVerity(rootfs); err == nil {
		d.Verity = v // where there is none, the digest will do
	}
	b, err := im.getMetadata(ctx, get, d, format.MaxRootfsSize)
	if err == nil && im.manifest == nil {
		im.verity = verity.Sum(b)
	}
	return rootfs.Digest, b, err
}

// decodeRootfs decodes the rootfs message.
func (im *Image) decodeRootfs(digest format.Digest, b []byte) (err error) {
	if im.rootfs, err = im.decoding.DecodeRootfs(b); err != nil {
		return fmt.Errorf("rootfs %s: %w", digest, err)
	}
	im.version = im.rootfs.Version
	return nil
}
