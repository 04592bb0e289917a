package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	license   = "Apache-2.0"
	sbomType  = "application/vnd.cyclonedx+json"
	emptyType = "application/vnd.oci.empty.v1+json"

	// Keys of annotations and labels, of the OCI image specification.
	annotationTitle   = "org.opencontainers.image.title"
	annotationCreated = "org.opencontainers.image.created"
)

// platformImage is the image of one platform with its bill of materials.
type platformImage struct {
	platform    v1.Platform
	image       v1.Image
	sbom        []byte
	sbomImage   v1.Image // carries sbom, and refers to image
	programSize int
}

// sbomName is the name of the file that the bill of materials is written to.
func (im platformImage) sbomName() string {
	return program + "-sbom-" + im.platform.Architecture + ".json"
}

// labels say what the image is, as labels of its config and as annotations of its manifests.
func (s *source) labels() map[string]string {
	labels := map[string]string{
		annotationTitle:                          program,
		annotationCreated:                        s.created.Format(time.RFC3339),
		"org.opencontainers.image.description":   "PuzzleFS images for Kubernetes: CSI node driver, builder and command-line tool",
		"org.opencontainers.image.source":        "https://github.com/csi-puzzlefs/csi-puzzlefs",
		"org.opencontainers.image.documentation": "https://github.com/csi-puzzlefs/csi-puzzlefs/tree/main/docs",
		"org.opencontainers.image.licenses":      license,
		"org.opencontainers.image.version":       s.version,
	}
	if s.revision != "" {
		labels["org.opencontainers.image.revision"] = s.revision
	}
	return labels
}

// contents builds the program for a platform and returns it, and the files of its image.
func (s *source) contents(ctx context.Context, p v1.Platform) (bin []byte, files []file, err error) {
	dir, err := os.MkdirTemp("", "csi-puzzlefs-image-*")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	name, err := s.build(ctx, p, dir)
	if err != nil {
		return nil, nil, err
	}
	if bin, err = os.ReadFile(name); err != nil {
		return nil, nil, err
	}
	licenses, err := s.licenses(ctx, p)
	if err != nil {
		return nil, nil, fmt.Errorf("collect licences: %w", err)
	}
	return bin, rootfs(bin, licenses), nil
}

// image makes the image of a platform.
func (s *source) image(ctx context.Context, p v1.Platform) (platformImage, error) {
	bin, files, err := s.contents(ctx, p)
	if err != nil {
		return platformImage{}, err
	}
	im := platformImage{platform: p, programSize: len(bin)}
	if im.sbom, err = s.billOfMaterials(bin, p); err != nil {
		return platformImage{}, err
	}
	if im.image, err = s.pack(files, p); err != nil {
		return platformImage{}, err
	}
	im.sbomImage, err = s.referrer(im)
	return im, err
}

// pack makes the program's image of its files.
func (s *source) pack(files []file, p v1.Platform) (v1.Image, error) {
	im, err := oneLayer(files, p, s.created, "make image", v1.Config{
		Entrypoint: []string{"/" + program},
		// For kubectl exec: "csi-puzzlefs store ls" without the slash.
		Env:        []string{"PATH=/"},
		WorkingDir: "/",
		User:       "0:0",
		StopSignal: "SIGTERM",
		Labels:     s.labels(),
	})
	if err != nil {
		return nil, err
	}
	//nolint:errcheck // what goes in as an image comes out as one
	return mutate.Annotations(im, s.labels()).(v1.Image), nil
}

// oneLayer makes an image of one layer, all of one time.
func oneLayer(files []file, p v1.Platform, mtime time.Time, createdBy string, config v1.Config) (v1.Image, error) {
	var layerTar bytes.Buffer
	if err := writeTar(&layerTar, files, mtime); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(layerTar.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestCompression), tarball.WithCompressedCaching)
	if err != nil {
		return nil, err
	}
	created := v1.Time{Time: mtime}
	im := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if im, err = mutate.ConfigFile(im, &v1.ConfigFile{
		OS: p.OS, Architecture: p.Architecture, Created: created, RootFS: v1.RootFS{Type: "layers"}, Config: config,
	}); err != nil {
		return nil, err
	}
	return mutate.Append(im, mutate.Addendum{Layer: layer, History: v1.History{Created: created, CreatedBy: createdBy}})
}

// index puts the images of all platforms, then their bills of materials, into one index. The bills
// are part of it, under a platform that no machine has, so that they go wherever the index is
// copied to, and registries then list them as referrers of the images.
func (s *source) index(images []platformImage) v1.ImageIndex {
	var platforms, sboms []mutate.IndexAddendum
	for _, im := range images {
		platforms = append(platforms, mutate.IndexAddendum{Add: untyped{im.image}, Descriptor: v1.Descriptor{Platform: &im.platform}})
		sboms = append(sboms, mutate.IndexAddendum{Add: im.sbomImage, Descriptor: v1.Descriptor{
			Platform:    &v1.Platform{OS: "unknown", Architecture: "unknown"},
			Annotations: map[string]string{annotationTitle: im.sbomName()},
		}})
	}
	index := mutate.IndexMediaType(mutate.AppendManifests(empty.Index, append(platforms, sboms...)...), types.OCIImageIndex)
	//nolint:errcheck // what goes in as an index comes out as one
	return mutate.Annotations(index, s.labels()).(v1.ImageIndex)
}

// untyped is an image without an artifact type, where the library would give its descriptor that of
// its config: an artifact is what images are told from by having one.
type untyped struct{ v1.Image }

// ArtifactType is what partial.Descriptor asks for.
func (untyped) ArtifactType() (string, error) { return "", nil }

// artifact is a manifest that carries something else than an image, in the form that OCI 1.1 gives
// it: an empty config, one layer, a type, and a subject.
type artifact struct {
	manifest v1.Manifest
	layer    v1.Layer
}

var _ partial.CompressedImageCore = (*artifact)(nil)

// RawConfigFile implements partial.CompressedImageCore.
func (a *artifact) RawConfigFile() ([]byte, error) { return []byte("{}"), nil }

// MediaType implements partial.CompressedImageCore.
func (a *artifact) MediaType() (types.MediaType, error) { return a.manifest.MediaType, nil }

// RawManifest implements partial.CompressedImageCore.
func (a *artifact) RawManifest() ([]byte, error) { return json.Marshal(a.manifest) }

// LayerByDigest implements partial.CompressedImageCore.
func (a *artifact) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	if h == a.manifest.Config.Digest {
		return static.NewLayer([]byte("{}"), emptyType), nil
	}
	return a.layer, nil
}

// referrer makes the manifest that carries a bill of materials and refers to its image.
func (s *source) referrer(im platformImage) (v1.Image, error) {
	subject, err := partial.Descriptor(im.image)
	if err != nil {
		return nil, err
	}
	subject = &v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size}
	config, err := partial.Descriptor(static.NewLayer([]byte("{}"), emptyType))
	if err != nil {
		return nil, err
	}
	layer := static.NewLayer(im.sbom, sbomType)
	content, err := partial.Descriptor(layer)
	if err != nil {
		return nil, err
	}
	content.Annotations = map[string]string{annotationTitle: im.sbomName()}
	return partial.CompressedToImage(&artifact{layer: layer, manifest: v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: sbomType,
		Config: *config, Layers: []v1.Descriptor{*content}, Subject: subject,
		Annotations: map[string]string{annotationCreated: s.created.Format(time.RFC3339)},
	}})
}
