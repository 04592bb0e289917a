// Package chunk cuts a stream of bytes into content-defined chunks.
//
// Two algorithms stand behind [Chunker]. Canonical reproduces the cut points of the
// reference implementation of PuzzleFS, so that the same content gives the same blobs
// whoever built them. The other is the FastCDC of github.com/jotfs/fastcdc-go, with an
// average size to choose, for images whose chunks need not be shared with other builders.
//
// The package reads from an io.Reader and keeps nothing else.
package chunk

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// ErrInvalidAlgorithm says that a text does not name a chunking algorithm.
var ErrInvalidAlgorithm = errors.New("invalid chunker")

// Bounds of the average chunk size of the jotfs algorithm, in bytes. Its chunks are
// between a quarter of the average and four times the average long.
const (
	MinJotfsAverage     = 16 << 10
	MaxJotfsAverage     = 4 << 20
	DefaultJotfsAverage = 64 << 10
)

// Chunker yields the chunks of one stream, in order. It is not safe for concurrent use.
type Chunker interface {
	// Next appends the next chunk to dst and returns the extended slice. A chunk has at
	// least one byte. After the last one the error is io.EOF; any other error is the
	// stream's own. The caller owns dst.
	Next(dst []byte) ([]byte, error)
	// Reset makes the next chunk be the first of another stream, whatever is left of this one. It
	// spares the memory of a new Chunker where it can.
	Reset(r io.Reader) error
}

// Algorithm is a way to cut, with its parameters. The zero Algorithm is canonical.
type Algorithm struct {
	jotfsAverage int // 0: canonical
}

// Canonical returns the algorithm of the reference implementation: chunks of
// [MinSize] to [MaxSize] bytes, [AverageSize] on average.
func Canonical() Algorithm { return Algorithm{} }

// Jotfs returns the FastCDC of github.com/jotfs/fastcdc-go with an average chunk size
// in bytes, from MinJotfsAverage to MaxJotfsAverage.
func Jotfs(average int) (Algorithm, error) {
	if average < MinJotfsAverage || average > MaxJotfsAverage {
		return Algorithm{}, fmt.Errorf("average chunk size %d: want %d to %d bytes: %w", average, MinJotfsAverage, MaxJotfsAverage, ErrInvalidAlgorithm)
	}
	return Algorithm{jotfsAverage: average}, nil
}

// ParseAlgorithm parses "canonical" or "jotfs[:AVERAGE]". AVERAGE is in bytes, or in
// KiB or MiB with the suffix K or M.
func ParseAlgorithm(s string) (Algorithm, error) {
	name, average, sized := strings.Cut(s, ":")
	switch {
	case name == "canonical" && !sized:
		return Canonical(), nil
	case name == "jotfs" && !sized:
		return Jotfs(DefaultJotfsAverage)
	case name == "jotfs":
		n, err := parseSize(average)
		if err != nil {
			return Algorithm{}, fmt.Errorf("parse %q: average chunk size: %w: %w", s, err, ErrInvalidAlgorithm)
		}
		return Jotfs(n)
	}
	return Algorithm{}, fmt.Errorf("parse %q: want canonical or jotfs[:AVERAGE]: %w", s, ErrInvalidAlgorithm)
}

func parseSize(s string) (int, error) {
	number, shift := s, 0
	if k, ok := strings.CutSuffix(s, "K"); ok {
		number, shift = k, 10
	} else if m, ok := strings.CutSuffix(s, "M"); ok {
		number, shift = m, 20
	}
	n, err := strconv.ParseUint(number, 10, 31)
	if err != nil || n > MaxJotfsAverage>>shift {
		return 0, fmt.Errorf("%q is not a size from 16K to 4M", s)
	}
	return int(n) << shift, nil
}

// String returns the text that ParseAlgorithm reads.
func (a Algorithm) String() string {
	if a.jotfsAverage == 0 {
		return "canonical"
	}
	return fmt.Sprintf("jotfs:%d", a.jotfsAverage)
}

// MaxSize returns the length of the longest chunk that a produces, in bytes.
func (a Algorithm) MaxSize() int {
	if a.jotfsAverage == 0 {
		return MaxSize
	}
	return 4 * a.jotfsAverage
}

// New returns a Chunker over r. Memory is a buffer of a few times MaxSize.
func (a Algorithm) New(r io.Reader) (Chunker, error) {
	if a.jotfsAverage == 0 {
		return newCanonical(r), nil
	}
	return newJotfs(r, a.jotfsAverage)
}
