package driver

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// DefaultMetadataMemory is Config.MetadataMemory where that is 0. It goes with a container of
// 512 MiB: one image can have about 270,000 files of a chunk each, and all that are mounted about
// a million together.
const DefaultMetadataMemory = 256 << 20

// minMetadataMemory is less than any useful limit.
const minMetadataMemory = 8 << 20

// memory bounds what the metadata of images takes: those that are mounted, and the one that is
// being decoded, for which several times as much is needed as is kept. Who may choose images
// must not be able to have the process killed, which serves the volumes of everybody else.
type memory struct {
	limit int64
	// busy holds one element while an image is decoded.
	busy chan struct{}

	mu   sync.Mutex // guards used
	used int64
}

// maxManifest returns how many bytes of a manifest are taken into memory while an image is
// pulled, where several may be at once: a sixteenth of the memory for metadata.
func maxManifest(metadataMemory int64) int64 {
	if metadataMemory == 0 {
		metadataMemory = DefaultMetadataMemory
	}
	return min(metadataMemory/16, format.MaxManifestSize)
}

func newMemory(limit int64) *memory {
	if limit == 0 {
		limit = DefaultMetadataMemory
	}
	return &memory{limit: limit, busy: make(chan struct{}, 1)}
}

// admission says how an image is held against the limits.
type admission struct {
	// inodes is the policy's limit, 0 for none.
	inodes uint64
	// admitted is set for a volume that was published before: it fitted then, and must not be
	// refused because others were mounted in another order.
	admitted bool
}

// open opens an image by fn if there is memory, and counts what it takes until free. It waits
// while another one is opened.
func (m *memory) open(ctx context.Context, a admission, fn func(image.Limits) (*image.Image, error)) (*image.Image, error) {
	select {
	case m.busy <- struct{}{}:
		defer func() { <-m.busy }()
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another image to be opened: %w", ctx.Err())
	}
	m.mu.Lock()
	used := m.used
	m.mu.Unlock()
	if a.admitted {
		used = 0
	}
	// At least something, since 0 is no limit.
	limits := image.Limits{Inodes: a.inodes, Memory: uint64(max(1, m.limit-used))}
	img, err := fn(limits)
	switch {
	case errors.Is(err, format.ErrTooManyInodes):
		return nil, tooLarge("it has more than the %d inodes that this node takes (the driver's --max-inodes)", a.inodes)
	case errors.Is(err, format.ErrTooMuchMemory) && used == 0:
		return nil, tooLarge("its metadata does not fit into %s of memory (the driver's --metadata-memory)", humanBytes(m.limit))
	case errors.Is(err, format.ErrTooMuchMemory):
		return nil, fmt.Errorf("the metadata of mounted images takes %s of %s of memory on this node (the driver's --metadata-memory), which leaves too little for this one; it is tried again: %w",
			humanBytes(used), humanBytes(m.limit), errNoMemory)
	case err != nil:
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used += img.Memory()
	return img, nil
}

// usage returns how many bytes the metadata of mounted images takes.
func (m *memory) usage() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used
}

// free says that an image that open returned is not used any more.
func (m *memory) free(img *image.Image) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used -= img.Memory()
}
