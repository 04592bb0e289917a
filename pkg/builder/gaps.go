package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
)

// cutAgain is cut for a build that knows an earlier one.
func (p *pipeline) cutAgain(ctx context.Context, a *again) (err error) {
	g := &gapCutter{r: gapReader{a: a, fd: -1, dir: -1}, chunker: p.cfg.Chunker}
	defer g.r.close()
	reused := make(chan struct{}) // of all jobs that wait for nothing
	close(reused)
	for pos, fresh := int64(0), true; pos < a.total; {
		if b, n := a.reuse(pos); b != nil {
			select {
			case p.order <- &job{pieces: a.pieces(pos, n), done: reused, blob: b}:
			case <-ctx.Done():
				return ctx.Err()
			}
			pos += int64(n)
			fresh = true
			continue
		}
		if fresh {
			if err := g.seek(pos); err != nil {
				return err
			}
			fresh = false
		}
		data, err := g.next((*p.buffer())[:0], a.expect(pos))
		if err != nil {
			return err
		}
		if err := p.hand(ctx, &job{data: data, pieces: a.pieces(pos, len(data)), done: make(chan struct{})}); err != nil {
			return err
		}
		pos += int64(len(data))
	}
	return nil
}

// gapCutter cuts what is between known chunks.
type gapCutter struct {
	r       gapReader
	chunker chunk.Algorithm
	// rest is what was read behind the last chunk, if that was cut here.
	rest []byte
	// other cuts, if that is not done here.
	other chunk.Chunker
}

// seek makes the next chunk begin at pos.
func (g *gapCutter) seek(pos int64) (err error) {
	g.r.seek(pos)
	g.rest = g.rest[:0]
	switch {
	case g.chunker == chunk.Canonical():
	case g.other == nil:
		g.other, err = g.chunker.New(&g.r)
	default:
		err = g.other.Reset(&g.r)
	}
	return err
}

// next appends the next chunk to dst, which is empty and has room for the longest. A chunker reads as much as
// the longest takes, however soon the cut comes, which is a waste in a tree of small files: each has to be
// opened. So no more is read at first than the expected chunk and the byte behind it, which ends it.
func (g *gapCutter) next(dst []byte, expected int64) ([]byte, error) {
	if g.other != nil {
		return g.other.Next(dst)
	}
	dst = append(dst, g.rest...)
	for want := min(int(expected)+1, chunk.MaxSize); ; want = min(want+chunk.AverageSize, chunk.MaxSize) {
		ended := false
		for len(dst) < want && !ended {
			n, err := g.r.Read(dst[len(dst):want])
			dst = dst[:len(dst)+n]
			if ended = errors.Is(err, io.EOF); err != nil && !ended {
				return nil, err
			}
		}
		n := chunk.Cut(dst)
		if n < len(dst) || n == chunk.MaxSize || ended {
			g.rest = append(g.rest[:0], dst[n:]...)
			return dst[:n], nil
		}
	}
}

// gapReader reads the stream from some place on. Reading ahead of what is needed is what chunkers do.
type gapReader struct {
	a    *again
	item int
	off  int64 // in the item
	fd   int   // of the item; -1 while it is not open
	// dir is the directory that the last file was opened in, for the next, which is its neighbour, and
	// rel its path; -1 for none.
	dir int
	rel string
}

// seek makes the next Read begin at pos.
func (r *gapReader) seek(pos int64) {
	r.closeFile()
	r.item = r.a.seek(pos)
	r.off = pos - r.a.items[r.item].start
}

// close releases what is open.
func (r *gapReader) close() {
	r.closeFile()
	r.closeDir()
}

func (r *gapReader) closeFile() {
	if r.fd >= 0 {
		_ = unix.Close(r.fd) // it was read only
		r.fd = -1
	}
}

func (r *gapReader) closeDir() {
	if r.dir >= 0 {
		_ = unix.Close(r.dir) // it was for passing through
		r.dir = -1
	}
}

// path returns the path of an item, for messages.
func (r *gapReader) path(it *item) string { return filepath.Join(r.a.root.name, it.dir, it.name) }

// Read implements io.Reader. It fails with ErrChanged if a file is not as it was when it was looked at.
func (r *gapReader) Read(p []byte) (int, error) {
	if r.item == len(r.a.items) {
		return 0, io.EOF
	}
	it := &r.a.items[r.item]
	if r.fd < 0 {
		if err := r.open(it); err != nil {
			return 0, err
		}
	}
	// One byte more than the file should have tells whether it grew.
	left := it.size - r.off
	n, err := unix.Pread(r.fd, p[:min(int64(len(p)), left+1)], r.off)
	switch {
	case errors.Is(err, unix.EINTR):
		return 0, nil
	case err != nil:
		return 0, &os.PathError{Op: "read", Path: r.path(it), Err: err}
	case int64(n) > left:
		return 0, fmt.Errorf("read %s: longer than %d bytes: %w", r.path(it), it.size, ErrChanged)
	case n == 0 && left > 0:
		return 0, fmt.Errorf("read %s: shorter than %d bytes: %w", r.path(it), it.size, ErrChanged)
	case int64(n) == left && (n < len(p) || n == 0):
		r.closeFile()
		r.item++
		r.off = 0
		return n, nil
	}
	r.off += int64(n)
	return n, nil
}

// open opens the file of an item: name by name, so that no link is followed however somebody changes the
// tree, and a path may have any length.
func (r *gapReader) open(it *item) error {
	if err := r.enter(it.dir); err != nil {
		return &os.PathError{Op: "open", Path: r.path(it), Err: err}
	}
	fd, err := openAt(r.dir, it.name, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return &os.PathError{Op: "open", Path: r.path(it), Err: err}
	}
	r.fd = fd
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: r.path(it), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || stateOf(&st) != it.fileState {
		return fmt.Errorf("open %s: %w", r.path(it), ErrChanged)
	}
	return nil
}

// enter makes r.dir the directory at a path below the root.
func (r *gapReader) enter(rel string) error {
	if r.dir >= 0 && r.rel == rel {
		return nil
	}
	r.closeDir()
	const flags = unix.O_PATH | unix.O_DIRECTORY
	dir, err := openAt(r.a.root.fd, ".", flags)
	for name := range strings.SplitSeq(rel, "/") {
		if err != nil {
			return err
		}
		if name == "" {
			continue
		}
		above := dir
		dir, err = openAt(above, name, flags)
		_ = unix.Close(above) // it was for passing through
	}
	if err != nil {
		return err
	}
	r.dir, r.rel = dir, rel
	return nil
}

// stateOf translates what stat says.
func stateOf(st *unix.Stat_t) fileState {
	return fileState{ino: st.Ino, size: st.Size, mtime: st.Mtim.Nano(), ctime: st.Ctim.Nano()}
}
