package chunk

import (
	"errors"
	"io"
	"slices"
	"sync"
)

// How a stream is divided for cutting in parallel, in bytes.
const (
	// blockSize is how much one cutter cuts at a time. About 190 KiB of each block are cut twice,
	// so the longer the better; memory is what speaks against it.
	blockSize = 2 << 20
	// MaxCutters bounds the number of cutters, and with it the memory. More of them would wait for
	// the one goroutine that reads.
	MaxCutters = 8
)

// ErrClosed says that a Chunker was used after Close.
var ErrClosed = errors.New("chunker is closed")

// ParallelChunker is a Chunker that may have goroutines of its own. One of them reads the stream,
// ahead of what Next returns.
type ParallelChunker interface {
	Chunker
	// Close ends the goroutines and waits for them, and so for a Read that is under way: where that
	// could take long, make the reader return first. A Chunker that was not closed keeps them until
	// the stream has ended or failed and all of it was returned. Next fails with ErrClosed
	// after Close, until Reset. Close may be called again.
	Close()
}

// NewParallel returns a Chunker over r that finds the same chunks as that of New, and cuts with so
// many goroutines, at most [MaxCutters], besides the one that reads. With fewer than two, or where a cannot
// cut in parallel (jotfs), it has no goroutines and is as that of New. Memory is 2.25 MiB for each cutter
// and 4.5 MiB, as far as the stream is that long.
func (a Algorithm) NewParallel(r io.Reader, cutters int) (ParallelChunker, error) {
	if cutters < 2 || a.jotfsAverage != 0 {
		c, err := a.New(r)
		if err != nil {
			return nil, err
		}
		return &serial{Chunker: c}, nil
	}
	return newParallel(r, min(cutters, MaxCutters), blockSize), nil
}

// serial is a ParallelChunker without goroutines.
type serial struct {
	Chunker
	closed bool
}

// Next implements Chunker.
func (s *serial) Next(dst []byte) ([]byte, error) {
	if s.closed {
		return dst, ErrClosed
	}
	return s.Chunker.Next(dst)
}

// Reset implements Chunker.
func (s *serial) Reset(r io.Reader) error {
	s.closed = false
	return s.Chunker.Reset(r)
}

// Close implements ParallelChunker.
func (s *serial) Close() { s.closed = true }

// parallel cuts by speculation. A reader fills blocks; cutters cut each as if a chunk began at its first
// byte, and note the ends of chunks that depend on nothing outside the block; Next, which alone knows where
// chunks begin, cuts until it meets one of those ends, and from there on takes the cutter's word:
//
//	          block k                              block k+1
//	cutters   |----|-------|---|------|-----|......|--------|----|------|---
//	Next      ---|------|------|------|-----|---------|----------|------|---
//	          cut by Next       taken         cut by Next          taken
//
// It relies on a chunk depending on nothing but its own bytes and the byte behind them. Two who began to
// cut at different places mostly meet after two chunks. Where they never do, as in constant bytes, all is
// cut by Next, which is right and no faster than without the others.
//
// A block goes from reader to cutter to Next and back to the reader. There are two more blocks than cutters, one
// to be read into and one for Next, and no queue is shorter than that: only for a free block does anybody wait
// who might have to be stopped.
type parallel struct {
	r       io.Reader
	cutters int
	size    int      // of a block, in bytes
	blocks  []*block // all there are
	run     *run     // nil before the first Next
	closed  bool

	// The following belongs to Next. Positions are in the stream.
	cur *block // has the byte at pos, nil at first
	pos int64  // of the next chunk
	// ends are those that are known of the chunks from pos on.
	ends []int64
	// carried is the room for ends that are known from a block which was given back.
	carried []int64
	// alone counts the bytes that Next had to cut itself.
	alone int64
}

// block is a part of the stream.
type block struct {
	// buf has, from MaxSize on, the n bytes of the stream from start on. The room before is for
	// what is left of the block before, so that a chunk across the border is in one piece.
	buf   []byte
	start int64
	n     int
	err   error // of the reader, behind the n bytes
	// done is closed when ends is set: where chunks begin that do so in the block or at its end, if one
	// begins at start, in ascending order and beginning with start.
	done chan struct{}
	ends []int64
}

// run is what reads one stream.
type run struct {
	free  chan *block // to the reader
	work  chan *block // to the cutters
	order chan *block // the same blocks, to Next
	stop  chan struct{}
	wg    sync.WaitGroup
}

func newParallel(r io.Reader, cutters, size int) *parallel {
	p := &parallel{r: r, cutters: cutters, size: size, blocks: make([]*block, cutters+2)}
	for i := range p.blocks {
		p.blocks[i] = new(block)
	}
	return p
}

