package image

import (
	"context"
	"errors"
	"fmt"
	"unsafe"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// Limits bound the metadata of an image. Fields that are zero do not.
type Limits struct {
	// Inodes is how many inodes there may be in all layers together.
	Inodes uint64
	// Memory is about how many bytes opening the image may take at most. A sixth of it is for
	// the blobs of the metadata, a quarter for what is decoded of them, and the rest for making
	// the index: measured with 400,000 files of a chunk each.
	Memory uint64
}

// getMetadata reads, by get, a whole blob of at most limit bytes, or of as many as the limits leave.
func (im *Image) getMetadata(ctx context.Context, get getFunc, d format.VerityData, limit int64) ([]byte, error) {
	left := limit
	if im.limits.Memory > 0 {
		left = min(limit, max(0, int64(im.limits.Memory/6)-im.metadata))
	}
	b, err := get(ctx, d, left)
	if errors.Is(err, store.ErrTooLarge) && left < limit {
		return nil, fmt.Errorf("%w: %w", err, format.ErrTooMuchMemory)
	}
	im.metadata += int64(len(b))
	return b, err
}

// Memory returns about how many bytes the opened image takes, without the chunk cache.
func (im *Image) Memory() int64 {
	x := im.index
	n := len(x.names) + len(x.targets) + x.numbers.bytes() +
		len(x.nodes)*int(unsafe.Sizeof(node{})) + len(x.entries)*int(unsafe.Sizeof(entry{})) +
		len(x.chunks)*int(unsafe.Sizeof(extent{})) + len(x.blobs)*int(unsafe.Sizeof(blob{})) +
		len(x.shared)*int(unsafe.Sizeof(shared{})) + len(x.sealed)*int(unsafe.Sizeof(format.VerityData{}))
	for i := range x.shared {
		for _, a := range x.shared[i].xattrs {
			n += int(unsafe.Sizeof(a)) + len(a.Key) + len(a.Val)
		}
	}
	return int64(n)
}
