package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sort"

	"github.com/klauspost/compress/zstd"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// unitSize is how much uncompressed content is loaded and cached at once, in bytes. A blob
// of at most that much is one unit; a larger one is cut into units of that size, so that
// no read costs more than it has to however large blobs are.
const unitSize = 1 << 20

// ReadAt reads content of a file as io.ReaderAt does: it returns less than len(p) bytes
// only with an error, which is io.EOF at the end of the file. Every byte was verified
// against the digest that the image's metadata gives its blob.
//
// It fails with ErrNotExist, ErrIsDir or ErrNotFile, format.ErrCorrupt, the Source's
// errors, or ctx's.
func (im *Image) ReadAt(ctx context.Context, ino uint64, p []byte, off int64) (int, error) {
	id, err := im.node(ino)
	if err != nil {
		return 0, err
	}
	n := &im.index.nodes[id]
	switch {
	case n.kind == format.KindDir:
		return 0, fmt.Errorf("read inode %d: %w", ino, ErrIsDir)
	case n.kind != format.KindFile:
		return 0, fmt.Errorf("read inode %d: %w", ino, ErrNotFile)
	case off < 0:
		return 0, fmt.Errorf("read inode %d: negative offset %d", ino, off)
	case uint64(off) >= n.size:
		return 0, io.EOF
	}
	short := uint64(len(p)) > n.size-uint64(off)
	if short {
		p = p[:n.size-uint64(off)]
	}
	chunks := im.index.chunks[n.first : n.first+n.count]
	i := sort.Search(len(chunks), func(i int) bool { return chunks[i].end > uint64(off) })
	done := 0
	for pos := uint64(off); done < len(p); i++ {
		c := &chunks[i]
		start := uint64(0)
		if i > 0 {
			start = chunks[i-1].end
		}
		k := int(min(uint64(len(p)-done), c.end-pos))
		if err := im.readBlob(ctx, c.blob, p[done:done+k], c.off+(pos-start)); err != nil {
			return done, fmt.Errorf("read inode %d at %d: %w", ino, pos, err)
		}
		done += k
		pos += uint64(k)
	}
	if short {
		return done, io.EOF
	}
	return done, nil
}

// readBlob fills p from a blob's uncompressed content.
func (im *Image) readBlob(ctx context.Context, id uint32, p []byte, off uint64) error {
	b := &im.index.blobs[id]
	for len(p) > 0 {
		unit := uint64(0)
		if b.extent > unitSize {
			unit = off / unitSize
		}
		if unit > math.MaxUint32 {
			return fmt.Errorf("blob %s: offset %d: %w", b.digest, off, format.ErrTooLarge)
		}
		data, err := im.cache.get(ctx, unitKey{id, uint32(unit)}, func(ctx context.Context) ([]byte, error) {
			return im.loadUnit(ctx, b, unit*unitSize)
		})
		if err != nil {
			return fmt.Errorf("blob %s: %w", b.digest, err)
		}
		k := copy(p, data[off-unit*unitSize:])
		p = p[k:]
		off += uint64(k)
	}
	return nil
}

// loadUnit loads the unit of a blob that begins at start. Its length follows from the
// references to the blob, never from the blob: nothing is inflated past what files need.
func (im *Image) loadUnit(ctx context.Context, b *blob, start uint64) ([]byte, error) {
	want := int(min(b.extent-start, unitSize))
	stored, err := im.src.Size(b.digest)
	if err != nil {
		return nil, err
	}
	// Most blobs are one chunk, and one unit.
	if whole := int64(unitSize + unitSize/8); b.extent <= unitSize && stored <= whole {
		data, err := im.src.Get(ctx, b.digest, whole)
		if err != nil {
			return nil, err
		}
		if b.compressed {
			return im.inflate(data, want)
		}
		if len(data) < want {
			return nil, fmt.Errorf("%d bytes, files need %d: %w", len(data), want, format.ErrCorrupt)
		}
		return data[:want:want], nil
	}
	p := make([]byte, want)
	n := 0
	if b.compressed {
		n, err = im.readCompressedAt(ctx, b.digest, stored, p, int64(start))
	} else {
		n, err = im.src.ReadBlobAt(ctx, b.digest, p, int64(start))
	}
	if n < want {
		if err == nil || errors.Is(err, io.EOF) {
			err = fmt.Errorf("content ends at %d, files need %d bytes: %w", start+uint64(n), b.extent, format.ErrCorrupt)
		}
		return nil, err
	}
	return p, nil
}

// maxWindow bounds the window of a zstd stream, in bytes.
const maxWindow = 8 << 20

// inflate returns the first want bytes of a zstd stream, seekable or not.
func (im *Image) inflate(data []byte, want int) ([]byte, error) {
	d, ok := im.decoders.Get().(*zstd.Decoder)
	if !ok {
		var err error
		if d, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxWindow), zstd.WithDecoderLowmem(true)); err != nil {
			return nil, fmt.Errorf("make zstd decoder: %w", err)
		}
	}
	defer im.decoders.Put(d)
	p := make([]byte, want)
	err := d.Reset(bytes.NewReader(data))
	if err == nil {
		_, err = io.ReadFull(d, p)
	}
	// Let go of data. An error would be that of the stream again.
	_ = d.Reset(nil)
	if err != nil {
		return nil, fmt.Errorf("inflate the %d bytes that files need: %w: %w", want, err, format.ErrCorrupt)
	}
	return p, nil
}
