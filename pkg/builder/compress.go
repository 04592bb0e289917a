package builder

import (
	"bytes"
	"fmt"

	seekable "github.com/SaveTheRbtz/zstd-seekable-format-go/pkg"
	"github.com/klauspost/compress/zstd"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
)

// frameSize is the uncompressed size of a frame of a compressed blob, in bytes: a chunk of the
// canonical chunker is one frame. Readers take any. The reference writes 4 KiB; a reader here wants the
// whole chunk anyway, and the larger the frames, the smaller the blobs and the sooner they are
// inflated.
const frameSize = chunk.MaxSize

// compressor makes seekable zstd blobs: frames of frameSize, then a seek table. It is not
// safe for concurrent use. Its output depends on nothing but the input.
type compressor struct {
	enc *zstd.Encoder
	buf bytes.Buffer
}

func newCompressor() (*compressor, error) {
	enc, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(3)),
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false)) // blobs are named by their SHA-256
	if err != nil {
		return nil, fmt.Errorf("make zstd encoder: %w", err)
	}
	return &compressor{enc: enc}, nil
}

// compress returns the compressed form of data. It is valid until the next call.
func (c *compressor) compress(data []byte) ([]byte, error) {
	c.buf.Reset()
	w, err := seekable.NewWriter(&c.buf, c.enc)
	if err != nil {
		return nil, err
	}
	for len(data) > 0 {
		n := min(len(data), frameSize)
		if _, err := w.Write(data[:n]); err != nil {
			return nil, err
		}
		data = data[n:]
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return c.buf.Bytes(), nil
}

func (c *compressor) close() { _ = c.enc.Close() } // nothing is buffered between calls
