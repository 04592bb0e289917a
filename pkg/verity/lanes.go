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
// follow it.
func sumBlocks(dst, p []byte) {
	for len(p) > 0 {
		n := min((len(p)+BlockSize-1)/BlockSize, lanes)
		if !hasLanes || n < worthLanes {
			n = 1
		}
		piece := p[:min(len(p), n*BlockSize)]
		if n == 1 {
			sumOne(dst, piece)
		} else {
			sumLanes(dst, piece)
		}
		dst, p = dst[n*sha256.Size:], p[len(piece):]
	}
}

// sumOne writes the SHA-256 of a block that may be short.
func sumOne(dst, block []byte) {
	if len(block) < BlockSize {
		var padded [BlockSize]byte
		copy(padded[:], block)
		block = padded[:]
	}
	sum := sha256.Sum256(block)
	copy(dst, sum[:])
}

// sumLanes writes the SHA-256 of up to lanes blocks, of which the last may be short.
func sumLanes(dst, p []byte) {
	var padded [BlockSize]byte
	var streams [lanes]*byte
	n := 0
	for ; len(p) >= BlockSize; p = p[BlockSize:] {
		streams[n] = &p[0]
		n++
	}
	if len(p) > 0 {
		copy(padded[:], p)
		streams[n] = &padded[0]
		n++
	}
	for i := n; i < lanes; i++ {
		streams[i] = streams[0] // to no purpose
	}
	s := initial
	blocks16(&s, &streams, BlockSize/sha256.BlockSize)
	for i := range streams {
		streams[i] = &lastBlock[0]
	}
	blocks16(&s, &streams, 1)
	for lane := range n {
		for i := range s {
			binary.BigEndian.PutUint32(dst[lane*sha256.Size+4*i:], s[i][lane])
		}
	}
}
