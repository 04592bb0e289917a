package builder_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	seekable "github.com/SaveTheRbtz/zstd-seekable-format-go/pkg"
	"github.com/klauspost/compress/zstd"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

func levels() []builder.CompressionLevel {
	return []builder.CompressionLevel{
		builder.CompressionFastest, builder.CompressionMedium, builder.CompressionBetter, builder.CompressionBest,
	}
}

func TestCompressionLevelNames(t *testing.T) {
	for _, level := range levels() {
		if got, err := builder.ParseCompressionLevel(level.String()); err != nil || got != level {
			t.Errorf("%v is read as %v, %v", level, got, err)
		}
	}
	for _, name := range []string{"", "3", "Fastest", "default"} {
		if got, err := builder.ParseCompressionLevel(name); err == nil {
			t.Errorf("%q is read as %v", name, got)
		}
	}
	_, err := builder.Build(t.Context(), builder.Config{Dir: t.TempDir(), Store: newStore(t), Tag: "t", Level: 4})
	if !errors.Is(err, builder.ErrConfig) {
		t.Errorf("a level that is none: %v, want ErrConfig", err)
	}
}

// What a compressor makes of a chunk depends on no other chunk, or which worker has which would show in the
// digests; and it is what was put in, in frames of a chunk each.
func TestCompressor(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	text := []byte(strings.Repeat("What it makes of a chunk depends on no other chunk. ", 20_000))
	inputs := [][]byte{
		nil,
		{0},
		text[:100], text[:64<<10], text[:128<<10+1], text[:256<<10], text, noise(rng, 64<<10), noise(rng, 300<<10),
		bytes.Repeat(noise(rng, 1000), 200), append(noise(rng, 70<<10), text[:150<<10]...),
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	for _, level := range levels() {
		used := builder.Compressor(t, level)
		for range 24 {
			data := inputs[rng.IntN(len(inputs))]
			got := used(data)
			if want := builder.Compressor(t, level)(data); !bytes.Equal(got, want) {
				t.Fatalf("%v: %d bytes become %d bytes other than those of an unused compressor", level, len(data), len(got))
			}
			r, err := seekable.NewReader(bytes.NewReader(got), dec)
			if err != nil {
				t.Fatalf("%v: %d bytes: %v", level, len(data), err)
			}
			back, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(back, data) {
				t.Fatalf("%v: %d bytes are read as %d others: %v", level, len(data), len(back), err)
			}
		}
	}
}

// A record of a build at another level is of no use: the image is that of the level asked for.
func TestBuildAgainAtAnotherLevel(t *testing.T) {
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(5, 6))
	var text strings.Builder
	for range 30_000 {
		fmt.Fprintf(&text, "%d words ", rng.IntN(1<<rng.IntN(16)+1)) // some more frequent than others
	}
	write(t, dir, map[string]string{"text": text.String()})
	record := filepath.Join(t.TempDir(), "record")
	s := newStore(t)
	seen := make(map[format.Digest]builder.CompressionLevel)
	for _, level := range levels() {
		cfg := builder.Later(builder.Config{Dir: dir, Store: s, Tag: "t", Compress: true, Level: level})
		cfg.Record = record
		again := build(t, cfg)
		want := build(t, builder.Config{Dir: dir, Store: newStore(t), Tag: "t", Compress: true, Level: level})
		if again.Manifest.Digest != want.Manifest.Digest {
			t.Errorf("%v after another level: %s, want %s", level, again.Manifest.Digest, want.Manifest.Digest)
		}
		if other, ok := seen[again.Manifest.Digest]; ok {
			t.Errorf("the image at level %v is that of %v", level, other)
		}
		seen[again.Manifest.Digest] = level
	}
}

// BenchmarkCompress compresses chunks of the Go installation, and says besides what they take, of their size.
func BenchmarkCompress(b *testing.B) {
	var chunks [][]byte
	total := 0
	for _, part := range []string{"src/runtime", "pkg/tool"} {
		for _, c := range chunksOf(b, filepath.Join(runtime.GOROOT(), part), 8<<20) { //nolint:staticcheck // where the files are, if anywhere
			chunks = append(chunks, c)
			total += len(c)
		}
	}
	for _, level := range levels() {
		b.Run(level.String(), func(b *testing.B) {
			compress := builder.Compressor(b, level)
			b.SetBytes(int64(total))
			b.ReportAllocs()
			small := 0
			for b.Loop() {
				small = 0
				for _, c := range chunks {
					small += min(len(compress(c)), len(c))
				}
			}
			b.ReportMetric(float64(small)/float64(total)*100, "%size")
		})
	}
}

// chunksOf cuts the files below dir, until there are so many bytes.
func chunksOf(b *testing.B, dir string, enough int) [][]byte {
	b.Helper()
	var content []byte
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if len(content) >= enough {
			return fs.SkipAll
		}
		data, err := os.ReadFile(path)
		content = append(content, data...)
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	c, err := chunk.Canonical().New(bytes.NewReader(content))
	if err != nil {
		b.Fatal(err)
	}
	var chunks [][]byte
	for {
		data, err := c.Next(nil)
		if errors.Is(err, io.EOF) {
			return chunks
		}
		if err != nil {
			b.Fatal(err)
		}
		chunks = append(chunks, data)
	}
}
