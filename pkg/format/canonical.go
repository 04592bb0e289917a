package format

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"math"
	"strconv"
)

// parseCanonical reads a manifest that is, byte for byte, in the form that Encode and the reference write:
// a manifest of a large image has tens of thousands of layers, for which encoding/json takes about as
// long as all else that is decoded for a mount. It returns nil for any other document, which says nothing about it.
func parseCanonical(b []byte) *Manifest {
	c := cursor{b}
	config := EmptyDescriptor()
	m := &Manifest{Config: config, SchemaVersion: 2}
	if !c.lit(`{"config":{"data":"e30=","digest":"`) || c.digest() != config.Digest ||
		!c.lit(`","mediaType":"`+MediaTypeEmpty+`","size":2},"layers":[{"annotations":{"`+AnnotationVerity+`":"`) {
		return nil
	}
	verity, ok := c.hex()
	rootfs := Descriptor{Annotations: map[string]string{AnnotationVerity: verity.Hex()}}
	if !ok || !c.lit(`"},`) || !c.rest(&rootfs) || rootfs.MediaType != MediaTypeRootfs {
		return nil
	}
	const least = len(`,{"digest":"sha256:","mediaType":"","size":0}`) + 64 + len(MediaTypeChunk)
	m.Layers = append(make([]Descriptor, 0, 1+len(c.b)/least), rootfs)
	for c.lit(`,{`) {
		var l Descriptor
		if !c.rest(&l) || l.MediaType == MediaTypeRootfs {
			return nil
		}
		m.Layers = append(m.Layers, l)
	}
	if !c.lit(canonicalEnd) || len(c.b) > 0 {
		return nil
	}
	return m
}

// encodeCanonical is CanonicalJSON for a manifest whose layers, but for the first, have no more than a digest,
// one of our media types and a size. It returns nil for any other.
func (m *Manifest) encodeCanonical() []byte {
	if len(m.Layers) == 0 {
		return nil
	}
	short := *m
	short.Layers = m.Layers[:1]
	b, err := CanonicalJSON(&short)
	if err != nil {
		return nil
	}
	b, ok := bytes.CutSuffix(b, []byte(canonicalEnd))
	if !ok || m.MediaType != "" {
		return nil
	}
	const most = len(`,{"digest":"","mediaType":"","size":}`) + len(DigestPrefix) + 64 + len(MediaTypeChunkZstd) + 20
	b = append(make([]byte, 0, len(b)+most*len(m.Layers)), b...)
	for i := range m.Layers[1:] {
		l := &m.Layers[1+i]
		if len(l.Annotations) > 0 || len(l.Data) > 0 || l.Platform != nil || l.MediaType != MediaTypeChunk && l.MediaType != MediaTypeChunkZstd {
			return nil
		}
		b = append(b, `,{"digest":"`+DigestPrefix...)
		b = hex.AppendEncode(b, l.Digest[:])
		b = append(append(b, `","mediaType":"`...), l.MediaType...)
		b = strconv.AppendInt(append(b, `","size":`...), l.Size, 10)
		b = append(b, '}')
	}
	return append(b, canonicalEnd...)
}

// canonicalEnd ends the manifests that the reference writes.
const canonicalEnd = `],"schemaVersion":2}`

// cursor is what is left to be read. Its methods return zero values, false, where something else is next.
type cursor struct{ b []byte }

// lit reads a text.
func (c *cursor) lit(s string) bool {
	rest, ok := bytes.CutPrefix(c.b, []byte(s))
	if ok {
		c.b = rest
	}
	return ok
}

// rest reads what a layer has behind its annotations. No digest and no size is zero.
func (c *cursor) rest(d *Descriptor) bool {
	if !c.lit(`"digest":"`) {
		return false
	}
	d.Digest = c.digest()
	if d.Digest.IsZero() || !c.lit(`","mediaType":"`) {
		return false
	}
	// The longer one first, which begins like the other.
	for _, t := range []string{MediaTypeChunkZstd, MediaTypeChunk, MediaTypeRootfs} {
		if c.lit(t) {
			d.MediaType = t
			break
		}
	}
	if d.MediaType == "" || !c.lit(`","size":`) {
		return false
	}
	d.Size = c.number()
	return d.Size > 0 && c.lit(`}`)
}

// digest reads a digest.
func (c *cursor) digest() Digest {
	if !c.lit(DigestPrefix) {
		return Digest{}
	}
	d, _ := c.hex()
	return d
}

// hex reads 64 lower-case hexadecimal digits.
func (c *cursor) hex() (d Digest, ok bool) {
	if len(c.b) < 2*len(d) {
		return Digest{}, false
	}
	for i := 0; i < len(d); i += 4 {
		word, ok := hex8(binary.LittleEndian.Uint64(c.b[2*i:]))
		if !ok {
			return Digest{}, false
		}
		binary.LittleEndian.PutUint32(d[i:], word)
	}
	c.b = c.b[2*len(d):]
	return d, true
}

// hex8 decodes 8 digits at once, a byte of x each, the first being the lowest, to 4 bytes in the same order.
func hex8(x uint64) (uint32, bool) {
	const each = 0x0101010101010101
	letter := x >> 6 & each // 1 for letters, as far as x has nothing but digits and letters
	v := x&(0x0f*each) + 9*letter
	// A letter is 10 to 15, a digit less, and what is made of the value again is what was there.
	if (v+6*each)>>4&each != letter || v&(0x10*each) != 0 || v+'0'*each+('a'-'0'-10)*letter != x {
		return 0, false
	}
	v = (v<<4 | v>>8) & 0x00ff00ff00ff00ff
	v = (v | v>>8) & 0x0000ffff0000ffff
	return uint32(v | v>>16), true
}

// number reads a positive number.
func (c *cursor) number() int64 {
	if len(c.b) == 0 || c.b[0] == '0' {
		return 0
	}
	var n int64
	i := 0
	for ; i < len(c.b) && c.b[i] >= '0' && c.b[i] <= '9'; i++ {
		if n > (math.MaxInt64-9)/10 {
			return 0
		}
		n = n*10 + int64(c.b[i]-'0')
	}
	c.b = c.b[i:]
	return n
}
