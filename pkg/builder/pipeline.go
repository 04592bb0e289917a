package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

const (
	// filesAhead bounds how many files the walker holds open.
	filesAhead = 128
	// bytesInFlight bounds the chunks between cutter and collector, unless that is less
	// than the workers need to be busy.
	bytesInFlight = 8 << 20
)

// job is a chunk on its way through the workers.
type job struct {
	data   []byte
	pieces []piece
	done   chan struct{} // closed when blob is set
	blob   *blob
}

// blob is a stored chunk.
type blob struct {
	ready      chan struct{} // closed when the fields below are set
	content    format.Digest // of the chunk
	digest     format.Digest // of what is stored
	size       int64         // stored bytes
	compressed bool
	verity     verity.Digest
	err        error
}

// pipeline connects the stages.
type pipeline struct {
	cfg     *Config
	work    chan *job // to the workers
	order   chan *job // the same jobs, to the collector
	buffers sync.Pool // of *[]byte, for chunk data
	inodes  atomic.Int64

	// record, if not nil, is made of this build.
	record *record

	mu    sync.Mutex // guards what follows
	blobs map[format.Digest]*blob
	again *again // what is known of an earlier build; nil for nothing
}

// runPipeline builds the tree that walk walks and stores its chunks. m, if not nil, is what is known of
// an earlier build, and learns of this one.
func runPipeline(ctx context.Context, cfg *Config, base *baseTree, m *memory, walk func(*walker) error) (t *tree, err error) {
	inFlight := max(bytesInFlight/cfg.Chunker.MaxSize(), 2*cfg.Workers)
	p := &pipeline{
		cfg:   cfg,
		work:  make(chan *job, inFlight),
		order: make(chan *job, inFlight),
		blobs: make(map[format.Digest]*blob),
	}
	if m != nil {
		p.again, p.record = m.again, &m.record
	}
	p.buffers.New = func() any { b := make([]byte, 0, cfg.Chunker.MaxSize()); return &b }
	files := make(chan openFile, filesAhead)
	t = &tree{verity: make(map[format.Digest]verity.Digest)}
	g, ctx := errgroup.WithContext(ctx)
	s := &stream{ctx: ctx, files: files, memory: m}
	defer func() { err = errors.Join(err, s.release()) }()
	w := &walker{
		ctx: ctx, base: base, tree: t, files: files,
		links: make(map[fileID]uint64),
		found: func(n int) { p.inodes.Store(int64(n)) }, again: p.again,
	}
	if len(base.layers) > 0 {
		w.used = make(map[uint64]bool)
	}
	walked := make(chan struct{})
	g.Go(func() error {
		defer close(files)
		if err := walk(w); err != nil {
			return err
		}
		close(walked)
		return nil
	})
	g.Go(func() error {
		defer close(p.work)
		defer close(p.order)
		if p.again == nil {
			return p.cut(ctx, s)
		}
		if err := p.again.look(ctx, cfg.Workers); err != nil {
			return err
		}
		select {
		case <-walked:
		case <-ctx.Done():
			return ctx.Err()
		}
		m.noteAll()
		return p.cutAgain(ctx, p.again)
	})
	for range cfg.Workers {
		g.Go(p.store)
	}
	g.Go(func() error { return p.collect(ctx, t) })
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return t, nil
}

// cut cuts the stream and hands each chunk to the workers and, in order, to the collector.
func (p *pipeline) cut(ctx context.Context, s *stream) error {
	// Two workers hash and store no faster than one goroutine reads and cuts, and would only have to do
	// without the processor time that goes into cutting some bytes twice.
	cutters := p.cfg.Workers / 2
	c, err := p.cfg.Chunker.NewParallel(s, cutters)
	if err != nil {
		return err
	}
	// Reading does not keep it waiting: either the stream has ended, or ctx has, which ends Read.
	defer c.Close()
	for {
		data, err := c.Next((*p.buffer())[:0])
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := p.hand(ctx, &job{data: data, pieces: s.cut(len(data)), done: make(chan struct{})}); err != nil {
			return err
		}
	}
}

// buffer returns room for a chunk.
func (p *pipeline) buffer() *[]byte {
	buf, ok := p.buffers.Get().(*[]byte)
	if !ok {
		panic("builder: the pool holds buffers only")
	}
	return buf
}

// hand hands a chunk to the workers and to the collector.
func (p *pipeline) hand(ctx context.Context, j *job) error {
	for _, to := range []chan<- *job{p.work, p.order} {
		select {
		case to <- j:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// store is a worker: it hashes, compresses and stores chunks. It goes on after a failed
// chunk, since the collector, which may wait for any of them, is who reports the failure.
func (p *pipeline) store() error {
	var z *compressor
	if p.cfg.Compress {
		var err error
		if z, err = newCompressor(p.cfg.Level); err != nil {
			return err
		}
		defer z.close()
	}
	for j := range p.work {
		j.blob = p.storeChunk(j.data, z)
		data := j.data[:0]
		j.data = nil
		p.buffers.Put(&data)
		close(j.done)
	}
	return nil
}

// storeChunk stores a chunk that was not seen before in this build.
func (p *pipeline) storeChunk(data []byte, z *compressor) *blob {
	digest := format.DigestOf(data)
	p.mu.Lock()
	b, seen := p.blobs[digest]
	if !seen && p.again != nil {
		b = p.again.stored(digest)
		seen = b != nil
	}
	if !seen {
		b = &blob{ready: make(chan struct{}), content: digest}
		p.blobs[digest] = b
	}
	p.mu.Unlock()
	if seen {
		<-b.ready
		return b
	}
	defer close(b.ready)
	stored := data
	if z != nil {
		small, err := z.compress(data)
		if err != nil {
			b.err = fmt.Errorf("compress chunk: %w", err)
			return b
		}
		if len(small) < len(data) {
			stored, digest, b.compressed = small, format.DigestOf(small), true
		}
	}
	b.digest, b.size, b.verity = digest, int64(len(stored)), verity.Sum(stored)
	b.err = p.cfg.Store.Put(stored, digest)
	return b
}

// collect writes the chunk lists of the files and the list of chunks, in stream order.
func (p *pipeline) collect(ctx context.Context, t *tree) error {
	mediaType := format.MediaTypeChunk
	if p.cfg.Compress {
		mediaType = format.MediaTypeChunkZstd
	}
	for j := range p.order {
		select {
		case <-j.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		b := j.blob
		if b.err != nil {
			return b.err
		}
		length := uint64(0)
		for _, piece := range j.pieces {
			length += piece.len
			piece.inode.Chunks = append(piece.inode.Chunks, format.FileChunk{
				Blob: format.BlobRef{Digest: b.digest, Offset: piece.offset, Compressed: b.compressed},
				Len:  piece.len,
			})
		}
		t.bytes += int64(length)
		if p.record != nil {
			p.record.chunks = append(p.record.chunks, recordedChunk{
				length: uint32(length), content: b.content, blob: b.digest, size: b.size, compressed: b.compressed, verity: b.verity,
			})
		}
		t.chunks = append(t.chunks, format.Descriptor{MediaType: mediaType, Digest: b.digest, Size: b.size})
		t.verity[b.digest] = b.verity
		if p.cfg.Progress != nil {
			p.cfg.Progress(Progress{Inodes: int(p.inodes.Load()), Bytes: t.bytes})
		}
	}
	return nil
}
