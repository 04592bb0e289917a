package fuse_test

import (
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strconv"
	"testing"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
)

// BenchmarkListPlus answers READDIRPLUS for a directory of 10,000 names, as large as the
// kernel asks. Bytes are those of the answers.
func BenchmarkListPlus(b *testing.B) {
	const n = 10_000
	inodes := format.InodeVector{{Ino: 1, Kind: format.KindDir, Perm: 0o755}}
	for i := range n {
		inodes[0].Entries = append(inodes[0].Entries, format.DirEntry{Ino: uint64(i) + 2, Name: fmt.Appendf(nil, "name-%05d", i)})
		inodes = append(inodes, format.Inode{Ino: uint64(i) + 2, Kind: format.KindFile, Perm: 0o644})
	}
	f := fuse.NewFilesystem((&memory{}).image(b, inodes), slog.New(slog.DiscardHandler))
	buf := make([]byte, 32<<10)
	b.ReportAllocs()
	for b.Loop() {
		var total int64
		for off := uint64(0); ; {
			list := gofuse.NewDirEntryList(buf, off)
			f.ReadDirPlus(nil, &gofuse.ReadIn{InHeader: gofuse.InHeader{NodeId: 1}, Offset: off}, list)
			if len(list.Bytes()) == 0 {
				break
			}
			total += int64(len(list.Bytes()))
			off = list.Offset
		}
		b.SetBytes(total)
	}
}

// BenchmarkReadSequential reads a file of 64 MiB from its mount, past the page cache, so
// that every byte is a request. What is allocated is allocated by reader and server.
func BenchmarkReadSequential(b *testing.B) {
	for _, piece := range []int{128 << 10, 1 << 20} {
		b.Run(strconv.Itoa(piece>>10)+"KiB", func(b *testing.B) {
			const size = 64 << 20
			dir, _ := built(b, pattern(size))
			fd, err := unix.Open(filepath.Join(dir, "file"), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
			if err != nil {
				b.Fatal(err)
			}
			defer unix.Close(fd)
			buf := unsafeBuffer(piece)
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				for off := int64(0); off < size; {
					n, err := unix.Pread(fd, buf, off)
					if err != nil || n == 0 {
						b.Fatalf("read at %d: %d, %v", off, n, err)
					}
					off += int64(n)
				}
			}
		})
	}
}

// BenchmarkSmallFiles opens, reads and closes 2,000 files of 4 KiB from their mount: from
// the server, and from the page cache.
func BenchmarkSmallFiles(b *testing.B) {
	for name, flags := range map[string]int{"server": unix.O_DIRECT, "pagecache": 0} {
		b.Run(name, func(b *testing.B) {
			const n, size = 2000, 4096
			files := make(map[string]string, n)
			content := pattern(n * size)
			for i := range n {
				files[strconv.Itoa(i)] = string(content[i*size : (i+1)*size])
			}
			needRoot(b)
			s, root := build(b, tree(b, files))
			_, dir := mount(b, openImage(b, s, root))
			buf := unsafeBuffer(size)
			b.SetBytes(n * size)
			b.ReportAllocs()
			for b.Loop() {
				for i := range n {
					if err := readSmall(filepath.Join(dir, strconv.Itoa(i)), flags, buf); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

func readSmall(path string, flags int, buf []byte) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	n, err := unix.Read(fd, buf)
	if err == nil && n != len(buf) {
		err = io.ErrUnexpectedEOF
	}
	return err
}
