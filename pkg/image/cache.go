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
	key  cacheKey
	data []byte
}

// cost returns what the entry takes, in bytes.
func (e *cacheEntry) cost() int64 { return int64(len(e.data)) + entryBytes }

// load is a unit being loaded.
type load struct {
	done chan struct{} // closed when data and err are set
	data []byte
	err  error
}

// NewCache returns an empty cache of limit bytes.
func NewCache(limit int64) *Cache {
	return &Cache{limit: limit, entries: make(map[cacheKey]*list.Element), loading: make(map[cacheKey]*load)}
}

// peek returns a unit if it is in the cache.
func (c *Cache) peek(key cacheKey) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[key]
	if !ok {
		return nil, false
	}
	c.hits++
	c.used.MoveToFront(e)
	return entryOf(e).data, true
}

// has reports whether a unit is in the cache, without using it.
func (c *Cache) has(key cacheKey) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.entries[key]
	return ok
}

// get returns a unit from the cache, or from fetch, which is called once however many
// callers ask at the same time. Failures are not kept. The caller must not change the data.
func (c *Cache) get(ctx context.Context, key cacheKey, fetch func(context.Context) ([]byte, error)) ([]byte, error) {
	for {
		c.mu.Lock()
		if e, ok := c.entries[key]; ok {
			c.hits++
			c.used.MoveToFront(e)
			c.mu.Unlock()
			return entryOf(e).data, nil
		}
		l, ok := c.loading[key]
		if !ok {
			l = &load{done: make(chan struct{})}
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
	e := &cacheEntry{key, l.data}
	if l.err != nil || e.cost() > c.limit {
		return
	}
	c.entries[key] = c.used.PushFront(e)
	c.bytes += e.cost()
	for c.bytes > c.limit {
		last := c.used.Back()
		e := entryOf(last)
		c.used.Remove(last)
		delete(c.entries, e.key)
		c.bytes -= e.cost()
	}
}

func entryOf(e *list.Element) *cacheEntry {
	entry, ok := e.Value.(*cacheEntry)
	if !ok {
		panic("image: the list holds cache entries only")
	}
	return entry
}
