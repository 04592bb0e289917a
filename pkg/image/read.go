package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sort"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
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
	// It is filled from its beginning on, so what is behind a piece may be overwritten, but not more.
	p = p[:len(p):len(p)]
	short := uint64(len(p)) > n.size-uint64(off)
	if short {
		p = p[:n.size-uint64(off)]
	}
	chunks := im.index.chunks[n.first : n.first+n.count]
	i := sort.Search(len(chunks), func(i int) bool { return chunks[i].end > uint64(off) })
	done := 0
	var rest wholeBlobs
	for pos := uint64(off); done < len(p); i++ {
		c := &chunks[i]
		start := uint64(0)
		if i > 0 {
			start = chunks[i-1].end
		}
		k := int(min(uint64(len(p)-done), c.end-pos))
		if part := p[done : done+k]; !im.leave(&rest, c.blob, part, c.off+(pos-start), done) {
			if err := im.readBlob(ctx, c.blob, part, c.off+(pos-start), len(p) >= throughMin); err != nil {
				return rest.before(done), fmt.Errorf("read inode %d at %d: %w", ino, pos, err)
			}
		}
		done += k
		pos += uint64(k)
	}
	if err := im.readRest(ctx, &rest); err != nil {
		return rest.before(done), fmt.Errorf("read inode %d at %d: %w", ino, off, err)
	}
	if short {
		return done, io.EOF
	}
	return done, nil
}

// wholeBlobs are blobs of which a reader wants all content. They are left to the end, to be read together.
type wholeBlobs struct {
	reads      []store.WholeRead // raw ones
	compressed []wholeUnit
	first      int // where the first one stands in what the reader wants
}

// wholeUnit is a compressed blob that is one unit, and where its content goes.
type wholeUnit struct {
	blob *blob
	into []byte
}

// before returns how much is read: all before the first that was left.
func (w *wholeBlobs) before(done int) int {
	if len(w.reads)+len(w.compressed) > 0 {
		return w.first
	}
	return done
}

// leave adds a blob to those that are read together, if p wants all of one that is not in the cache.
func (im *Image) leave(rest *wholeBlobs, id uint32, p []byte, off uint64, done int) bool {
	b := &im.index.blobs[id]
	if off > 0 || b.extent != uint64(len(p)) || len(p) < wholeMin || len(p) > unitSize || im.cache.has(im.cacheKey(unitKey{blob: id})) {
		return false
	}
	if len(rest.reads)+len(rest.compressed) == 0 {
		rest.first = done
	}
	if b.compressed {
		rest.compressed = append(rest.compressed, wholeUnit{b, p})
	} else {
		rest.reads = append(rest.reads, im.wholeRead(b, p))
	}
	return true
}

// readRest reads the blobs that were left.
func (im *Image) readRest(ctx context.Context, rest *wholeBlobs) error {
	if err := im.inflateAll(ctx, rest.compressed); err != nil {
		return err
	}
	err := im.fillAll(ctx, rest.reads)
	if !errors.Is(err, store.ErrTooLarge) {
		return err
	}
	// A large blob of which this image needs little is among them.
	for i := range rest.reads {
		r := &rest.reads[i]
		if err := im.fillUnit(ctx, &blob{digest: r.Blob.Digest, extent: uint64(len(r.Into))}, r.Into, 0); err != nil {
			return fmt.Errorf("blob %s: %w", r.Blob.Digest, err)
		}
	}
	return nil
}

// inflateAll reads compressed blobs, as many together as there is memory for.
func (im *Image) inflateAll(ctx context.Context, units []wholeUnit) error {
	if len(units) == 0 {
		return nil
	}
	buf := im.getStored()
	defer im.stored.Put(buf)
	for len(units) > 0 {
		var reads []store.WholeRead
		for room := buf[:]; len(reads) < len(units); {
			u := units[len(reads)]
			n := len(u.into) + len(u.into)/8
			if n > len(room) {
				break
			}
			reads = append(reads, im.wholeRead(u.blob, room[:n]))
			room = room[n:]
		}
		if err := im.inflateSome(ctx, units[:len(reads)], reads); err != nil {
			return err
		}
		units = units[len(reads):]
	}
	return nil
}

// inflateSome reads compressed blobs together.
func (im *Image) inflateSome(ctx context.Context, units []wholeUnit, reads []store.WholeRead) error {
	err := im.src.ReadWhole(ctx, reads)
	large := errors.Is(err, store.ErrTooLarge)
	if err != nil && !large {
		return err
	}
	for i, u := range units {
		// What the decoder writes behind it may be there already.
		into := u.into[:len(u.into):min(cap(u.into), len(u.into)+inflateMargin)]
		var behind [inflateMargin]byte
		copy(behind[:], into[len(into):cap(into)])
		if large {
			err = im.fillUnit(ctx, u.blob, into, 0)
		} else {
			err = im.inflate(reads[i].Into[:reads[i].N], into)
		}
		copy(into[len(into):cap(into)], behind[:])
		if err != nil {
			return fmt.Errorf("blob %s: %w", u.blob.digest, err)
		}
	}
	return nil
}

