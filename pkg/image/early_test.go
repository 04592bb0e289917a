package image_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// lying is a memory that hands over blobs before it finds out that they are others.
type lying struct {
	*memory
	lies     map[format.Digest][]byte
	verified []format.Digest
}

func (l *lying) early(ctx context.Context, v format.VerityData, limit int64) ([]byte, func() error, error) {
	d := v.Digest
	b, lie := l.lies[d]
	var err error
	if !lie {
		b, err = l.Get(ctx, d, limit)
	}
	return b, func() error {
		l.verified = append(l.verified, d)
		if lie {
			return store.ErrDigestMismatch
		}
		return nil
	}, err
}

// TestOpenEarly: what was made of a blob that is not what it should be is thrown away, and the error says
// that it was the blob, whatever else seems to be wrong.
func TestOpenEarly(t *testing.T) {
	m := newMemory()
	root := m.imageOf(t, format.InodeVector{dir(1)})
	manifest, err := format.ParseManifest(m.blobs[root.Digest])
	if err != nil {
		t.Fatal(err)
	}
	rootfs := manifest.Layers[0].Digest
	other := m.imageOf(t, format.InodeVector{dir(1, entries("a", 2)...), file(2)})
	for name, tt := range map[string]struct {
		d     format.Digest
		lie   []byte
		check int // how many blobs were read
	}{
		"another tree":                   {rootfs, encode(t, format.InodeVector{dir(1, entries("a", 2)...), file(2)}), 2},
		"a tree of two layers":           {rootfs, encode(t, format.InodeVector{dir(1)}, format.InodeVector{dir(1)}), 2},
		"no rootfs":                      {rootfs, []byte("this is no rootfs"), 2},
		"a tree that makes no sense":     {rootfs, encode(t, format.InodeVector{dir(1, entries("a", 2)...)}), 2},
		"another manifest":               {root.Digest, m.blobs[other.Digest], 2},
		"no manifest":                    {root.Digest, []byte("this is no manifest"), 1},
		"a manifest of what is not here": {root.Digest, []byte(strings.ReplaceAll(string(m.blobs[root.Digest]), rootfs.Hex(), strings.Repeat("ab", 32))), 1},
	} {
		t.Run(name, func(t *testing.T) {
			src := &lying{memory: m, lies: map[format.Digest][]byte{tt.d: tt.lie}}
			im, err := image.Open(t.Context(), image.Config{Source: m, Early: src.early, Root: root})
			if !errors.Is(err, store.ErrDigestMismatch) || im != nil {
				t.Errorf("%v, %v, want ErrDigestMismatch", im, err)
			}
			if errors.Is(err, format.ErrCorrupt) || errors.Is(err, store.ErrNotFound) {
				t.Errorf("%v speaks of what the blob says", err)
			}
			if len(src.verified) != tt.check {
				t.Errorf("%d blobs were verified, %d were read", len(src.verified), tt.check)
			}
		})
	}
	src := &lying{memory: m}
	im, err := image.Open(t.Context(), image.Config{Source: m, Early: src.early, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	if got := paths(t, im); got != ".=1" {
		t.Errorf("the image has %s", got)
	}
	if len(src.verified) != 2 || !slices.Contains(src.verified, rootfs) || !slices.Contains(src.verified, root.Digest) {
		t.Errorf("%v were verified, want manifest and rootfs", src.verified)
	}
}
