package chunk_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
)

// lengths cuts the stream of c, which is data and ends with the error want, and returns the lengths of
// the chunks. It fails if they are not what data begins with.
func lengths(t *testing.T, c chunk.Chunker, data []byte, want error) []int {
	t.Helper()
	var (
		found []int
		buf   = make([]byte, 0, chunk.MaxSize)
	)
	for pos := 0; ; {
		b, err := c.Next(buf)
		if err != nil {
			if !errors.Is(err, want) {
				t.Errorf("at %d: error %v, want %v", pos, err, want)
			}
			if _, again := c.Next(buf); !errors.Is(again, want) {
				t.Errorf("Next after %v: error %v, want the same", err, again)
			}
			return found
		}
		if !bytes.HasPrefix(data[pos:], b) {
			t.Fatalf("the %d bytes of the chunk at %d are not those of the stream", len(b), pos)
		}
		pos += len(b)
		found = append(found, len(b))
	}
}

// serially returns the lengths of the chunks of data. If it does not end there but with an error,
// those are without the ones that it could have an influence on.
func serially(data []byte, ends bool) []int {
	var found []int
	for len(data) >= chunk.MaxSize || ends && len(data) > 0 {
		n := chunk.Cut(data)
		found = append(found, n)
		data = data[n:]
	}
	return found
}

// inputs are streams that cutters agree on early, late, and never.
func inputs(n int) map[string][]byte {
	offset := random(11, n)
	copy(offset[min(n, 100_000):], make([]byte, n))
	return map[string][]byte{
		"random":         random(10, n),
		"text":           text(10, n),
		"zeros":          make([]byte, n),
		"odd zeros":      offset,
		"period 7":       bytes.Repeat([]byte("seven b"), n/7+1)[:n],
		"period 100,003": bytes.Repeat(random(12, 100_003), n/100_003+1)[:n],
	}
}

// readers are ways to read the same.
var readers = map[string]func(io.Reader) io.Reader{
	"whole":    func(r io.Reader) io.Reader { return r },
	"bytes":    iotest.OneByteReader,
	"halves":   iotest.HalfReader,
	"data+EOF": iotest.DataErrReader,
	"uneven":   func(r io.Reader) io.Reader { return &unevenReader{r: r, rng: rand.New(rand.NewPCG(1, 1))} },
}

// unevenReader reads few bytes, many, or none.
type unevenReader struct {
	r   io.Reader
	rng *rand.Rand
}

func (u *unevenReader) Read(p []byte) (int, error) {
	n := min(len(p), u.rng.IntN(1<<u.rng.IntN(18)))
	if n == 0 {
		return 0, nil
	}
	return u.r.Read(p[:n])
}

func TestParallelFindsTheSameChunks(t *testing.T) {
	// The borders of blocks are at the multiples of MaxSize.
	for name, data := range inputs(3*chunk.MaxSize + 1) {
		t.Run(name, func(t *testing.T) {
			for _, border := range []int{1, chunk.MinSize, chunk.MaxSize, 2 * chunk.MaxSize, 3 * chunk.MaxSize} {
				for n := border - 1; n <= border+1; n++ {
					want := serially(data[:n], true)
					for _, cutters := range []int{1, 3} {
						c := chunk.NewParallelBlocks(bytes.NewReader(data[:n]), cutters, chunk.MaxSize)
						if diff := cmp.Diff(want, lengths(t, c, data[:n], io.EOF)); diff != "" {
							t.Errorf("%d bytes, %d cutters (-serial +parallel):\n%s", n, cutters, diff)
						}
						c.Close()
					}
				}
			}
		})
	}
}

func TestParallelDoesNotDependOnReads(t *testing.T) {
	data := random(20, 3<<19)
	copy(data[600_000:], make([]byte, 500_001))
	want := serially(data, true)
	for name, reader := range readers {
		for _, size := range []int{1_000, chunk.MaxSize - 1, chunk.MaxSize + 1, 2 << 20} {
			t.Run(fmt.Sprintf("%s in blocks of %d", name, size), func(t *testing.T) {
				c := chunk.NewParallelBlocks(reader(bytes.NewReader(data)), 3, size)
				defer c.Close()
				if diff := cmp.Diff(want, lengths(t, c, data, io.EOF)); diff != "" {
					t.Errorf("lengths (-serial +parallel):\n%s", diff)
				}
			})
		}
	}
}

