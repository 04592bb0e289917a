package chunk

import (
	"crypto/md5" //nolint:gosec // the gear table is defined by MD5; nothing is protected by it
	"encoding/binary"
	"errors"
	"io"
)

// Sizes of canonical chunks, in bytes.
const (
	MinSize     = 16 << 10
	AverageSize = 64 << 10
	MaxSize     = 256 << 10
)

// The masks of FastCDC 2020 for 16 bits and normalization level 1: below the average size
// one bit more must match than the size asks for, above it one bit less.
const (
	maskSmall = 0x0000d90703537000 // 17 bits
	maskLarge = 0x0000d90f03530000 // 15 bits
)

// gear is the table of the rolling hash, gearShifted the same shifted left by one, as the
// first byte of each pair needs it. Both are constants in all but syntax.
var gear, gearShifted = gearTables()

// gearTables computes the table: entry i is the first 8 bytes, big-endian, of the MD5 of
// 64 bytes of value i.
func gearTables() (table, shifted [256]uint64) {
	for i := range table {
		var block [64]byte
		for k := range block {
			block[k] = byte(i)
		}
		sum := md5.Sum(block[:]) //nolint:gosec // see the import
		table[i] = binary.BigEndian.Uint64(sum[:])
		shifted[i] = table[i] << 1
	}
	return table, shifted
}

// Cut returns the length of the canonical chunk that buf begins with. buf must hold at
// least MaxSize bytes, or all that is left of the stream. The result is 0 only for an
// empty buf.
func Cut(buf []byte) int {
	if len(buf) <= MinSize {
		return len(buf)
	}
	limit := min(len(buf), MaxSize)
	centre := min(len(buf), AverageSize) &^ 1
	var h uint64
	n, h := scan(buf[MinSize:centre], h, maskSmall)
	if n >= 0 {
		return MinSize + n
	}
	if n, _ = scan(buf[centre:limit&^1], h, maskLarge); n >= 0 {
		return centre + n
	}
	return limit
}

// scan looks for the first byte of p, an even number of bytes, at which the hash matches
// the mask, and returns its index or -1, and the hash after p. Bytes are taken in pairs:
// the first of a pair is weighed one bit further left, which is the same as shifting the
// hash by one for every byte, but costs one shift a pair.
//
// The first loop only finds out whether one of sixteen bytes matches, the second which. So
// there is one check of bounds for sixteen bytes, and one way out of the loop, which leaves
// all registers to the four hashes of a step. What bounds the speed is the number of
// instructions: nearly five a byte.
func scan(p []byte, h, mask uint64) (int, uint64) {
	first := mask << 1
	i := 0
	for ; i+16 <= len(p); i += 16 {
		v := (*[16]byte)(p[i:])
		a, b, c, d := roll(h, (*[4]byte)(v[0:]))
		if a&first == 0 || b&mask == 0 || c&first == 0 || d&mask == 0 {
			break
		}
		if a, b, c, d = roll(d, (*[4]byte)(v[4:])); a&first == 0 || b&mask == 0 || c&first == 0 || d&mask == 0 {
			break
		}
		if a, b, c, d = roll(d, (*[4]byte)(v[8:])); a&first == 0 || b&mask == 0 || c&first == 0 || d&mask == 0 {
			break
		}
		if a, b, c, d = roll(d, (*[4]byte)(v[12:])); a&first == 0 || b&mask == 0 || c&first == 0 || d&mask == 0 {
			break
		}
		h = d
	}
	for ; i+1 < len(p); i += 2 {
		h = h<<2 + gearShifted[p[i]]
		if h&first == 0 {
			return i, h
		}
		h += gear[p[i+1]]
		if h&mask == 0 {
			return i + 1, h
		}
	}
	return -1, h
}

// roll returns the hash after each of two pairs of bytes that follow h: a and c after the
// first byte of a pair, b and d after the second. Adding the two table entries of a pair
// before the hash is needed leaves one instruction a pair that waits for the pair before.
func roll(h uint64, v *[4]byte) (a, b, c, d uint64) {
	x, y := gearShifted[v[0]], gearShifted[v[2]]
	a, b = h<<2+x, h<<2+(x+gear[v[1]])
	c, d = b<<2+y, b<<2+(y+gear[v[3]])
	return a, b, c, d
}

// canonical reads its stream through a buffer and cuts from the front of it.
type canonical struct {
	r          io.Reader
	buf        []byte
	start, end int // the unread part of buf
	ahead      int // how much of buf the next fill uses
	err        error
}

func newCanonical(r io.Reader) *canonical {
	// The larger the buffer, the fewer bytes are moved when it is refilled, but what was read should
	// still be in the processor's own cache when it is cut. Who wants a few chunks only has not much
	// more read than those.
	return &canonical{r: r, buf: make([]byte, 4*MaxSize), ahead: MaxSize}
}

// Next implements Chunker.
func (c *canonical) Next(dst []byte) ([]byte, error) {
	if err := c.fill(); err != nil {
		return dst, err
	}
	n := Cut(c.buf[c.start:c.end])
	if n == 0 {
		return dst, io.EOF
	}
	dst = append(dst, c.buf[c.start:c.start+n]...)
	c.start += n
	return dst, nil
}

// Reset implements Chunker.
func (c *canonical) Reset(r io.Reader) error {
	*c = canonical{r: r, buf: c.buf, ahead: MaxSize}
	return nil
}

// fill sees to it that the buffer holds MaxSize bytes or the rest of the stream, because
// a cut must never depend on how the stream was read. For the same reason an error waits
// until fewer than MaxSize bytes are left before it.
func (c *canonical) fill() error {
	if c.end-c.start >= MaxSize || errors.Is(c.err, io.EOF) {
		return nil
	}
	if c.err != nil {
		return c.err
	}
	c.end = copy(c.buf, c.buf[c.start:c.end])
	c.start = 0
	for c.end < c.ahead && c.err == nil {
		var n int
		n, c.err = c.r.Read(c.buf[c.end:c.ahead])
		c.end += n
	}
	c.ahead = min(2*c.ahead, len(c.buf))
	if c.end-c.start < MaxSize && c.err != nil && !errors.Is(c.err, io.EOF) {
		return c.err
	}
	return nil
}
