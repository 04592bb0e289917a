package chunk

import "io"

// Gear returns the table of the rolling hash.
func Gear() [256]uint64 { return gear }

// NewParallelBlocks is NewParallel with blocks of another size, and with one cutter, too.
func NewParallelBlocks(r io.Reader, cutters, size int) ParallelChunker {
	return newParallel(r, cutters, size)
}

// Alone returns how many bytes Next had to cut itself.
func Alone(c ParallelChunker) int64 {
	p, ok := c.(*parallel)
	if !ok {
		panic("chunk: it does not cut in parallel")
	}
	return p.alone
}
