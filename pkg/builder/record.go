package builder

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// fileState is what tells whether a file of this host is as it was: every change of its content or its
// attributes sets its ctime, which nobody can set to what it was.
type fileState struct {
	ino          uint64
	size         int64
	mtime, ctime int64 // nanoseconds since 1970
}

// recordedFile is a file of a finished build.
type recordedFile struct {
	fileState
	// settled is false for one that might change without its state telling, because it was
	// changed so shortly before that the clock of its file system may not have moved on since.
	settled bool
	// plain says that it has no extended attributes.
	plain bool
}

// recordedChunk is a chunk of a finished build.
type recordedChunk struct {
	length     uint32        // uncompressed
	content    format.Digest // of the uncompressed content
	blob       format.Digest
	size       int64 // of the blob, in bytes
	compressed bool
	verity     verity.Digest
}

// record is what a finished build knew of the files that it read: the stream of their contents, one after
// another, and how that was cut.
type record struct {
	files  []recordedFile
	chunks []recordedChunk
}

// settledAfter is how long before a build begins a file must have been changed last, at least. The clocks of
// file systems move on every 10 ms; some servers' and FAT's every two seconds.
const settledAfter = 2500 * time.Millisecond

// recordMagic begins a file with a record. What is behind is, little-endian: the length of a text, the
// text, which says what the record is of; the number of files, the files; the number of chunks, the
// chunks. A SHA-256 of all that ends it.
const recordMagic = "puzzlefs build record 1\n"

// Bytes that files and chunks take in a record.
const (
	fileBytes  = 8 + 8 + 8 + 8 + 1
	chunkBytes = 4 + 3*32 + 8 + 1
)

// Flags of files and chunks.
const (
	flagSettled    = 1
	flagPlain      = 2
	flagCompressed = 1
)

// recordKey says what a record can be used for: a build that cuts and stores in the same way.
func (c *Config) recordKey() (string, error) {
	minimal, err := c.Minimal.encode()
	if err != nil {
		return "", err
	}
	compression := "none"
	if c.Compress {
		compression = c.Level.String()
	}
	return fmt.Sprintf("%s compression=%s %s", c.Chunker, compression, minimal), nil
}

// loadRecord reads a record. It returns nil if there is none that can be used, which costs time only.
func loadRecord(path, key string) *record {
	b, err := os.ReadFile(path)
	if err != nil || len(b) < sha256.Size {
		return nil
	}
	b, sum := b[:len(b)-sha256.Size], b[len(b)-sha256.Size:]
	if s := sha256.Sum256(b); !bytes.Equal(s[:], sum) {
		return nil
	}
	head := binary.LittleEndian.AppendUint32([]byte(recordMagic), uint32(len(key)))
	b, ok := bytes.CutPrefix(b, append(head, key...))
	if !ok {
		return nil
	}
	files, b, ok := cutList(b, fileBytes)
	if !ok {
		return nil
	}
	chunks, b, ok := cutList(b, chunkBytes)
	if !ok || len(b) > 0 {
		return nil
	}
	r := &record{files: make([]recordedFile, len(files)/fileBytes), chunks: make([]recordedChunk, len(chunks)/chunkBytes)}
	for i := range r.files {
		r.files[i].decode(files[i*fileBytes:])
	}
	for i := range r.chunks {
		r.chunks[i].decode(chunks[i*chunkBytes:])
	}
	if !r.adds() {
		return nil
	}
	return r
}

// cutList splits a list with its length off b.
func cutList(b []byte, size int) (list, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := int64(binary.LittleEndian.Uint32(b)) * int64(size)
	if b = b[4:]; n > int64(len(b)) {
		return nil, nil, false
	}
	return b[:n], b[n:], true
}

func (f *recordedFile) decode(b []byte) {
	f.ino = binary.LittleEndian.Uint64(b)
	f.size = int64(binary.LittleEndian.Uint64(b[8:]))
	f.mtime = int64(binary.LittleEndian.Uint64(b[16:]))
	f.ctime = int64(binary.LittleEndian.Uint64(b[24:]))
	f.settled, f.plain = b[32]&flagSettled != 0, b[32]&flagPlain != 0
}