// getStored returns a buffer for what is stored of a unit.
func (im *Image) getStored() *[storedMax]byte {
	if buf, ok := im.stored.Get().(*[storedMax]byte); ok {
		return buf
	}
	return new([storedMax]byte)
}

// readBlob fills p from a blob's uncompressed content. through says that the reader goes through a large file.
func (im *Image) readBlob(ctx context.Context, id uint32, p []byte, off uint64, through bool) error {
	b := &im.index.blobs[id]
	for len(p) > 0 {
		unit := uint64(0)
		if b.extent > unitSize {
			unit = off / unitSize
		}
		if unit > math.MaxUint32 {
			return fmt.Errorf("blob %s: offset %d: %w", b.digest, off, format.ErrTooLarge)
		}
		k, err := im.readUnit(ctx, unitKey{id, uint32(unit)}, p, off-unit*unitSize, through)
		if err != nil {
			return fmt.Errorf("blob %s: %w", b.digest, err)
		}
		p = p[k:]
		off += uint64(k)
	}
	return nil
}

// wholeMin is how much content, in bytes, must be wanted in one piece for it to go around the
// cache. Who reads so much goes through large files, whose content the kernel keeps; in the
// cache it would take the place of what readers of small files need again, and cost the
// copying.
const wholeMin = 32 << 10

// throughMin is how much content, in bytes, a reader wants at once who goes through a large file: as much as
// kernels read ahead, where nobody asks for more.
const throughMin = 128 << 10

// readUnit copies from a unit, beginning at off, and returns how much.
func (im *Image) readUnit(ctx context.Context, key unitKey, p []byte, off uint64, through bool) (int, error) {
	b := &im.index.blobs[key.blob]
	start := uint64(key.unit) * unitSize
	name := im.cacheKey(key)
	if n := b.unitLength(start); off == 0 && n >= wholeMin && n <= len(p) && !im.cache.has(name) {
		return n, im.fillUnit(ctx, b, p[:n], start)
	}
	if !through {
		data, err := im.unit(ctx, key, name)
		if err != nil {
			return 0, err
		}
		return copy(p, data[off:]), nil
	}
	// Several requests of this reader are under way: there is no need to load what comes next, too.
	data, err := im.loadCached(ctx, key, name, false)
	if err != nil {
		return 0, err
	}
	n := copy(p, data[off:])
	im.cache.passed(name, n)
	return n, nil
}

// unitKey names a unit of a blob's uncompressed content within an image.
type unitKey struct{ blob, unit uint32 }

// pack returns the key as one number.
func (k unitKey) pack() uint64 { return uint64(k.blob)<<32 | uint64(k.unit) }

// unitLength returns how much of the unit that begins at start files need, in bytes.
func (b *blob) unitLength(start uint64) int { return int(min(b.extent-start, unitSize)) }

// unit returns a unit from the cache, where it has that name, or the Source. Blobs are numbered in the order in
// which they were built, which is that of directories and their files. Where the unit
// before this one was the last to be loaded, the reader goes through the image in that
// order, and the next unit is loaded at the same time, on another CPU.
func (im *Image) unit(ctx context.Context, key unitKey, name cacheKey) ([]byte, error) {
	if data, ok := im.cache.peek(name); ok {
		return data, nil
	}
	next, ok := im.following(key)
	if !ok || im.lastLoad.Swap(key.pack()) != im.before(key) {
		return im.loadCached(ctx, key, name, true)
	}
	im.lastLoad.Store(next.pack())
	var ahead sync.WaitGroup
	// What goes wrong with it is told to whoever reads it.
	ahead.Go(func() { _, _ = im.loadCached(ctx, next, im.cacheKey(next), true) })
	data, err := im.loadCached(ctx, key, name, true)
	ahead.Wait()
	return data, err
}

func (im *Image) loadCached(ctx context.Context, key unitKey, name cacheKey, small bool) ([]byte, error) {
	return im.cache.get(ctx, name, small, func(ctx context.Context) ([]byte, error) {
		return im.loadUnit(ctx, &im.index.blobs[key.blob], uint64(key.unit)*unitSize)
	})
}

// cacheKey returns the name that all images have for the unit.
func (im *Image) cacheKey(key unitKey) cacheKey {
	b := &im.index.blobs[key.blob]
	return cacheKey{blob: b.digest, verity: im.verityOf(b.digest), unit: key.unit, length: uint32(b.unitLength(uint64(key.unit) * unitSize)), compressed: b.compressed}
}

// following returns the unit after key in the order of the image.
func (im *Image) following(key unitKey) (unitKey, bool) {
	if (uint64(key.unit)+1)*unitSize < im.index.blobs[key.blob].extent {
		return unitKey{key.blob, key.unit + 1}, true
	}
	return unitKey{key.blob + 1, 0}, int(key.blob)+1 < len(im.index.blobs)
}

// before returns the unit before key, packed. No unit is before the first.
func (im *Image) before(key unitKey) uint64 {
	switch {
	case key.unit > 0:
		return unitKey{key.blob, key.unit - 1}.pack()
	case key.blob > 0:
		last := (im.index.blobs[key.blob-1].extent - 1) / unitSize
		return unitKey{key.blob - 1, uint32(last)}.pack()
	}
	return math.MaxUint64
}

