package image_test

import (
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// TestReadParts: every blob is in one list, and has the digest that its bytes have, but for the chunks that
// the reference stores raw in a compressed image.
func TestReadParts(t *testing.T) {
	for _, tt := range []struct {
		layout, tag     string
		metadata        int
		config          bool
		shadowed, wrong bool
	}{
		{layout: "v1-git", tag: "changed", metadata: 2, shadowed: true},
		{layout: "v2-0.1.0", tag: "small", metadata: 1},
		{layout: "v2-0.1.0", tag: "small-zstd", metadata: 1, wrong: true},
		{layout: "v3-master", tag: "changed", metadata: 1, config: true, shadowed: true},
		{layout: "v3-master", tag: "small-zstd", metadata: 1, config: true, wrong: true},
	} {
		t.Run(tt.layout+"/"+tt.tag, func(t *testing.T) {
			s, err := store.Open(store.Config{Dir: testtree.Golden(t, "images/"+tt.layout)})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			root, err := s.Resolve(tt.tag)
			if err != nil {
				t.Fatal(err)
			}
			p, err := image.ReadParts(t.Context(), image.Config{Source: s, Root: root})
			if err != nil {
				t.Fatal(err)
			}
			if len(p.Metadata) != tt.metadata || p.Config.IsZero() == tt.config || (len(p.Shadowed) > 0) != tt.shadowed || len(p.Data) == 0 {
				t.Errorf("%d metadata blobs, config %s, %d shadowed and %d data blobs", len(p.Metadata), p.Config, len(p.Shadowed), len(p.Data))
			}
			if p.Root.Digest != root.Digest {
				t.Errorf("root %s, want %s", p.Root.Digest, root.Digest)
			}
			seen := make(map[format.Digest]bool)
			wrong := false
			for _, list := range [][]image.Part{{p.Root}, p.Metadata, p.Data, p.Shadowed} {
				for _, part := range list {
					if seen[part.Digest] {
						t.Errorf("%s is listed twice", part.Digest)
					}
					seen[part.Digest] = true
					b, err := s.Get(t.Context(), part.Digest, 1<<24)
					if err != nil {
						t.Fatal(err)
					}
					if verity.Sum(b) != part.Verity {
						wrong = true
						if !p.IsRaw(part.Digest) {
							t.Errorf("%s has another digest than %s", part.Digest, part.Verity)
						}
					}
				}
			}
			if wrong != tt.wrong {
				t.Errorf("wrong digests: %t, want %t", wrong, tt.wrong)
			}
			for _, part := range p.Data {
				if p.File(part.Digest) == "" {
					t.Errorf("no file needs %s", part.Digest)
				}
			}
			for _, part := range p.Shadowed {
				if file := p.File(part.Digest); file != "" {
					t.Errorf("%s needs the shadowed %s", file, part.Digest)
				}
			}
		})
	}
}
