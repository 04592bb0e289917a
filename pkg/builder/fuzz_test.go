package builder_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
)

// FuzzReadTar reads anything as an archive and as a layer over another: no panic, no wild
// allocation, and what is accepted makes an image that verifies.
func FuzzReadTar(f *testing.F) {
	entries := []entry{
		dir("./", 0o755), file("a/b", "content"), link("c", "a/b"), symlink("s", "a"), file("s/x", "y"), file(".wh.lower", ""),
		file("a/.wh..wh..opq", ""),
		{Header: tar.Header{Name: "p", Typeflag: tar.TypeFifo, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "v", "LIBARCHIVE.xattr.user.y": "dg"}}},
	}
	whole := pack(f, entries...)
	f.Add(whole)
	f.Add(gzipped(f, whole))
	f.Add(zstded(f, whole))
	f.Add(pack(f, link("b", "a"), file("a", "x"), file("../a", "x")))
	lower := pack(f, file("lower", "x"), file("a/lower", "x"), link("a/l", "lower"))
	work := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			t.Skip("large inputs only take long")
		}
		tree, err := builder.ReadTar(t.Context(), bytes.NewReader(b), builder.ReadConfig{WorkDir: work})
		if err == nil {
			checkBuilds(t, tree)
		}
		im := new(images)
		im.addRawImage(t, lower, b)
		tree, err = builder.ReadImage(t.Context(), im, builder.Platform{}, false, builder.ReadConfig{WorkDir: work})
		if err == nil {
			checkBuilds(t, tree)
		}
	})
}

// checkBuilds fails unless a tree makes an image that is in good order, and closes it.
func checkBuilds(t *testing.T, tree *builder.Tree) {
	t.Helper()
	defer closeTree(t, tree)
	s := &memStore{blobs: make(map[format.Digest][]byte)}
	if _, err := builder.Build(t.Context(), builder.Config{Tree: tree, Store: s, Tag: "t", Workers: 1}); err != nil {
		t.Fatal(err)
	}
	imageTree(t, s, "t")
}

// addRawImage adds an image of layers as they are; diff_ids are those of what is inside, as
// far as that can be told.
func (im *images) addRawImage(t testing.TB, layers ...[]byte) {
	t.Helper()
	var diffs []format.Digest
	descriptors := []map[string]any{}
	for _, b := range layers {
		descriptors = append(descriptors, im.put(ociLayer, b))
		diffs = append(diffs, format.DigestOf(uncompressed(b)))
	}
	config := im.putJSON(t, ociConfig, map[string]any{"rootfs": map[string]any{"type": "layers", "diff_ids": diffs}})
	im.putJSON(t, ociManifest, map[string]any{"schemaVersion": 2, "config": config, "layers": descriptors})
}

// uncompressed returns b without gzip or zstd, or as it is.
func uncompressed(b []byte) []byte {
	if z, err := gzip.NewReader(bytes.NewReader(b)); err == nil {
		if plain, err := io.ReadAll(io.LimitReader(z, 64<<20)); err == nil {
			return plain
		}
	}
	if z, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderMaxMemory(64<<20)); err == nil {
		defer z.Close()
		if plain, err := io.ReadAll(io.LimitReader(z, 64<<20)); err == nil {
			return plain
		}
	}
	return b
}

// memStore is a store with one tag in memory, which never waits for a disk.
type memStore struct {
	mu    sync.Mutex // guards what follows
	blobs map[format.Digest][]byte
	root  format.Descriptor
}

var (
	_ builder.Store = (*memStore)(nil)
	_ image.Source  = (*memStore)(nil)
)

func (s *memStore) Put(data []byte, d format.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[d] = bytes.Clone(data)
	return nil
}

func (s *memStore) Get(_ context.Context, d format.Digest, _ int64) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.blobs[d]
	if !ok {
		return nil, store.ErrNotFound
	}
	return b, nil
}

func (s *memStore) ReadWhole(ctx context.Context, reads []store.WholeRead) error {
	return storetest.ReadWhole(ctx, reads, s.Get)
}

func (s *memStore) ReadBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error) {
	b, err := s.Get(ctx, d, 0)
	if err != nil {
		return 0, err
	}
	return bytes.NewReader(b).ReadAt(p, off)
}

func (s *memStore) Size(d format.Digest) (int64, error) {
	b, err := s.Get(context.Background(), d, 0)
	return int64(len(b)), err
}

func (s *memStore) Resolve(string) (format.Descriptor, error) { return s.root, nil }

func (s *memStore) Tag(_ string, d format.Descriptor) error {
	s.root = d
	return nil
}
