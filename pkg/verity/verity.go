// Package verity knows fs-verity: the Merkle tree digest that the Linux kernel
// computes over a file, and the ioctls that seal a file and read the digest back.
//
// PuzzleFS uses one parameter set only: SHA-256, blocks of 4096 bytes, no salt, no
// signature. The digest is computed in user space by [Sum] and [Hash], so that it can
// be had on any file system; [Enable] and [Measure] need a kernel and a file system
// with fs-verity.
//
// How the digest is made (Linux, Documentation/filesystems/fsverity.rst):
//
//	data      | block 0 | block 1 | … | block n (zero-padded) |
//	level 0   SHA-256 of each data block, packed into blocks of 128 hashes, zero-padded
//	level 1   SHA-256 of each block of level 0, packed likewise
//	…         until one hash is left: the root hash (32 zero bytes for an empty file)
//	digest    SHA-256 of the 256-byte descriptor that holds data size and root hash
package verity

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// BlockSize is the size of data and Merkle tree blocks, in bytes.
const BlockSize = 4096

const (
	descriptorSize = 256
	hashesPerBlock = BlockSize / sha256.Size
	// maxLevels is enough for any 64-bit file size: 128^8 blocks of 4096 bytes.
	maxLevels = 8
)

// ErrInvalidDigest says that a text is not 64 lower-case hexadecimal digits.
var ErrInvalidDigest = errors.New("invalid fs-verity digest")

// Digest is the fs-verity digest of a file. It is not the SHA-256 of its content.
type Digest [sha256.Size]byte

// Parse parses 64 lower-case hexadecimal digits, as the PuzzleFS tools print them. It
// never returns the zero Digest without an error.
func Parse(s string) (Digest, error) {
	var d Digest
	if len(s) != hex.EncodedLen(len(d)) {
		return d, fmt.Errorf("parse %.100q: want 64 hex digits: %w", s, ErrInvalidDigest)
	}
	if _, err := hex.Decode(d[:], []byte(s)); err != nil || d.String() != s {
		return Digest{}, fmt.Errorf("parse %.100q: want 64 lower-case hex digits: %w", s, ErrInvalidDigest)
	}
	if d == (Digest{}) {
		// Nothing known has it, and it must not be taken for the absence of a digest.
		return d, fmt.Errorf("parse %q: only zeros name nothing: %w", s, ErrInvalidDigest)
	}
	return d, nil
}

// String returns the digest as 64 hexadecimal digits.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// Sum returns the digest that the kernel would give a file with content b.
func Sum(b []byte) Digest {
	if len(b) > hashesPerBlock*BlockSize {
		var h Hash
		_, _ = h.Write(b) // never fails
		return h.Digest()
	}
	// The hashes of all blocks fit in one.
	var level [BlockSize]byte
	sumBlocks(level[:], b)
	if len(b) <= BlockSize {
		return describe(uint64(len(b)), level[:sha256.Size])
	}
	root := sha256.Sum256(level[:])
	return describe(uint64(len(b)), root[:])
}

// SumReader returns the digest of everything that r yields.
func SumReader(r io.Reader) (Digest, error) {
	h := New()
	if _, err := io.CopyBuffer(h, r, make([]byte, 128<<10)); err != nil {
		return Digest{}, fmt.Errorf("compute fs-verity digest: %w", err)
	}
	return h.Digest(), nil
}

// Hash computes a digest from content written to it piece by piece. Its memory is
// constant, 37 KiB at most. The zero Hash is ready to use; it is not safe for concurrent use.
type Hash struct {
	block [BlockSize]byte // data not yet hashed
	n     int             // bytes in block
	size  uint64          // bytes written
	// levels[i] holds the hashes of level i that do not fill a block yet.
	levels [maxLevels][]byte
}

var _ io.Writer = (*Hash)(nil)

// New returns an empty Hash.
func New() *Hash { return new(Hash) }

// Write adds content. It never fails.
func (h *Hash) Write(p []byte) (int, error) {
	total := len(p)
	h.size += uint64(total)
	if h.n > 0 {
		k := copy(h.block[h.n:], p)
		h.n += k
		p = p[k:]
		if h.n < BlockSize {
			return total, nil
		}
		h.add(0, sha256.Sum256(h.block[:]))
		h.n = 0
	}
	whole := len(p) / BlockSize * BlockSize
	h.leaves(p[:whole])
	h.n = copy(h.block[:], p[whole:])
	return total, nil
}

// leaves adds whole data blocks.
func (h *Hash) leaves(p []byte) {
	var sums [lanes * sha256.Size]byte
	for len(p) > 0 {
		piece := p[:min(len(p), lanes*BlockSize)]
		p = p[len(piece):]
		sumBlocks(sums[:], piece)
		for i := range len(piece) / BlockSize {
			h.add(0, [sha256.Size]byte(sums[i*sha256.Size:]))
		}
	}
}

// add appends a hash to a level. A block that becomes full is hashed into the level above.
func (h *Hash) add(level int, sum [sha256.Size]byte) {
	if h.levels[level] == nil {
		h.levels[level] = make([]byte, 0, BlockSize)
	}
	h.levels[level] = append(h.levels[level], sum[:]...)
	if len(h.levels[level]) == BlockSize {
		h.add(level+1, sha256.Sum256(h.levels[level]))
		h.levels[level] = h.levels[level][:0]
	}
}

// Digest returns the digest of what was written. The Hash is spent afterwards.
func (h *Hash) Digest() Digest {
	if h.size == 0 {
		return describe(0, nil)
	}
	return describe(h.size, h.root())
}

// describe returns the digest of size bytes of content. The root hash of no content is not looked at.
func describe(size uint64, root []byte) Digest {
	var d [descriptorSize]byte
	d[0] = 1  // version
	d[1] = 1  // SHA-256
	d[2] = 12 // log2 of the block size
	binary.LittleEndian.PutUint64(d[8:], size)
	if size > 0 {
		copy(d[16:], root)
	}
	return sha256.Sum256(d[:])
}

// root pads and hashes the last block of each level until one hash is left.
func (h *Hash) root() []byte {
	if h.n > 0 {
		clear(h.block[h.n:])
		h.add(0, sha256.Sum256(h.block[:]))
	}
	level := 0
	for hashes := (h.size + BlockSize - 1) / BlockSize; hashes > 1; hashes = (hashes + hashesPerBlock - 1) / hashesPerBlock {
		if rest := h.levels[level]; len(rest) > 0 {
			padded := rest[:BlockSize]
			clear(padded[len(rest):])
			h.add(level+1, sha256.Sum256(padded))
		}
		level++
	}
	return h.levels[level][:sha256.Size]
}
