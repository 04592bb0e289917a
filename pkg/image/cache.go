package image

import (
	"container/list"
	"context"
	"errors"
	"sync"
)

// unitKey names a unit of a blob's uncompressed content (read.go).
type unitKey struct{ blob, unit uint32 }

// pack returns the key as one number.
func (k unitKey) pack() uint64 { return uint64(k.blob)<<32 | uint64(k.unit) }

// entryBytes is about what an entry takes beside its data. An image may have millions of
// units of a byte each.
const entryBytes = 256

// cache keeps decoded units, the least recently used of which give way. What they take stays
// below a limit, but for units that are being read from.
type cache struct {
	limit int64

	mu      sync.Mutex // guards what follows
	entries map[unitKey]*list.Element
	used    list.List // of *cacheEntry, most recent first; loaded ones only
	bytes   int64
	loading map[unitKey]*load
}

type cacheEntry struct {
	key  unitKey
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

func newCache(limit int64) *cache {
	return &cache{limit: limit, entries: make(map[unitKey]*list.Element), loading: make(map[unitKey]*load)}
}

// peek returns a unit if it is in the cache.
func (c *cache) peek(key unitKey) ([]byte, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[key]
	if !ok {
		return nil, false
	}
	c.used.MoveToFront(e)
	return entryOf(e).data, true
}

// get returns a unit from the cache, or from fetch, which is called once however many
// callers ask at the same time. Failures are not kept. The caller must not change the data.
func (c *cache) get(ctx context.Context, key unitKey, fetch func(context.Context) ([]byte, error)) ([]byte, error) {
	for {
		c.mu.Lock()
		if e, ok := c.entries[key]; ok {
			c.used.MoveToFront(e)
			c.mu.Unlock()
			return entryOf(e).data, nil
		}
		l, ok := c.loading[key]
		if !ok {
			l = &load{done: make(chan struct{})}
			c.loading[key] = l
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
func (c *cache) finish(key unitKey, l *load) {
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
