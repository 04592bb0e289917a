package store

import (
	"container/list"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// minBlock is the size in bytes of the blocks by which large blobs are checked, unless the
// table of a blob would then be too large for the cache. It divides streamSize.
const minBlock = 64 << 10

// blockTable has what is needed to check parts of a blob: the SHA-256 of each of its
// blocks, taken while the whole blob was read and found to be what its digest names.
// It is immutable and says nothing about a file: the blob may be rewritten meanwhile.
type blockTable struct {
	size  int64 // of the blob
	block int64 // size of a block; the last one may be shorter
	sums  []format.Digest
}

func (t *blockTable) bytes() int64 { return int64(len(t.sums)) * sha256.Size }

// hashBlocks reads a large blob, checks it and returns its table. The blocks are as small
// as a table of limit bytes allows.
func (s *Store) hashBlocks(ctx context.Context, fd int, size int64, d format.Digest, limit int64) (*blockTable, error) {
	block := int64(minBlock)
	for (size+block-1)/block*sha256.Size > limit {
		block *= 2
	}
	t := &blockTable{size: size, block: block, sums: make([]format.Digest, 0, (size+block-1)/block)}
	h := sha256.New()
	inBlock := int64(0)
	flush := func() {
		t.sums = append(t.sums, format.Digest(h.Sum(nil)))
		h.Reset()
		inBlock = 0
	}
	err := s.hashFile(ctx, fd, size, d, func(b []byte) {
		for len(b) > 0 {
			n := min(int64(len(b)), block-inBlock)
			h.Write(b[:n])
			b = b[n:]
			if inBlock += n; inBlock == block {
				flush()
			}
		}
	})
	if err != nil {
		return nil, err
	}
	if inBlock > 0 {
		flush()
	}
	return t, nil
}

// readLargeAt is ReadBlobAt for a blob whose file is open and has size bytes.
func (s *Store) readLargeAt(ctx context.Context, fd int, size int64, d format.Digest, p []byte, off int64) (int, error) {
	t, err := s.tables.get(ctx, d, func(limit int64) (*blockTable, error) {
		return s.hashBlocks(ctx, fd, size, d, limit)
	})
	if err != nil {
		return 0, err
	}
	if t.size != size {
		return 0, fmt.Errorf("it has %d bytes, it had %d: %w", size, t.size, ErrDigestMismatch)
	}
	var buf []byte // for a block of which a part is wanted
	n := 0
	for n < len(p) && off+int64(n) < size {
		if ctx.Err() != nil {
			return n, ctx.Err()
		}
		pos := off + int64(n)
		start := pos / t.block * t.block
		length := min(t.block, size-start)
		whole := pos == start && int64(len(p)-n) >= length
		dst := p[n:]
		if !whole {
			if buf == nil {
				if t.block <= wholeBlobMax {
					pooled := s.small.get()
					defer s.small.put(pooled)
					buf = pooled[:]
				} else {
					buf = make([]byte, t.block)
				}
			}
			dst = buf
		}
		got, err := preadFull(fd, dst[:length], start)
		if err != nil {
			return n, err
		}
		if int64(got) < length || sha256.Sum256(dst[:length]) != t.sums[start/t.block] {
			return n, fmt.Errorf("its %d bytes at offset %d were changed: %w", length, start, ErrDigestMismatch)
		}
		if whole {
			n += int(length)
		} else {
			n += copy(p[n:], dst[pos-start:length])
		}
	}
	return atEnd(n, len(p))
}

// tableCache keeps the tables of the blobs that were read last, within a number of bytes.
// A table is made by one goroutine at a time; others that need it wait.
type tableCache struct {
	limit int64 // bytes

	mu      sync.Mutex // guards the fields below and those of the entries
	used    int64      // bytes, at most limit while mu is free
	entries map[format.Digest]*tableEntry
	lru     list.List // of finished *tableEntry, last used first
}

type tableEntry struct {
	digest format.Digest
	done   chan struct{} // closed when table or err is set
	table  *blockTable
	err    error
	elem   *list.Element // nil until finished
}

// get returns the table of d, made by build if need be. build gets the limit for the bytes
// of one table. An error is not kept.
func (c *tableCache) get(ctx context.Context, d format.Digest, build func(limit int64) (*blockTable, error)) (*blockTable, error) {
	for {
		c.mu.Lock()
		e, ok := c.entries[d]
		if !ok {
			e = &tableEntry{digest: d, done: make(chan struct{})}
			if c.entries == nil {
				c.entries = make(map[format.Digest]*tableEntry)
			}
			c.entries[d] = e
			c.mu.Unlock()
			e.table, e.err = build(c.limit / 2)
			c.finish(e)
			return e.table, e.err
		}
		if e.elem != nil {
			c.lru.MoveToFront(e.elem)
			c.mu.Unlock()
			return e.table, nil
		}
		c.mu.Unlock()
		select {
		case <-e.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if e.err == nil {
			return e.table, nil
		}
		// The caller that was making it gave up: that is no reason for this one to.
		if !errors.Is(e.err, context.Canceled) && !errors.Is(e.err, context.DeadlineExceeded) {
			return nil, e.err
		}
	}
}

// finish enters a table that was made, evicting others, or forgets one that failed.
func (c *tableCache) finish(e *tableEntry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(e.done)
	if e.err != nil {
		delete(c.entries, e.digest)
		return
	}
	e.elem = c.lru.PushFront(e)
	c.used += e.table.bytes()
	for c.used > c.limit { // one table is at most half of it
		old, ok := c.lru.Remove(c.lru.Back()).(*tableEntry)
		if !ok {
			break // the list has nothing else
		}
		delete(c.entries, old.digest)
		c.used -= old.table.bytes()
	}
}
