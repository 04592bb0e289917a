package verity

import (
	"crypto/sha256"
	"encoding/binary"
)

// lanes is how many blocks are hashed side by side where the CPU can.
const lanes = 16

// worthLanes is how many blocks there must be for that to be faster than one after the other. Sixteen take
// as long as seven do alone (Xeon with AVX-512 and SHA extensions).
const worthLanes = 8

// state is the state of SHA-256 in each lane: the variables a to h, of all lanes.
type state [8][lanes]uint32

// initial is a state before the first block of a message (FIPS 180-4, 5.3.3). It is a constant in all but
// syntax, as is lastBlock.
var initial = broadcast([8]uint32{
	0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
})

func broadcast(words [8]uint32) (s state) {
	for i := range s {
		for lane := range s[i] {
			s[i][lane] = words[i]
		}
	}
	return s
}

// lastBlock is what SHA-256 hashes after BlockSize bytes: a bit, and the number of bits before it
// (FIPS 180-4, 5.1.1).
var lastBlock = [sha256.BlockSize]byte{0: 0x80, 62: BlockSize * 8 >> 8}

// Fast reports whether Sum of what a blob has takes less time than its SHA-256, on this CPU. It never changes.
func Fast() bool { return hasLanes }

// sumBlocks writes the SHA-256 of each block of p to dst, one after the other. If the last block is short, zeros
// follow it. It needs no memory but the stack.
func sumBlocks(dst, p []byte) {
	var padded [BlockSize]byte
	for len(p) > 0 {
		n := min((len(p)+BlockSize-1)/BlockSize, lanes)
		if !hasLanes || n < worthLanes {
			n = 1
		}
		piece := p[:min(len(p), n*BlockSize)]
		p = p[len(piece):]
		short := piece[len(piece)/BlockSize*BlockSize:]
		copy(padded[:], short) // once at most
		switch {
		case n > 1:
			sumPiece(dst, piece, &padded)
		case len(short) > 0:
			sum := sha256.Sum256(padded[:])
			copy(dst, sum[:])
		default:
			sum := sha256.Sum256(piece)
			copy(dst, sum[:])
		}
		dst = dst[n*sha256.Size:]
	}
}

// sumPiece is sumBlocks for up to lanes blocks, of which padded is the last one if that is short.
func sumPiece(dst, p []byte, padded *[BlockSize]byte) {
	var streams [lanes]*byte
	for i := range streams {
		switch off := i * BlockSize; {
		case off+BlockSize <= len(p):
			streams[i] = &p[off]
		case off < len(p):
			streams[i] = &padded[0]
		default:
			streams[i] = &p[0] // to no purpose
		}
	}
	s := sumLanes(streams)
	for lane := range (len(p) + BlockSize - 1) / BlockSize {
		s.put(dst[lane*sha256.Size:], lane)
	}
}

// sumLanes returns the state after a block of each stream.
func sumLanes(streams [lanes]*byte) state {
	s := initial
	blocks16(&s, &streams, BlockSize/sha256.BlockSize)
	for i := range streams {
		streams[i] = &lastBlock[0]
	}
	blocks16(&s, &streams, 1)
	return s
}

// put writes the hash in a lane to the beginning of dst.
func (s *state) put(dst []byte, lane int) {
	for i := range s {
		binary.BigEndian.PutUint32(dst[4*i:], s[i][lane])
	}
}

// queue gathers blocks until there are enough to be hashed side by side. The zero queue is empty.
type queue struct {
	blocks [lanes]*[BlockSize]byte
	to     [lanes][]byte // where their hashes go
	n      int
}

// add adds a block whose hash goes to the beginning of to, not later than at the next flush. It must not change
// before.
func (q *queue) add(block *[BlockSize]byte, to []byte) {
	q.blocks[q.n], q.to[q.n] = block, to
	if q.n++; q.n == lanes {
		q.flush()
	}
}

// addAll adds the blocks of p, whose hashes go to dst, one after the other. If the last one is short, it is copied
// to padded, and zeros follow it. It returns what is left of dst.
func (q *queue) addAll(p, dst []byte, padded *[BlockSize]byte) []byte {
	for ; len(p) >= BlockSize; p = p[BlockSize:] {
		q.add((*[BlockSize]byte)(p), dst)
		dst = dst[sha256.Size:]
	}
	if len(p) > 0 {
		clear(padded[copy(padded[:], p):])
		q.add(padded, dst)
		dst = dst[sha256.Size:]
	}
	return dst
}

// flush hashes what is left.
func (q *queue) flush() {
	if hasLanes && q.n >= worthLanes {
		q.sideBySide()
	} else {
		for i := range q.n {
			sum := sha256.Sum256(q.blocks[i][:])
			copy(q.to[i], sum[:])
		}
	}
	q.n = 0
}

func (q *queue) sideBySide() {
	var streams [lanes]*byte
	for i := range streams {
		streams[i] = &q.blocks[0][0] // to no purpose in lanes that are left over
		if i < q.n {
			streams[i] = &q.blocks[i][0]
		}
	}
	s := sumLanes(streams)
	for lane := range q.n {
		s.put(q.to[lane], lane)
	}
}

// Summer computes the digests of several contents at once. Where [Fast] is true that takes less time than
// one after the other, because more of their blocks are hashed side by side. It has 128 KiB of memory. The
// zero Summer is ready to use, any number of times; it is not safe for concurrent use.
type Summer struct {
	queue queue
	// levels has the hashes of the blocks of each content, where they fit in a block, padded its last block if
	// that is short.
	levels, padded [lanes][BlockSize]byte
}

// Sum writes what [Sum] returns for contents[i] to sums[i].
func (s *Summer) Sum(sums []Digest, contents [][]byte) {
	for len(contents) > 0 {
		n := min(len(contents), lanes)
		s.sum(sums[:n], contents[:n])
		sums, contents = sums[n:], contents[n:]
	}
}

// sum is Sum for no more contents than there are lanes.
func (s *Summer) sum(sums []Digest, contents [][]byte) {
	for i, b := range contents {
		if len(b) > hashesPerBlock*BlockSize {
			continue
		}
		clear(s.queue.addAll(b, s.levels[i][:], &s.padded[i]))
	}
	s.queue.flush()
	for i, b := range contents {
		if len(b) > BlockSize && len(b) <= hashesPerBlock*BlockSize {
			s.queue.add(&s.levels[i], s.levels[i][:])
		}
	}
	s.queue.flush()
	for i, b := range contents {
		if len(b) > hashesPerBlock*BlockSize {
			sums[i] = Sum(b)
		} else {
			sums[i] = describe(uint64(len(b)), s.levels[i][:sha256.Size])
		}
	}
}
