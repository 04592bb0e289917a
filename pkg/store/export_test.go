package store

import (
	"context"
	"encoding/json"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// What the external tests see of the inside.

const (
	TempPrefix   = tempPrefix
	WholeBlobMax = wholeBlobMax
	MinBlock     = minBlock
)

// Index is a decoded index.json.
type Index = index

// ParseIndex decodes an index.json.
func ParseIndex(b []byte, layout Layout) (*Index, error) { return parseIndex(b, layout) }

// Encode encodes an index.
func (x *index) Encode() ([]byte, error) { return x.encode() }

// Raw returns what must survive: the members and the entries as they were.
func (x *index) Raw() (fields map[string]json.RawMessage, entries []json.RawMessage) {
	for _, e := range x.entries {
		entries = append(entries, e.raw)
	}
	return x.fields, entries
}

// NewTableCache returns a cache of limit bytes.
func NewTableCache(limit int64) *TableCache { return &TableCache{limit: limit} }

// TableCache is the cache of block hashes.
type TableCache = tableCache

// Load returns how many entries the table of d has, made by build if need be.
func (c *tableCache) Load(ctx context.Context, d format.Digest, build func() (entries int, err error)) (int, error) {
	t, err := c.get(ctx, d, func(int64) (*blockTable, error) {
		n, err := build()
		if err != nil {
			return nil, err
		}
		return &blockTable{sums: make([]format.Digest, n)}, nil
	})
	if err != nil {
		return 0, err
	}
	return len(t.sums), nil
}

// Used returns how many bytes the tables in the cache have.
func (c *tableCache) Used() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used
}

// Tables returns the store's cache.
func (s *Store) Tables() *TableCache { return &s.tables }
