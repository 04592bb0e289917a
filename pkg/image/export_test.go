package image

import (
	"errors"
	"fmt"
	"slices"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// CachedBytes returns what the chunk cache says that it takes, and how much data it keeps
// from being collected.
func (im *Image) CachedBytes() (counted, kept int64) {
	im.cache.mu.Lock()
	defer im.cache.mu.Unlock()
	for _, e := range im.cache.entries {
		kept += int64(cap(entryOf(e).data))
	}
	return im.cache.bytes, kept
}

// CompareIndexes makes the index of a rootfs message directly and by way of its decoded form, and reports
// whether it was made directly, and if so how it differs from the other.
func CompareIndexes(b []byte) (directly bool, err error) {
	x, ok := newDirectIndex(b, new(format.Limits))
	if !ok {
		return false, nil
	}
	r, err := format.DecodeRootfs(b)
	if err != nil {
		return true, err
	}
	want, warnings, err := newIndex(r.Layers)
	switch {
	case err != nil:
		return true, err
	case len(warnings) > 0:
		return true, errors.New(warnings[0])
	case want.stats.LayerInodes+uint64(len(r.Layers[0])) != x.stats.LayerInodes:
		return true, fmt.Errorf("%d inodes in layers", x.stats.LayerInodes)
	}
	x.stats.LayerInodes = 0
	switch {
	case x.stats != want.stats, x.hasXattrs != want.hasXattrs:
		return true, fmt.Errorf("stats %+v, want %+v", x.stats, want.stats)
	case !slices.Equal(x.blobs, want.blobs):
		return true, fmt.Errorf("blobs %v, want %v", x.blobs, want.blobs)
	case !slices.Equal(x.sealed, r.Verity):
		return true, fmt.Errorf("fs-verity digests %v, want %v", x.sealed, r.Verity)
	}
	for n := range want.nodes {
		got, want := x.describe(uint32(n)), want.describe(uint32(n))
		if got != want {
			return true, fmt.Errorf("node %d: %s\nwant %s", n, got, want)
		}
	}
	return true, nil
}

// describe returns all that an index says of a node.
func (x *index) describe(n uint32) string {
	d := &x.nodes[n]
	s := fmt.Sprintf("%+v %q", x.attr(n), x.xattrs(n))
	if found, ok := x.find(x.ino(n)); !ok || found != n {
		s += " not found"
	}
	switch d.kind {
	case format.KindDir:
		s += fmt.Sprintf(" in %d:", d.size)
		for i := d.first; i < d.first+d.count; i++ {
			s += fmt.Sprintf(" %q=%d", x.name(i), x.entries[i].node)
		}
	case format.KindFile:
		s += fmt.Sprint(x.chunks[d.first : d.first+d.count])
	case format.KindSymlink:
		s += x.target(n)
	case format.KindUnknown, format.KindFifo, format.KindChr, format.KindBlk, format.KindSocket, format.KindWhiteout:
	}
	return s
}

// Footprint returns the bytes that the index of an image takes besides names and targets, how many chunks
// files have, and how many blobs there are.
func (im *Image) Footprint() (bytes int64, chunks, blobs int) {
	return im.Memory() - int64(len(im.index.names)+len(im.index.targets)), len(im.index.chunks), len(im.index.blobs)
}