// loadUnit loads the unit of a blob that begins at start. Its length follows from the
// references to the blob, never from the blob: nothing is inflated past what files need.
func (im *Image) loadUnit(ctx context.Context, b *blob, start uint64) ([]byte, error) {
	n := b.unitLength(start)
	p := make([]byte, n, n+inflateMargin)
	if !b.compressed {
		p = p[:n:n]
	}
	if err := im.fillUnit(ctx, b, p, start); err != nil {
		return nil, err
	}
	return p, nil
}

// fillUnit reads the unit of a blob that begins at start into p, which has the unit's length. What p has of
// capacity beyond may be overwritten.
func (im *Image) fillUnit(ctx context.Context, b *blob, p []byte, start uint64) error {
	if b.extent <= unitSize {
		// Most blobs are one chunk, and one unit.
		err := im.fillWhole(ctx, b, p)
		if !errors.Is(err, store.ErrTooLarge) {
			return err
		}
		// A large blob of which this image needs little.
	}
	n, err := im.readPart(ctx, b, p, int64(start))
	if n < len(p) {
		if err == nil || errors.Is(err, io.EOF) {
			err = tooShort(start+uint64(n), b.extent)
		}
		return err
	}
	return nil
}

// storedMax bounds a blob that is read whole for a unit of content, in bytes: what does not become smaller by
// compression becomes little larger.
const storedMax = unitSize + unitSize/8

// fillWhole reads all of a blob's content into p. It fails with store.ErrTooLarge if there is more.
func (im *Image) fillWhole(ctx context.Context, b *blob, p []byte) error {
	if !b.compressed {
		return im.fillAll(ctx, []store.WholeRead{im.wholeRead(b, p)})
	}
	buf := im.getStored()
	defer im.stored.Put(buf)
	reads := []store.WholeRead{im.wholeRead(b, buf[:])}
	if err := im.src.ReadWhole(ctx, reads); err != nil {
		return err
	}
	return im.inflate(buf[:reads[0].N], p)
}

func (im *Image) wholeRead(b *blob, into []byte) store.WholeRead {
	return store.WholeRead{Blob: format.VerityData{Digest: b.digest, Verity: im.verityOf(b.digest)}, Into: into}
}

// fillAll reads raw blobs of which all content is wanted. It fails with store.ErrTooLarge if one has more.
func (im *Image) fillAll(ctx context.Context, reads []store.WholeRead) error {
	if err := im.src.ReadWhole(ctx, reads); err != nil {
		return err
	}
	for i := range reads {
		if r := &reads[i]; r.N < len(r.Into) {
			return tooShort(uint64(r.N), uint64(len(r.Into)))
		}
	}
	return nil
}

// verityOf returns the fs-verity digest that the image has for a blob, or zeros for none.
func (im *Image) verityOf(d format.Digest) [32]byte {
	i, ok := slices.BinarySearchFunc(im.index.sealed, d, func(v format.VerityData, d format.Digest) int { return bytes.Compare(v.Digest[:], d[:]) })
	if !ok {
		return [32]byte{}
	}
	return im.index.sealed[i].Verity
}

func tooShort(end, needed uint64) error {
	return fmt.Errorf("content ends at %d, files need %d bytes: %w", end, needed, format.ErrCorrupt)
}

// readPart reads from the middle of a blob's content, as io.ReaderAt does.
func (im *Image) readPart(ctx context.Context, b *blob, p []byte, off int64) (int, error) {
	if !b.compressed {
		return im.src.ReadBlobAt(ctx, b.digest, p, off)
	}
	stored, err := im.src.Size(b.digest)
	if err != nil {
		return 0, err
	}
	return im.readCompressedAt(ctx, b.digest, stored, p, off)
}

// maxWindow bounds the window of a zstd stream, in bytes.
const maxWindow = 8 << 20

// inflateMargin is how many bytes there should be behind what is inflated: the decoder is faster if it may
// write there.
const inflateMargin = 64

// inflate fills p with the beginning of a zstd stream, seekable or not. What p has of capacity beyond may be
// overwritten; no more is inflated.
func (im *Image) inflate(data, p []byte) error {
	d, ok := im.decoders.Get().(*zstd.Decoder)
	if !ok {
		var err error
		d, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxWindow),
			zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return fmt.Errorf("make zstd decoder: %w", err)
		}
	}
	defer im.decoders.Put(d)
	// In one go, which is faster, if p is all that there is.
	all, err := d.DecodeAll(data, p[:0])
	if err != nil || len(all) < len(p) {
		if err = d.Reset(bytes.NewReader(data)); err == nil {
			_, err = io.ReadFull(d, p)
		}
		// Let go of data. An error would be that of the stream again.
		_ = d.Reset(nil)
	}
	if err != nil {
		return fmt.Errorf("inflate the %d bytes that files need: %w: %w", len(p), err, format.ErrCorrupt)
	}
	return nil
}