func (c *recordedChunk) decode(b []byte) {
	c.length = binary.LittleEndian.Uint32(b)
	copy(c.content[:], b[4:])
	copy(c.blob[:], b[36:])
	copy(c.verity[:], b[68:])
	c.size = int64(binary.LittleEndian.Uint64(b[100:]))
	c.compressed = b[108]&flagCompressed != 0
}

// adds reports whether the chunks are those of the files.
func (r *record) adds() bool {
	var left int64
	for i := range r.chunks {
		if r.chunks[i].length == 0 {
			return false
		}
		left += int64(r.chunks[i].length)
	}
	for i := range r.files {
		if left -= r.files[i].size; r.files[i].size <= 0 || left < 0 {
			return false
		}
	}
	return left == 0
}

// save writes a record in the place of an earlier one.
func (r *record) save(path, key string) (err error) {
	b := make([]byte, 0, len(recordMagic)+len(key)+12+len(r.files)*fileBytes+len(r.chunks)*chunkBytes+sha256.Size)
	b = append(b, recordMagic...)
	b = append(binary.LittleEndian.AppendUint32(b, uint32(len(key))), key...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(r.files)))
	for i := range r.files {
		f := &r.files[i]
		b = binary.LittleEndian.AppendUint64(b, f.ino)
		b = binary.LittleEndian.AppendUint64(b, uint64(f.size))
		b = binary.LittleEndian.AppendUint64(b, uint64(f.mtime))
		b = binary.LittleEndian.AppendUint64(b, uint64(f.ctime))
		b = append(b, flag(f.settled, flagSettled)|flag(f.plain, flagPlain))
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(r.chunks)))
	for i := range r.chunks {
		c := &r.chunks[i]
		b = binary.LittleEndian.AppendUint32(b, c.length)
		b = append(append(append(b, c.content[:]...), c.blob[:]...), c.verity[:]...)
		b = binary.LittleEndian.AppendUint64(b, uint64(c.size))
		b = append(b, flag(c.compressed, flagCompressed))
	}
	sum := sha256.Sum256(b)
	b = append(b, sum[:]...)
	// A record says which files somebody has: it is nobody else's business.
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func flag(set bool, bit byte) byte {
	if set {
		return bit
	}
	return 0
}

// memory is what a build knows of an earlier one of the same directory, and leaves to a later one.
type memory struct {
	path, key string
	began     time.Time
	again     *again // nil if there was none
	record    record // of this build
}

// remember returns the memory of a build from root, or nil if it has none.
func (c *Config) remember(root *hostDir) (*memory, error) {
	if c.Record == "" {
		return nil, nil //nolint:nilnil // that there is no memory is no error
	}
	m := &memory{path: c.Record, began: c.now}
	if m.began.IsZero() {
		m.began = time.Now()
	}
	var err error
	if m.key, err = c.recordKey(); err != nil {
		return nil, err
	}
	if old := loadRecord(m.path, m.key); old != nil {
		m.again = newAgain(c, old, root)
	}
	return m, nil
}

// note adds a file to the record.
func (m *memory) note(s fileState, size int64, inode *format.Inode) {
	settled := m.began.Add(-settledAfter).UnixNano()
	m.record.files = append(m.record.files, recordedFile{
		fileState: fileState{ino: s.ino, size: size, mtime: s.mtime, ctime: s.ctime},
		settled:   s.size == size && s.mtime < settled && s.ctime < settled,
		plain:     len(inode.Xattrs) == 0,
	})
}

// noteAll adds all files of a build that knows an earlier one.
func (m *memory) noteAll() {
	m.record.files = make([]recordedFile, 0, len(m.again.items))
	for i := range m.again.items {
		it := &m.again.items[i]
		m.note(it.fileState, it.size, it.inode)
	}
}

// save leaves the record to later builds.
func (m *memory) save() error {
	if m == nil {
		return nil
	}
	if err := m.record.save(m.path, m.key); err != nil {
		return fmt.Errorf("save the record of the build: %w", err)
	}
	return nil
}
