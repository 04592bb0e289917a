package format_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// The message is the same however much of it finds room in the arena, and whether the inodes are in one list.
func TestArena(t *testing.T) {
	r := &format.Rootfs{Layers: []format.InodeVector{{{Ino: 1, Kind: format.KindDir}}, nil}}
	for i := range 3000 {
		root := &r.Layers[0][0]
		root.Entries = append(root.Entries, format.DirEntry{Ino: uint64(i) + 2, Name: fmt.Appendf(nil, "%0*d", 1+i%40, i)})
		blob := format.BlobRef{Digest: format.DigestOf(fmt.Append(nil, i/9)), Offset: uint64(i)}
		r.Layers[0] = append(r.Layers[0], format.Inode{Ino: uint64(i) + 2, Kind: format.KindFile, Chunks: slices.Repeat([]format.FileChunk{{Blob: blob, Len: 5}}, i%5)})
	}
	r.Layers[1] = r.Layers[0][:100]
	for i := range 200 {
		v := format.VerityData{Digest: format.DigestOf(fmt.Append(nil, i)), Verity: [32]byte{1}}
		r.Verity = append(r.Verity, v)
	}
	want, err := format.EncodeRootfs(r)
	if err != nil {
		t.Fatal(err)
	}
	all := len(want) / 8
	for words := 0; words < 2*all; words += all / 37 {
		if got, err := format.EncodeWithin(words, r); err != nil || !bytes.Equal(got, want) {
			t.Errorf("an arena for %d words of %d: another message, %v", words, all, err)
		}
	}
	pieces := make([]format.Pieces, len(r.Layers))
	for i, layer := range r.Layers {
		for piece := range slices.Chunk(layer, 700) {
			pieces[i] = append(pieces[i], piece)
		}
	}
	if got, err := format.EncodePieces(pieces, r.Verity); err != nil || !bytes.Equal(got, want) {
		t.Errorf("in pieces: another message, %v", err)
	}
}