// Next implements Chunker.
func (p *parallel) Next(dst []byte) ([]byte, error) {
	if p.closed {
		return dst, ErrClosed
	}
	if p.run == nil {
		p.run = p.start()
	}
	if err := p.fill(); err != nil {
		return dst, err
	}
	rest := p.cur.from(p.pos)
	n := p.next(rest)
	if n == 0 {
		return dst, io.EOF
	}
	p.pos += int64(n)
	return append(dst, rest[:n]...), nil
}

// Reset implements Chunker.
func (p *parallel) Reset(r io.Reader) error {
	p.Close()
	*p = parallel{r: r, cutters: p.cutters, size: p.size, blocks: p.blocks, carried: p.carried}
	return nil
}

// Close implements ParallelChunker.
func (p *parallel) Close() {
	p.closed = true
	if p.run != nil {
		close(p.run.stop)
		p.run.wg.Wait()
		p.run = nil
	}
}

// fill sees to it that cur has MaxSize bytes from pos on or the rest of the stream, and fails as that
// of canonical does.
func (p *parallel) fill() error {
	for p.cur == nil || len(p.cur.from(p.pos)) < MaxSize {
		if p.cur != nil && errors.Is(p.cur.err, io.EOF) {
			return nil
		}
		if p.cur != nil && p.cur.err != nil {
			return p.cur.err
		}
		b := <-p.run.order
		if p.cur != nil {
			rest := p.cur.from(p.pos)
			copy(b.buf[MaxSize-len(rest):], rest)
			// What ends refers to is filled again, and that only after the cutter is done with it: Next
			// may have had no need of what it found.
			p.carried = append(p.carried[:0], p.ends...)
			p.ends = p.carried
			<-p.cur.done
			p.run.free <- p.cur
		}
		p.cur = b
	}
	return nil
}

// next returns the length of the next chunk, which rest begins with.
func (p *parallel) next(rest []byte) int {
	if len(p.ends) == 0 && p.pos >= p.cur.start {
		<-p.cur.done
		if i, met := slices.BinarySearch(p.cur.ends, p.pos); met {
			p.ends = p.cur.ends[i+1:]
		}
	}
	if len(p.ends) == 0 {
		n := Cut(rest)
		p.alone += int64(n)
		return n
	}
	n := int(p.ends[0] - p.pos)
	p.ends = p.ends[1:]
	return n
}

// start starts the goroutines.
func (p *parallel) start() *run {
	r := &run{
		free:  make(chan *block, len(p.blocks)),
		work:  make(chan *block, len(p.blocks)),
		order: make(chan *block, len(p.blocks)),
		stop:  make(chan struct{}),
	}
	for _, b := range p.blocks {
		r.free <- b
	}
	r.wg.Go(func() { r.read(p.r, p.size) })
	for range p.cutters {
		r.wg.Go(r.cut)
	}
	return r
}

// read divides the stream into blocks of a size, until it ends or fails. The first ones are shorter, so that
// others get to work early.
func (r *run) read(from io.Reader, blockSize int) {
	defer close(r.work)
	var err error
	for size, start := min(MaxSize, blockSize), int64(0); err == nil; size = min(2*size, blockSize) {
		var b *block
		select {
		case b = <-r.free:
		case <-r.stop:
			return
		}
		if b.buf == nil {
			b.buf = make([]byte, MaxSize+blockSize)
		}
		n := 0
		for n < size && err == nil && !r.stopped() {
			var k int
			k, err = from.Read(b.buf[MaxSize+n : MaxSize+size])
			n += k
		}
		b.start, b.n, b.err, b.done = start, n, err, make(chan struct{})
		start += int64(n)
		r.work <- b
		r.order <- b
	}
}

// cut is a cutter.
func (r *run) cut() {
	for b := range r.work {
		if !r.stopped() {
			b.cut()
		}
		close(b.done)
	}
}

// stopped reports whether the work is in vain.
func (r *run) stopped() bool {
	select {
	case <-r.stop:
		return true
	default:
		return false
	}
}

// from returns the bytes of the block from a position of the stream on.
func (b *block) from(pos int64) []byte {
	return b.buf[MaxSize+int(pos-b.start) : MaxSize+b.n]
}

// cut finds the ends of chunks in the block.
func (b *block) cut() {
	b.ends = append(b.ends[:0], b.start)
	for pos := b.start; ; {
		rest := b.from(pos)
		n := Cut(rest)
		if n == len(rest) && n < MaxSize {
			return // The chunk may end here, or behind the block.
		}
		pos += int64(n)
		b.ends = append(b.ends, pos)
	}
}
