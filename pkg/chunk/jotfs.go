package chunk

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/jotfs/fastcdc-go"
)

// jotfsTable guards the package-level hash table of fastcdc-go: its constructor writes
// the table (with the values it has, as Seed is never used here), and its chunkers read it.
var jotfsTable sync.RWMutex

type jotfs struct {
	c       *fastcdc.Chunker
	average int
}

func newJotfs(r io.Reader, average int) (*jotfs, error) {
	jotfsTable.Lock()
	defer jotfsTable.Unlock()
	c, err := fastcdc.NewChunker(r, fastcdc.Options{
		MinSize:     average / 4,
		AverageSize: average,
		MaxSize:     average * 4,
	})
	if err != nil {
		return nil, fmt.Errorf("make chunker with an average of %d bytes: %w", average, err)
	}
	return &jotfs{c, average}, nil
}

// Next implements Chunker.
func (j *jotfs) Next(dst []byte) ([]byte, error) {
	jotfsTable.RLock()
	defer jotfsTable.RUnlock()
	chunk, err := j.c.Next()
	if err != nil {
		if !errors.Is(err, io.EOF) {
			err = fmt.Errorf("cut stream: %w", err)
		}
		return dst, err
	}
	return append(dst, chunk.Data...), nil
}

// Reset implements Chunker.
func (j *jotfs) Reset(r io.Reader) error {
	fresh, err := newJotfs(r, j.average)
	if err != nil {
		return err
	}
	*j = *fresh
	return nil
}
