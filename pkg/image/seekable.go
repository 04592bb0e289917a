package image

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	seekable "github.com/SaveTheRbtz/zstd-seekable-format-go/pkg"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

const (
	// maxTable bounds how large a seek table may be, in bytes: two million frames.
	maxTable = 16 << 20
	// maxTableFrames bounds the frames of all tables that are kept, at 40 bytes each. The
	// newest is kept whatever it has.
	maxTableFrames = 1 << 20
	// maxSpan bounds what is read and inflated for one unit, in bytes: the unit and the
	// frames that it begins and ends in.
	maxSpan = 16 << 20
)

// seekTables keeps the seek tables of the compressed blobs that were read from the middle.
type seekTables struct {
	mu     sync.Mutex // guards what follows
	tables map[format.Digest]*seekable.SeekTable
	order  []format.Digest // oldest first
	frames int64           // of all tables
}

func newSeekTables() *seekTables {
	return &seekTables{tables: make(map[format.Digest]*seekable.SeekTable)}
}

// get returns the table of a blob of the given stored size.
func (t *seekTables) get(ctx context.Context, src Source, d format.Digest, stored int64) (*seekable.SeekTable, error) {
	t.mu.Lock()
	table, ok := t.tables[d]
	t.mu.Unlock()
	if ok {
		return table, nil
	}
	table, err := readSeekTable(ctx, src, d, stored)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if table, ok := t.tables[d]; ok {
		return table, nil // read by somebody else meanwhile
	}
	t.tables[d] = table
	t.order = append(t.order, d)
	t.frames += table.NumFrames()
	for len(t.order) > 1 && t.frames > maxTableFrames {
		oldest := t.order[0]
		t.frames -= t.tables[oldest].NumFrames()
		delete(t.tables, oldest)
		t.order = t.order[1:]
	}
	return table, nil
}

// readSeekTable reads the table at the end of a blob:
//
//	skippable frame header (8) | entries (8 each, 12 with checksums) | number of entries (4) | descriptor (1) | magic number (4)
func readSeekTable(ctx context.Context, src Source, d format.Digest, stored int64) (*seekable.SeekTable, error) {
	const header, footer, magic, checksums = 8, 9, 0x8f92eab1, 0x80
	noTable := func(why string) error {
		return fmt.Errorf("a compressed blob of %d bytes needs a seek table (%s): rebuild the image: %w", stored, why, format.ErrCorrupt)
	}
	var f [footer]byte
	if stored < header+footer {
		return nil, noTable("too short")
	}
	if err := readFull(ctx, src, d, f[:], stored-footer); err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint32(f[5:]) != magic {
		return nil, noTable("none found")
	}
	entry := int64(8)
	if f[4]&checksums != 0 {
		entry = 12
	}
	size := header + entry*int64(binary.LittleEndian.Uint32(f[:])) + footer
	if size > min(stored, maxTable) {
		return nil, noTable(fmt.Sprintf("it claims %d bytes", size))
	}
	b := make([]byte, size)
	if err := readFull(ctx, src, d, b, stored-size); err != nil {
		return nil, err
	}
	table, err := seekable.NewSeekTable(b)
	if err != nil {
		return nil, noTable(err.Error())
	}
	return table, nil
}

// readCompressedAt reads uncompressed content of a large compressed blob: it fetches and
// inflates the frames that hold it. It returns less than len(p) only with an error.
func (im *Image) readCompressedAt(ctx context.Context, d format.Digest, stored int64, p []byte, off int64) (int, error) {
	table, err := im.tables.get(ctx, im.src, d, stored)
	if err != nil {
		return 0, err
	}
	first, ok := table.EntryByDecompressedOffset(uint64(off))
	last, okLast := table.EntryByDecompressedOffset(uint64(off) + uint64(len(p)) - 1)
	if !ok || !okLast {
		return 0, io.EOF
	}
	skip := uint64(off) - first.DecompressedOffset
	compressed := last.CompressedOffset + uint64(last.CompressedSize) - first.CompressedOffset
	if skip > maxSpan || compressed > maxSpan {
		return 0, fmt.Errorf("frames of %d bytes, at most %d are inflated: %w", max(skip, compressed), maxSpan, format.ErrTooLarge)
	}
	b := make([]byte, compressed)
	if err := readFull(ctx, im.src, d, b, int64(first.CompressedOffset)); err != nil {
		return 0, err
	}
	content := make([]byte, int(skip)+len(p))
	if err := im.inflate(b, content); err != nil {
		return 0, err
	}
	return copy(p, content[skip:]), nil
}

// readFull fills p from a blob that must be long enough.
func readFull(ctx context.Context, src Source, d format.Digest, p []byte, off int64) error {
	n, err := src.ReadBlobAt(ctx, d, p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = fmt.Errorf("blob ends at %d: %w", off+int64(n), format.ErrCorrupt)
	}
	return err
}
