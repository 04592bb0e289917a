package image

import (
	"container/list"
	"context"
	"errors"
	"sync"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// DefaultCacheBytes is the size of the cache of an image that was not given one.
const DefaultCacheBytes = 64 << 20

// cacheKey names decoded content: length bytes of what a blob holds, or inflates to, from a
// multiple of unitSize on. Images that need the same of a blob share it, if they say the same of it: who
// can write to the disk must not have one image vouch for what another is shown.
type cacheKey struct {
	blob       format.Digest
	verity     verity.Digest
	unit       uint32
	length     uint32
	compressed bool
}

// entryBytes is about what an entry takes beside its data. An image may have millions of
// units of a byte each.
const entryBytes = 384

// Cache keeps decoded content, the least recently used of which gives way. What it takes stays
// below a limit, but for content that is being read from. Any number of images may share one,
// whose Sources then must agree on what a digest names; what two of them need at the same
// time is loaded once. A Cache is safe for concurrent use, and the images that are not used any
// more leave in it what they loaded, until others need the room.
type Cache struct {
	limit int64

	mu      sync.Mutex // guards what follows
	entries map[cacheKey]*list.Element
	used    list.List // of *cacheEntry, most recent first; loaded ones only
	bytes   int64
	loading map[cacheKey]*load
	hits    int64
	loads   int64
	images  uint64 // that shared it so far
}

// CacheStats says what a [Cache] holds and how much it helps. Sizes are in bytes; Hits and Loads
// only grow.
type CacheStats struct {
	// Bytes is what is in the cache, Limit what may be.
	Bytes, Limit int64
	// Hits counts pieces of content that were there, Loads those that were asked of a Source,
	// ahead of a reader or for one.
	Hits, Loads int64
}

// Stats returns how the cache does.
func (c *Cache) Stats() CacheStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return CacheStats{Bytes: c.bytes, Limit: c.limit, Hits: c.hits, Loads: c.loads}
}

type cacheEntry struct {
	key    cacheKey
	data   []byte
	small  bool // who reads little at a time wanted it
	passed int  // bytes that went to readers who go through large files
	// shown is the last node of shownOf whose file was shown beside another.
	shown   uint32
	shownOf uint64
}

// cost returns what the entry takes, in bytes.
func (e *cacheEntry) cost() int64 { return int64(len(e.data)) + entryBytes }

// load is a unit being loaded.
type load struct {
	done  chan struct{} // closed when data and err are set
	data  []byte
	err   error
	small bool // as that of the entry; guarded by the cache's mutex
}

// NewCache returns an empty cache of limit bytes.
func NewCache(limit int64) *Cache {
	return &Cache{limit: limit, entries: make(map[cacheKey]*list.Element), loading: make(map[cacheKey]*load)}
}

// join returns the number of an image that is going to use the cache.
func (c *Cache) join() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.images++
	return c.images
}

// peek returns a unit if it is in the cache, for who reads little at a time.
func (c *Cache) peek(key cacheKey) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[key]
	if !ok {
		return nil, false
	}
	c.hits++
	c.used.MoveToFront(e)
	entryOf(e).small = true
	return entryOf(e).data, true
}

// has reports whether a unit is in the cache, without using it.
func (c *Cache) has(key cacheKey) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.entries[key]
	return ok
}

// passed says that n bytes of a unit went to a reader who goes through a large file. When all have, and nobody
// else wanted it, it is not kept: the kernel keeps what was read. Its memory can be used for the next unit, which
// costs less than memory that was never used.
func (c *Cache) passed(key cacheKey, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	elem, ok := c.entries[key]
	if !ok {
		return
	}
	e := entryOf(elem)
	if e.passed += n; e.passed >= len(e.data) && !e.small {
		c.remove(elem)
	}
}

// show returns a unit if it is in the cache, without using it, and the last node of an image whose file was
// shown of it, after that was set to upTo if it was less. Of several images it knows the one that was last.
func (c *Cache) show(key cacheKey, of uint64, upTo uint32) (data []byte, shown uint32, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	elem, ok := c.entries[key]
	if !ok {
		return nil, 0, false
	}
	e := entryOf(elem)
	if e.shownOf != of {
		e.shownOf, e.shown = of, 0
	}
	e.shown = max(e.shown, upTo)
	return e.data, e.shown, true
}

// remove removes a loaded unit. c.mu is held.
func (c *Cache) remove(elem *list.Element) {
	e := entryOf(elem)
	c.used.Remove(elem)
	delete(c.entries, e.key)
	c.bytes -= e.cost()
}

// get returns a unit from the cache, or from fetch, which is called once however many
// callers ask at the same time. Failures are not kept. The caller must not change the data. small says that
// it reads little at a time.
func (c *Cache) get(ctx context.Context, key cacheKey, small bool, fetch func(context.Context) ([]byte, error)) ([]byte, error) {
	for {
		c.mu.Lock()
		if e, ok := c.entries[key]; ok {
			c.hits++
			c.used.MoveToFront(e)
			entry := entryOf(e)
			entry.small = entry.small || small
			c.mu.Unlock()
			return entry.data, nil
		}
		l, ok := c.loading[key]
		if ok {
			l.small = l.small || small
		} else {
			l = &load{done: make(chan struct{}), small: small}
			c.loading[key] = l
			c.loads++
			c.mu.Unlock()
			l.data, l.err = fetch(ctx)
			c.finish(key, l)
			return l.data, l.err
		}
		c.mu.Unlock()
		select {
		case <-l.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if l.err == nil {
			return l.data, nil
		}
		// Whoever loaded may have been interrupted; that is not our failure.
		if !errors.Is(l.err, context.Canceled) && !errors.Is(l.err, context.DeadlineExceeded) {
			return nil, l.err
		}
	}
}

// finish ends a load and makes room for its data.
func (c *Cache) finish(key cacheKey, l *load) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.loading, key)
	close(l.done)
	e := &cacheEntry{key: key, data: l.data, small: l.small}
	if l.err != nil || e.cost() > c.limit {
		return
	}
	c.entries[key] = c.used.PushFront(e)
	c.bytes += e.cost()
	for c.bytes > c.limit {
		c.remove(c.used.Back())
	}
}

func entryOf(e *list.Element) *cacheEntry {
	entry, ok := e.Value.(*cacheEntry)
	if !ok {
		panic("image: the list holds cache entries only")
	}
	return entry
}