// The chunks before an error are those that it has no influence on, whoever cuts.
func TestErrorsComeAfterTheChunksBefore(t *testing.T) {
	broken := errors.New("disk on fire")
	data := random(30, 2_000_000)
	for _, n := range []int{0, 1, chunk.MaxSize - 1, chunk.MaxSize, chunk.MaxSize + 1, 3*chunk.MaxSize - 1, 3 * chunk.MaxSize, 3*chunk.MaxSize + 1, len(data)} {
		for name, r := range map[string]func() io.Reader{
			"alone":     func() io.Reader { return io.MultiReader(bytes.NewReader(data[:n]), iotest.ErrReader(broken)) },
			"with data": func() io.Reader { return &brokenReader{data[:n], broken} },
		} {
			t.Run(fmt.Sprintf("%s after %d", name, n), func(t *testing.T) {
				want := serially(data[:n], false)
				for _, cutters := range []int{1, 3} {
					c, err := chunk.Canonical().NewParallel(r(), cutters)
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					if diff := cmp.Diff(want, lengths(t, c, data[:n], broken)); diff != "" {
						t.Errorf("%d cutters, lengths (-want +got):\n%s", cutters, diff)
					}
				}
			})
		}
	}
}

// brokenReader fails with the last of its bytes.
type brokenReader struct {
	data []byte
	err  error
}

func (r *brokenReader) Read(p []byte) (int, error) {
	n := copy(p, r.data)
	if r.data = r.data[n:]; len(r.data) == 0 {
		return n, r.err
	}
	return n, nil
}

// If the cutters worked for nothing, the chunks would be the same.
func TestCuttersDoMostOfTheWork(t *testing.T) {
	const size = 8 << 20
	for name, data := range map[string][]byte{"random": random(40, size), "text": text(40, size)} {
		c, err := chunk.Canonical().NewParallel(bytes.NewReader(data), 2)
		if err != nil {
			t.Fatal(err)
		}
		lengths(t, c, data, io.EOF)
		if alone := chunk.Alone(c); alone > size/4 {
			t.Errorf("%s: %d of %d bytes were cut by Next alone", name, alone, size)
		} else {
			t.Logf("%s: %.1f %% of the bytes were cut by Next alone", name, 100*float64(alone)/size)
		}
		c.Close()
	}
}

// endless is a stream of zeros.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// stalled is a stream that nothing comes from.
type stalled struct{}

func (stalled) Read([]byte) (int, error) { return 0, nil }

// The bubble of synctest does not end before all goroutines that were started in it.
func TestCloseEndsTheGoroutines(t *testing.T) {
	for name, test := range map[string]struct {
		r      io.Reader
		chunks int
	}{
		"before the first chunk": {endless{}, 0},
		"after the first chunk":  {endless{}, 1},
		"after many chunks":      {endless{}, 40},
		"at the end":             {bytes.NewReader(random(50, 1<<20)), 1000},
		"after an error":         {iotest.ErrReader(io.ErrUnexpectedEOF), 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, err := chunk.Canonical().NewParallel(test.r, 3)
				if err != nil {
					t.Fatal(err)
				}
				for range test.chunks {
					if _, err := c.Next(nil); err != nil {
						break
					}
				}
				c.Close()
				c.Close()
				if _, err := c.Next(nil); !errors.Is(err, chunk.ErrClosed) {
					t.Errorf("Next after Close: error %v, want ErrClosed", err)
				}
			})
		})
	}
}

// A chunker whose stream has ended needs no Close.
func TestGoroutinesEndWithTheStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		data := random(51, 1<<20)
		c, err := chunk.Canonical().NewParallel(bytes.NewReader(data), 2)
		if err != nil {
			t.Fatal(err)
		}
		lengths(t, c, data, io.EOF)
	})
}

func TestCloseWaitsForTheReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		c, err := chunk.Canonical().NewParallel(r, 2)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if _, err := w.Write(make([]byte, 2*chunk.MaxSize)); err != nil {
				t.Error(err)
			}
		}()
		if _, err := c.Next(nil); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // until the reader waits for more
		closed := make(chan struct{})
		go func() {
			c.Close()
			close(closed)
		}()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("Close returned while the stream was being read")
		default:
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		<-closed
	})
}

