package verity_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// The empty file's digest is in the fsverity-utils documentation; the others are those of
// the reference's worked example and of its images in testdata.
func TestSumKnownAnswers(t *testing.T) {
	blob := func(layout, hex string) string {
		return filepath.Join("..", "..", "testdata", "images", layout, "blobs", "sha256", hex)
	}
	tests := []struct{ name, file, want string }{
		{"readme rootfs", filepath.Join("..", "..", "testdata", "readme-example", "rootfs.bin"), "9ac9abc098870c55cc61431dae8635806273d8f61274d34bec062560e79dc2f5"},
		{"readme metadata", filepath.Join("..", "..", "testdata", "readme-example", "metadata.bin"), "e0b43fc18ec618af4e2a7ee3fdbb66a21f4d55fccd89c6d81ad571ee904f5df4"},
		{"manifest small", blob("v3-master", "9f6cda1472e370be2a773a9dd47bdd6b58d9f69b8406360ba264a59d41373ca7"), "c538c09bd36d5b265077e224a31708ca5943c0c19e96e620581d624604b08b30"},
		{"manifest segments", blob("v3-master", "3321cc822cb53527d1c509377a8d23fba84c9bb0ecdfdccc2dc155e1a3e6a5dc"), "b1d4235b953628423b7f0a3679caa9fb1870fded697a4c43d688b1c6be94e21f"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, err := os.ReadFile(tt.file)
			if err != nil {
				t.Fatal(err)
			}
			if got := verity.Sum(b).String(); got != tt.want {
				t.Errorf("Sum = %s, want %s", got, tt.want)
			}
		})
	}
	if got, want := verity.Sum(nil).String(), "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95"; got != want {
		t.Errorf("Sum of nothing = %s, want %s", got, want)
	}
}

// Sizes around the places where a level of the tree begins.
func TestHashInPieces(t *testing.T) {
	const block, level1 = verity.BlockSize, verity.BlockSize * 128
	rng := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int{0, 1, block - 1, block, block + 1, 2 * block, level1 - 1, level1, level1 + 1, level1 + block, 128*level1 - 1, 128 * level1, 128*level1 + 1} {
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		want := verity.Sum(data)
		h := verity.New()
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 1+rng.IntN(3*block))
			if _, err := h.Write(rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if got := h.Digest(); got != want {
			t.Errorf("%d bytes in pieces: %s, at once: %s", size, got, want)
		}
		got, err := verity.SumReader(bytes.NewReader(data))
		if err != nil || got != want {
			t.Errorf("SumReader of %d bytes: %s, %v, want %s", size, got, err, want)
		}
	}
}

// Any number of blocks, of which some are hashed side by side where the CPU can.
func TestSumIsTheDefinition(t *testing.T) {
	data := make([]byte, 150*verity.BlockSize)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(data) // never fails
	for blocks := range 140 {
		for _, size := range []int{blocks * verity.BlockSize, blocks*verity.BlockSize + 1, (blocks+1)*verity.BlockSize - 1} {
			from := data[blocks:]
			if got, want := verity.Sum(from[:size]), define(from[:size]); got != want {
				t.Errorf("Sum of %d bytes = %s, want %s", size, got, want)
			}
		}
	}
}

// Contents of all lengths, in groups of any size, by a Summer that was used before.
func TestSummer(t *testing.T) {
	data := make([]byte, 200*verity.BlockSize)
	_, _ = rand.NewChaCha8([32]byte{8}).Read(data) // never fails
	rng := rand.New(rand.NewPCG(8, 9))
	var s verity.Summer
	for _, n := range []int{0, 1, 2, 15, 16, 17, 40} {
		for _, longest := range []int{1, verity.BlockSize, 30 * verity.BlockSize, len(data)} {
			contents, sums := make([][]byte, n), make([]verity.Digest, n)
			for i := range contents {
				contents[i] = data[:rng.IntN(longest+1)]
				if i%5 == 0 {
					contents[i] = data[:longest]
				}
			}
			s.Sum(sums, contents)
			for i, b := range contents {
				if want := define(b); sums[i] != want {
					t.Errorf("content %d of %d, %d bytes: %s, want %s", i, n, len(b), sums[i], want)
				}
			}
		}
	}
}

// define computes a digest as fsverity.rst defines it.
func define(b []byte) verity.Digest {
	root := make([]byte, sha256.Size)
	for level := b; len(level) > 0; {
		var hashes []byte
		for ; len(level) > 0; level = level[min(len(level), verity.BlockSize):] {
			var block [verity.BlockSize]byte
			copy(block[:], level)
			sum := sha256.Sum256(block[:])
			hashes = append(hashes, sum[:]...)
		}
		if len(hashes) == sha256.Size {
			root = hashes
			break
		}
		level = hashes
	}
	descriptor := binary.LittleEndian.AppendUint64([]byte{1, 1, 12, 0, 0, 0, 0, 0}, uint64(len(b)))
	descriptor = append(descriptor, root...)
	return sha256.Sum256(append(descriptor, make([]byte, 256-len(descriptor))...))
}

func TestSumReaderError(t *testing.T) {
	if _, err := verity.SumReader(io.MultiReader(bytes.NewReader([]byte("x")), failing{})); !errors.Is(err, os.ErrClosed) {
		t.Errorf("error %v, want os.ErrClosed", err)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, os.ErrClosed }

func TestParse(t *testing.T) {
	d := verity.Sum([]byte("x"))
	if got, err := verity.Parse(d.String()); err != nil || got != d {
		t.Errorf("Parse(%s) = %s, %v", d, got, err)
	}
	for _, s := range []string{"", "ab", d.String() + "00", "sha256:" + d.String(), "G" + d.String()[1:], "ABCDEF" + d.String()[6:], strings.Repeat("0", 64)} {
		if _, err := verity.Parse(s); !errors.Is(err, verity.ErrInvalidDigest) {
			t.Errorf("Parse(%q): %v, want ErrInvalidDigest", s, err)
		}
	}
}

// On a file system with fs-verity the kernel must agree with Sum; on one without, the
// errors must say so. Both are asserted, whichever applies.
func TestEnableAndMeasure(t *testing.T) {
	name := filepath.Join(t.TempDir(), "blob")
	data := bytes.Repeat([]byte("puzzle"), 3000)
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = verity.Measure(f)
	if !errors.Is(err, verity.ErrNotEnabled) && !errors.Is(err, verity.ErrNotSupported) {
		t.Errorf("Measure of an unsealed file: %v", err)
	}
	if err := verity.Enable(f); err != nil {
		if !errors.Is(err, verity.ErrNotSupported) {
			t.Fatalf("Enable: %v, want success or ErrNotSupported", err)
		}
		t.Logf("no fs-verity on this file system: %v", err)
		return
	}
	if err := verity.Enable(f); err != nil {
		t.Errorf("Enable again: %v", err)
	}
	got, err := verity.Measure(f)
	if err != nil || got != verity.Sum(data) {
		t.Errorf("Measure = %s, %v, want %s", got, err, verity.Sum(data))
	}
}

func BenchmarkSum(b *testing.B) {
	data := make([]byte, 64<<10)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		verity.Sum(data)
	}
}
