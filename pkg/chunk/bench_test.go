package chunk_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
)

// text returns n bytes of lines of words from a vocabulary of 2,000.
func text(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 8))
	words := make([][]byte, 2000)
	for i := range words {
		words[i] = make([]byte, 1+rng.IntN(10))
		for k := range words[i] {
			words[i][k] = byte('a' + rng.IntN(26))
		}
	}
	b := make([]byte, 0, n+16)
	for len(b) < n {
		// The product makes some words much more frequent than others.
		b = append(b, words[rng.IntN(len(words))*rng.IntN(len(words))/len(words)]...)
		b = append(b, " \n"[rng.IntN(12)/11])
	}
	return b[:n]
}

// benchmarkData is what the benchmarks cut.
func benchmarkData() map[string][]byte {
	const size = 32 << 20
	return map[string][]byte{"random": random(42, size), "text": text(42, size)}
}

// BenchmarkCut finds cut points in memory.
func BenchmarkCut(b *testing.B) {
	for name, data := range benchmarkData() {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				for rest := data; len(rest) > 0; {
					rest = rest[chunk.Cut(rest):]
				}
			}
		})
	}
}

// BenchmarkCanonical reads the stream and copies the chunks out, as a builder does.
func BenchmarkCanonical(b *testing.B) {
	for name, data := range benchmarkData() {
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, 0, chunk.MaxSize)
			c, err := chunk.Canonical().New(bytes.NewReader(data))
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				if err := c.Reset(bytes.NewReader(data)); err != nil {
					b.Fatal(err)
				}
				for err = nil; err == nil; {
					_, err = c.Next(buf)
				}
			}
		})
	}
}

// BenchmarkParallel does what BenchmarkCanonical does, with several cutters. It also cuts with one goroutine,
// between the others' rounds, and tells how much longer that takes.
func BenchmarkParallel(b *testing.B) {
	for name, data := range benchmarkData() {
		for _, cutters := range []int{2, 4, chunk.MaxCutters} {
			b.Run(fmt.Sprintf("%s/%d", name, cutters), func(b *testing.B) {
				var chunkers [2]chunk.ParallelChunker
				for i, n := range []int{1, cutters} {
					var err error
					if chunkers[i], err = chunk.Canonical().NewParallel(nil, n); err != nil {
						b.Fatal(err)
					}
					defer chunkers[i].Close()
				}
				buf := make([]byte, 0, chunk.MaxSize)
				var took [2]time.Duration
				b.SetBytes(int64(len(data)))
				b.ReportAllocs()
				for b.Loop() {
					for i, c := range chunkers {
						if i == 0 {
							b.StopTimer()
						}
						begin := time.Now()
						err := c.Reset(bytes.NewReader(data))
						for err == nil {
							_, err = c.Next(buf)
						}
						if !errors.Is(err, io.EOF) {
							b.Fatal(err)
						}
						took[i] += time.Since(begin)
						if i == 0 {
							b.StartTimer()
						}
					}
				}
				b.ReportMetric(float64(took[0])/float64(took[1]), "times-serial")
			})
		}
	}
}