func TestCloseStopsAReaderThatGetsNothing(t *testing.T) {
	// No bubble: in one, what never waits would never let Close begin to.
	c := chunk.NewParallelBlocks(io.MultiReader(bytes.NewReader(make([]byte, 2*chunk.MaxSize)), stalled{}), 1, chunk.MaxSize)
	if _, err := c.Next(nil); err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestResetBeginsAnotherStream(t *testing.T) {
	jotfs, err := chunk.Jotfs(chunk.DefaultJotfsAverage)
	if err != nil {
		t.Fatal(err)
	}
	data := random(60, 1<<20)
	for _, a := range []chunk.Algorithm{chunk.Canonical(), jotfs} {
		var want []int
		for _, b := range cutAll(t, a, bytes.NewReader(data)) {
			want = append(want, len(b))
		}
		for _, cutters := range []int{1, 100} {
			c, err := a.NewParallel(endless{}, cutters)
			if err != nil {
				t.Fatal(err)
			}
			for i, before := range []func(){
				func() {},
				func() { _, err = c.Next(nil) },
				func() {
					for range 12 {
						_, err = c.Next(nil)
					}
				},
				c.Close,
			} {
				if before(); err != nil {
					t.Fatal(err)
				}
				if err := c.Reset(bytes.NewReader(data)); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, lengths(t, c, data, io.EOF)); diff != "" {
					t.Errorf("%s, %d cutters, case %d: lengths (-want +got):\n%s", a, cutters, i, diff)
				}
				if err := c.Reset(endless{}); err != nil {
					t.Fatal(err)
				}
			}
			c.Close()
		}
	}
}

// FuzzParallel makes a stream of a program of four bytes for each part: what it consists of, how long it is,
// in units of 1 KiB and a few bytes, and a seed.
func FuzzParallel(f *testing.F) {
	f.Add([]byte("\x00\x03\x00\x01"), uint8(2), uint32(300_000), uint8(0), false)
	f.Add([]byte("\x00\xff\x00\x01\x01\xff\x03\x01\x00\xff\x00\x02"), uint8(3), uint32(chunk.MaxSize), uint8(1), false)
	f.Add([]byte("\x02\xff\x01\x01\x03\xff\x00\x02\x04\xff\x00\x09"), uint8(1), uint32(70_000), uint8(4), true)
	f.Add([]byte("\x00\xff\x00\x01\x04\xff\x01\x00\x04\xff\x00\x00\x04\xff\x00\x00"), uint8(2), uint32(2<<20), uint8(2), true)
	kinds := []string{"whole", "uneven", "halves", "data+EOF", "bytes"}
	f.Fuzz(func(t *testing.T, program []byte, cutters uint8, size uint32, kind uint8, fails bool) {
		data := run(program, 2<<20)
		r := readers[kinds[int(kind)%len(kinds)]](bytes.NewReader(data))
		end := io.EOF
		if fails {
			end = io.ErrUnexpectedEOF
			r = io.MultiReader(r, iotest.ErrReader(end))
		}
		// Blocks that are much shorter only take long.
		c := chunk.NewParallelBlocks(r, 1+int(cutters)%4, 1_000+int(size)%(3<<20))
		defer c.Close()
		if diff := cmp.Diff(serially(data, !fails), lengths(t, c, data, end)); diff != "" {
			t.Errorf("%d bytes, lengths (-serial +parallel):\n%s", len(data), diff)
		}
		again, err := chunk.Canonical().New(readers[kinds[int(kind)%len(kinds)]](bytes.NewReader(data)))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(serially(data, true), lengths(t, again, data, io.EOF)); diff != "" {
			t.Errorf("%d bytes, lengths (-want +serial):\n%s", len(data), diff)
		}
	})
}

// run makes the stream of a program, of at most so many bytes.
func run(program []byte, limit int) []byte {
	var data []byte
	for ; len(program) >= 4 && len(data) < limit; program = program[4:] {
		kind, n, seed := program[0], int(program[1])<<10+int(program[2]), program[3]
		part := make([]byte, n)
		switch kind % 5 {
		case 0:
			source := rand.NewChaCha8([32]byte{seed})
			_, _ = source.Read(part) // never fails
		case 1:
			part = bytes.Repeat([]byte{seed}, n)
		case 2:
			part = bytes.Repeat([]byte{seed, 1, 2}, n/3+1)[:n]
		case 3:
			part = bytes.Repeat(random(uint64(seed), 20_000+int(seed)), n/20_000+1)[:n]
		case 4: // what there is once more
			part = bytes.Clone(data[:min(n, len(data))])
		}
		data = append(data, part...)
	}
	return data[:min(len(data), limit)]
}
