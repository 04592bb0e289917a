package format

import (
	"encoding/binary"
	"fmt"
)

// This file lays out a Cap'n Proto message word by word as the default builder of the Rust
// capnp crate does. The Go library places objects in another way that cannot be
// configured, and the digest of an image depends on the place of every word
// (docs/format.md, "Segment layout"). It decodes what is written here.

const (
	wordSize = 8
	// firstSegment is the size of the first segment in words. Each further one is as large
	// as all before it, or as what is to be stored in it if that is more.
	firstSegment = 1024
	maxSegment   = 1<<29 - 1
)

// message is a message under construction.
//
// Its segments lie in one piece of memory, the arena, one behind the other, with room for the table of
// segments before them: where each has what it was made for, which is nearly always, the message need not
// be copied to be complete.
//
//	arena:  table, reserved | segment 0 | segment 1 | … the last one, as far as the arena goes
type message struct {
	segments []segment
	next     int // size of the next segment in words
	words    int // capacity of all segments in words
	arena    []byte
	taken    int // bytes of the arena that segments have, or might
}

// segment is one segment: b holds the words in use, within the capacity size. The capacity of b may be less.
type segment struct {
	b     []byte
	size  int
	apart bool // b is not in the arena
}

// tableRoom is what is reserved for the table of segments, in bytes. As each segment is as large as all before
// it, a message with more than that is never made.
const tableRoom = 128

// used returns the number of words in use.
func (s *segment) used() int { return len(s.b) / wordSize }

// structSize is the size of a struct in words and pointers.
type structSize struct{ data, pointers int }

func (s structSize) words() int { return s.data + s.pointers }

// pointer is the place of a pointer, object the place of a struct.
type (
	pointer struct{ segment, word int }
	object  struct {
		segment, word int
		size          structSize
	}
	// list is the place of a list of structs.
	list struct{ first object }
)

func (o object) pointer(i int) pointer { return pointer{o.segment, o.word + o.size.data + i} }

func (l list) at(i int) object {
	o := l.first
	o.word += i * o.size.words()
	return o
}

// newMessage returns an empty message, for about so many words. Memory that is not needed is not touched.
func newMessage(words int) *message {
	m := &message{next: firstSegment, arena: make([]byte, tableRoom+wordSize*max(words, firstSegment)), taken: tableRoom}
	m.addSegment(0)
	return m
}

// addSegment adds a segment with room for at least need words.
func (m *message) addSegment(need int) {
	s := segment{size: max(need, m.next)}
	if left := m.arena[m.taken:]; len(left) >= need*wordSize {
		// What a segment does not get here, it may not need.
		n := min(s.size*wordSize, len(left))
		s.b = left[:0:n]
		m.taken += n
	} else {
		s.b, s.apart = make([]byte, 0, s.size*wordSize), true
	}
	m.segments = append(m.segments, s)
	m.words += s.size
	m.next = min(m.next+s.size, maxSegment)
}

// rootPointer reserves the first word of the message.
func (m *message) rootPointer() pointer {
	word, _ := m.reserve(0, 1)
	return pointer{0, word}
}

// reserve takes n zeroed words of a segment, if it has them.
func (m *message) reserve(seg, n int) (word int, ok bool) {
	s := &m.segments[seg]
	word = s.used()
	if n > s.size-word {
		return 0, false
	}
	end := (word + n) * wordSize
	if end > cap(s.b) {
		// The arena was too small. What is left of it nobody has touched.
		s.b, s.apart = append(make([]byte, 0, s.size*wordSize), s.b...), true
	}
	s.b = s.b[:end]
	return word, true
}

// structAt allocates a struct that p points at.
func (m *message) structAt(p pointer, size structSize) (object, error) {
	low := uint32(0)
	high := uint32(size.data) | uint32(size.pointers)<<16
	seg, word, err := m.allocate(p, size.words(), low, high)
	return object{seg, word, size}, err
}

