package image

import (
	"context"
	"fmt"
	"slices"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// Part is a blob of an image and what the image says its fs-verity digest is.
type Part struct {
	Digest format.Digest
	// Verity is the zero Digest where the image has none for the blob.
	Verity verity.Digest
}

// Parts are the blobs of an image, each once. None but those of the metadata were looked at.
type Parts struct {
	// Root is what names the image: a manifest or, for images of versions 1 and 2, the rootfs
	// blob. Its fs-verity digest is not what the image says but that of the bytes that were read.
	Root Part
	// Metadata is the rootfs blob; of versions 1 and 2 the blobs that the rootfs names.
	Metadata []Part
	// Config is the manifest's config blob, which nobody needs to read; zero without a manifest.
	// It may be one of Data, too.
	Config format.Digest
	// Data are the blobs that files need, in the order of the files.
	Data []Part
	// Shadowed are blobs that the image has an fs-verity digest for but that no file needs,
	// such as the chunks of deleted files. They may be missing.
	Shadowed []Part

	im  *Image
	raw map[format.Digest]bool
}

// ReadParts reads the metadata of an image as Open does, with the same errors, and lists the
// blobs that it is made of. cfg.Cache is not used.
func ReadParts(ctx context.Context, cfg Config) (*Parts, error) {
	if cfg.Source == nil {
		return nil, fmt.Errorf("read parts of image: no source")
	}
	im := &Image{src: cfg.Source, root: cfg.Root, limits: cfg.Limits}
	im.decoding = format.Limits{Inodes: cfg.Limits.Inodes, Memory: cfg.Limits.Memory / 4}
	p := &Parts{im: im}
	if err := p.read(ctx); err != nil {
		return nil, fmt.Errorf("read parts of image %s: %w", cfg.Root.Digest, err)
	}
	return p, nil
}

func (p *Parts) read(ctx context.Context) error {
	rootfs, err := p.im.readRootfs(ctx)
	if err != nil {
		return err
	}
	layers, err := p.im.layers(ctx)
	if err != nil {
		return err
	}
	if p.im.index, _, err = newIndex(layers); err != nil {
		return fmt.Errorf("rootfs %s: %w", rootfs, err)
	}
	p.Root = Part{p.im.root.Digest, p.im.verity}
	listed := make(map[format.Digest]verity.Digest, len(p.im.rootfs.Verity))
	for _, v := range p.im.rootfs.Verity {
		listed[v.Digest] = v.Verity
	}
	seen := map[format.Digest]bool{p.im.root.Digest: true}
	add := func(list *[]Part, d format.Digest, v verity.Digest) {
		if !seen[d] {
			seen[d] = true
			*list = append(*list, Part{d, v})
		}
	}
	if m := p.im.manifest; m != nil {
		desc, err := m.Rootfs()
		if err != nil {
			return err
		}
		v, err := format.RootfsVerity(desc)
		if err != nil {
			return err
		}
		add(&p.Metadata, desc.Digest, v)
		p.Config = m.Config.Digest
	}
	for _, ref := range p.im.rootfs.Metadatas {
		add(&p.Metadata, ref.Digest, listed[ref.Digest])
	}
	for i := range p.im.index.blobs {
		add(&p.Data, p.im.index.blobs[i].digest, listed[p.im.index.blobs[i].digest])
	}
	for _, v := range p.im.rootfs.Verity {
		add(&p.Shadowed, v.Digest, v.Verity)
	}
	p.raw = rawChunks(p.im.manifest, p.im.index)
	p.im.manifest, p.im.rootfs = nil, nil
	return nil
}

// rawChunks returns the blobs that are stored raw in an image that was built to compress. Images
// of versions 1 and 2, which have no manifest, do not say how they were built.
func rawChunks(m *format.Manifest, x *index) map[format.Digest]bool {
	zstd := make(map[format.Digest]bool)
	if m != nil {
		for _, l := range m.Layers {
			if l.MediaType == format.MediaTypeChunkZstd {
				zstd[l.Digest] = true
			}
		}
	}
	raw := make(map[format.Digest]bool)
	for i := range x.blobs {
		if b := &x.blobs[i]; !b.compressed && (m == nil || zstd[b.digest]) {
			raw[b.digest] = true
		}
	}
	return raw
}

// IsRaw reports whether a blob is stored raw in an image that was, or may have been, built to
// compress. The reference gives such blobs the fs-verity digest of their compressed form, which
// is stored nowhere.
func (p *Parts) IsRaw(d format.Digest) bool { return p.raw[d] }

// File returns the path of a file that needs the blob d, for messages, or "" where none does.
// It looks at the whole image.
func (p *Parts) File(d format.Digest) string {
	id := slices.IndexFunc(p.im.index.blobs, func(b blob) bool { return b.digest == d })
	if id < 0 {
		return ""
	}
	return p.im.index.filesOf([]uint32{uint32(id)})[uint32(id)]
}
