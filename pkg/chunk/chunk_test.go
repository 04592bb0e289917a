package chunk_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
)

// slowCut is the definition of the canonical cut points (docs/format.md, "Chunking"),
// written down as it reads there; Cut must agree with it.
func slowCut(buf []byte, gear [256]uint64) int {
	const small, large = uint64(0x0000d90703537000), uint64(0x0000d90f03530000)
	if len(buf) <= chunk.MinSize {
		return len(buf)
	}
	limit := min(len(buf), chunk.MaxSize)
	centre := min(len(buf), chunk.AverageSize)
	var h uint64
	for a := chunk.MinSize; a < limit/2*2; a += 2 {
		mask := large
		if a < centre/2*2 {
			mask = small
		}
		h = h<<2 + 2*gear[buf[a]]
		if h&(mask<<1) == 0 {
			return a
		}
		h += gear[buf[a+1]]
		if h&mask == 0 {
			return a + 1
		}
	}
	return limit
}

func random(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 7))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func cutAll(t *testing.T, a chunk.Algorithm, r io.Reader) [][]byte {
	t.Helper()
	c, err := a.New(r)
	if err != nil {
		t.Fatal(err)
	}
	var chunks [][]byte
	for {
		b, err := c.Next(nil)
		if errors.Is(err, io.EOF) {
			return chunks
		}
		if err != nil {
			t.Fatal(err)
		}
		chunks = append(chunks, b)
	}
}

func TestCutMatchesDefinition(t *testing.T) {
	gear := chunk.Gear()
	// The first entry, and with it the construction, as published in the fastcdc crate.
	if gear[0] != 0x3b5d3c7d207e37dc {
		t.Fatalf("gear[0] = %#x", gear[0])
	}
	for seed := range uint64(40) {
		data := random(seed, 300<<10)
		for _, n := range []int{0, 1, chunk.MinSize, chunk.MinSize + 1, chunk.MinSize + 2, 40_001, chunk.AverageSize - 1, chunk.AverageSize, chunk.AverageSize + 1, 100_003, chunk.MaxSize - 1, chunk.MaxSize, chunk.MaxSize + 1, len(data)} {
			if got, want := chunk.Cut(data[:n]), slowCut(data[:n], gear); got != want {
				t.Errorf("seed %d, %d bytes: Cut = %d, want %d", seed, n, got, want)
			}
		}
	}
	zeros := make([]byte, 300<<10)
	if got, want := chunk.Cut(zeros), slowCut(zeros, gear); got != want {
		t.Errorf("zeros: Cut = %d, want %d", got, want)
	}
}

// However the stream is read, the chunks are the same and add up to it.
func TestChunkersDoNotDependOnReads(t *testing.T) {
	jotfs, err := chunk.Jotfs(32 << 10)
	if err != nil {
		t.Fatal(err)
	}
	data := random(99, 5<<20)
	for _, a := range []chunk.Algorithm{chunk.Canonical(), jotfs} {
		t.Run(a.String(), func(t *testing.T) {
			want := cutAll(t, a, bytes.NewReader(data))
			if len(want) < 10 {
				t.Fatalf("only %d chunks", len(want))
			}
			if !bytes.Equal(bytes.Join(want, nil), data) {
				t.Error("chunks do not add up to the stream")
			}
			for i, c := range want {
				if len(c) == 0 || len(c) > a.MaxSize() {
					t.Errorf("chunk %d has %d bytes", i, len(c))
				}
			}
			for name, r := range map[string]io.Reader{
				"halves":   iotest.HalfReader(bytes.NewReader(data)),
				"data+EOF": iotest.DataErrReader(bytes.NewReader(data)),
			} {
				if got := cutAll(t, a, r); len(got) != len(want) {
					t.Errorf("%s: %d chunks, want %d", name, len(got), len(want))
				}
			}
			if got := cutAll(t, a, strings.NewReader("")); len(got) != 0 {
				t.Errorf("empty stream: %d chunks", len(got))
			}
		})
	}
}

func TestStreamErrorIsReturned(t *testing.T) {
	jotfs, _ := chunk.Jotfs(chunk.DefaultJotfsAverage)
	for _, a := range []chunk.Algorithm{chunk.Canonical(), jotfs} {
		broken := errors.New("disk on fire")
		c, err := a.New(io.MultiReader(bytes.NewReader(random(1, 1<<20)), iotest.ErrReader(broken)))
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = c.Next(nil)
		}
		if !errors.Is(err, broken) {
			t.Errorf("%s: error %v, want the stream's", a, err)
		}
	}
}

// Chunkers of the jotfs algorithm are made while others run; the race detector watches.
func TestJotfsConcurrentConstruction(t *testing.T) {
	a, err := chunk.Jotfs(16 << 10)
	if err != nil {
		t.Fatal(err)
	}
	data := random(5, 1<<20)
	want := len(cutAll(t, a, bytes.NewReader(data)))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if got := len(cutAll(t, a, bytes.NewReader(data))); got != want {
				t.Errorf("%d chunks, want %d", got, want)
			}
		})
	}
	wg.Wait()
}

func TestParseAlgorithm(t *testing.T) {
	for s, want := range map[string]string{
		"canonical": "canonical", "jotfs": "jotfs:65536", "jotfs:1M": "jotfs:1048576", "jotfs:16K": "jotfs:16384", "jotfs:20000": "jotfs:20000",
	} {
		a, err := chunk.ParseAlgorithm(s)
		if err != nil || a.String() != want {
			t.Errorf("ParseAlgorithm(%q) = %s, %v, want %s", s, a, err, want)
		}
	}
	for _, s := range []string{"", "rabin", "canonical:1", "jotfs:", "jotfs:1", "jotfs:5M", "jotfs:1KM", "jotfs:-1", "jotfs:99999999999999999999"} {
		if a, err := chunk.ParseAlgorithm(s); !errors.Is(err, chunk.ErrInvalidAlgorithm) {
			t.Errorf("ParseAlgorithm(%q) = %s, %v, want ErrInvalidAlgorithm", s, a, err)
		}
	}
}

func FuzzCut(f *testing.F) {
	f.Add([]byte("short"), uint16(1))
	f.Add(random(3, 1000), uint16(300))
	gear := chunk.Gear()
	f.Fuzz(func(t *testing.T, seed []byte, repeat uint16) {
		buf := bytes.Repeat(seed, int(repeat))
		if len(buf) > 1<<20 {
			buf = buf[:1<<20]
		}
		if got, want := chunk.Cut(buf), slowCut(buf, gear); got != want {
			t.Errorf("Cut of %d bytes = %d, want %d", len(buf), got, want)
		}
	})
}