// listAt allocates a list of n structs that p points at: a tag word, then the structs.
func (m *message) listAt(p pointer, n int, size structSize) (list, error) {
	words := n * size.words()
	if words > maxSegment-1 {
		return list{}, fmt.Errorf("list of %d elements: %w", n, ErrTooLarge)
	}
	seg, word, err := m.allocate(p, 1+words, 1, 7|uint32(words)<<3)
	if err != nil {
		return list{}, err
	}
	tag := uint64(n)<<2 | uint64(size.data)<<32 | uint64(size.pointers)<<48
	m.put(seg, word, tag)
	return list{object{seg, word + 1, size}}, nil
}

// dataAt allocates a copy of b that p points at. An empty b takes no words but still gets
// a pointer, which is how it differs from an absent one.
func (m *message) dataAt(p pointer, b []byte) error {
	if len(b) > maxSegment {
		return fmt.Errorf("data of %d bytes: %w", len(b), ErrTooLarge)
	}
	seg, word, err := m.allocate(p, (len(b)+wordSize-1)/wordSize, 1, 2|uint32(len(b))<<3)
	if err != nil {
		return err
	}
	copy(m.segments[seg].b[word*wordSize:], b)
	return nil
}

// allocate takes n words for an object and writes the pointer to it at p. kind and high
// are the lowest two bits and the upper half of that pointer.
//
// The object goes behind the pointer, in the same segment. Where that has no room it goes,
// behind a landing pad of one word, into the first segment that has, or a new one.
func (m *message) allocate(p pointer, n int, kind, high uint32) (seg, word int, err error) {
	if word, ok := m.reserve(p.segment, n); ok {
		m.put(p.segment, p.word, near(word-p.word-1, kind, high))
		return p.segment, word, nil
	}
	seg, pad, err := m.reserveAnywhere(n + 1)
	if err != nil {
		return 0, 0, err
	}
	m.put(p.segment, p.word, far(seg, pad))
	m.put(seg, pad, near(0, kind, high))
	return seg, pad + 1, nil
}

func (m *message) reserveAnywhere(n int) (seg, word int, err error) {
	for seg := range m.segments {
		if word, ok := m.reserve(seg, n); ok {
			return seg, word, nil
		}
	}
	if n > maxSegment || (m.words+n)*wordSize > 2*MaxRootfsSize { // the last segment may be half empty
		return 0, 0, fmt.Errorf("the message would be larger than %d bytes: %w", MaxRootfsSize, ErrTooLarge)
	}
	m.addSegment(n)
	seg = len(m.segments) - 1
	word, _ = m.reserve(seg, n)
	return seg, word, nil
}

// near encodes a struct or list pointer whose object begins offset words behind it.
func near(offset int, kind, high uint32) uint64 {
	return uint64(uint32(offset)<<2|kind) | uint64(high)<<32
}

// far encodes a pointer to a landing pad of one word.
func far(seg, pad int) uint64 {
	return uint64(uint32(pad)<<3|2) | uint64(seg)<<32
}

// put writes a word of a segment.
func (m *message) put(seg, word int, v uint64) {
	binary.LittleEndian.PutUint64(m.segments[seg].b[word*wordSize:], v)
}

// putUint64 writes word i of a struct's data.
func (m *message) putUint64(o object, i int, v uint64) { m.put(o.segment, o.word+i, v) }

// bytes returns the message with its segment table. The message must not be used any more.
func (m *message) bytes() []byte {
	table := (4 + 4*len(m.segments) + 7) / 8 * 8
	size := table
	apart := table > tableRoom
	for i := range m.segments {
		size += len(m.segments[i].b)
		apart = apart || m.segments[i].apart
	}
	b := m.arena[max(0, tableRoom-table):tableRoom]
	if apart {
		b = make([]byte, table, size)
	}
	binary.LittleEndian.PutUint32(b, uint32(len(m.segments)-1))
	for i := range m.segments {
		binary.LittleEndian.PutUint32(b[4+4*i:], uint32(m.segments[i].used()))
	}
	for i := range m.segments {
		b = append(b, m.segments[i].b...) // in the arena that closes the gap before it, if there is one
	}
	return b
}
