package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// again is a build of a directory that was built from before. All files are looked at first, and none is
// opened. Where those of a chunk, and what decides where it ends, are as they were, the chunk is; what
// is between such chunks is read and cut until one of them begins.
//
// It relies on a chunk depending on nothing but the bytes from its beginning to one behind its end, and
// on how many follow where those are less than the longest chunk has.
type again struct {
	old *record
	// byIno finds the old files, start says where their content began in the old stream.
	byIno map[uint64]int32
	start []int64
	// cuts says where the old chunks begin; the last element is the end of the old stream.
	cuts      []int64
	byContent map[format.Digest]int32
	blobs     []*blob // of the old chunks, as far as they were asked for
	maxSize   int64
	store     Store

	root  *os.File // of the tree, to open files
	items []item   // the files with content, in the order of the stream
	total int64
	// at is the item where the search for the next one begins.
	at int
}

// item is a file of the new stream.
type item struct {
	fileState
	dir, name string // dir is relative to the root of the tree
	inode     *format.Inode
	start     int64
	old       int32 // the same file in the old stream; -1 for none
}

// newAgain prepares to build from root what r is the record of. root stays the caller's.
func newAgain(cfg *Config, r *record, root *os.File) *again {
	a := &again{
		old: r, root: root, store: cfg.Store, maxSize: int64(cfg.Chunker.MaxSize()),
		byIno: make(map[uint64]int32, len(r.files)), byContent: make(map[format.Digest]int32, len(r.chunks)),
		start: make([]int64, len(r.files)+1), cuts: make([]int64, len(r.chunks)+1), blobs: make([]*blob, len(r.chunks)),
	}
	for i := range r.files {
		if r.files[i].settled {
			a.byIno[r.files[i].ino] = int32(i)
		}
		a.start[i+1] = a.start[i] + r.files[i].size
	}
	for i := range r.chunks {
		a.byContent[r.chunks[i].content] = int32(i)
		a.cuts[i+1] = a.cuts[i] + int64(r.chunks[i].length)
	}
	return a
}

// find returns the number of a file in the old stream, or -1 if it is not as it was.
func (a *again) find(s fileState) int32 {
	if i, ok := a.byIno[s.ino]; ok && a.old.files[i].fileState == s {
		return i
	}
	return -1
}

// isPlain reports whether a file is known to have no extended attributes.
func (a *again) isPlain(s fileState) bool {
	i := a.find(s)
	return i >= 0 && a.old.files[i].plain
}

// add adds a file with content, the next in the stream.
func (a *again) add(dir, name string, s fileState, inode *format.Inode) {
	a.items = append(a.items, item{fileState: s, dir: dir, name: name, inode: inode, start: a.total, old: a.find(s)})
	a.total += s.size
}

// seek returns the index of the item that has the byte at pos, which is never before that of the last call.
func (a *again) seek(pos int64) int {
	for a.items[a.at].start+a.items[a.at].size <= pos {
		a.at++
	}
	return a.at
}

// reuse returns the old chunk that the stream has at pos, or nil, and its length.
func (a *again) reuse(pos int64) (*blob, int) {
	i := a.seek(pos)
	if a.items[i].old < 0 {
		return nil, 0
	}
	was := a.start[a.items[i].old] + pos - a.items[i].start
	n, ok := slices.BinarySearch(a.cuts, was)
	if !ok || n == len(a.old.chunks) {
		return nil, 0
	}
	left, wasLeft := a.total-pos, a.cuts[len(a.cuts)-1]-was
	if left != wasLeft && min(left, wasLeft) < a.maxSize {
		return nil, 0
	}
	length := a.cuts[n+1] - was
	// The byte behind the chunk, if there is one, is what ended it.
	for end := min(pos+length+1, a.total); a.items[i].start+a.items[i].size < end; i++ {
		if a.items[i+1].old != a.items[i].old+1 {
			return nil, 0
		}
	}
	b := a.known(int32(n))
	return b, int(length)
}

// known returns the blob of an old chunk, or nil if the store does not have it any more.
func (a *again) known(n int32) *blob {
	if a.blobs[n] == nil {
		c := &a.old.chunks[n]
		b := &blob{content: c.content, digest: c.blob, size: c.size, compressed: c.compressed, verity: c.verity, ready: make(chan struct{})}
		close(b.ready)
		if size, err := a.store.Size(c.blob); err != nil || size != c.size {
			b.err = fmt.Errorf("blob %s is gone", c.blob)
		}
		a.blobs[n] = b
	}
	if a.blobs[n].err != nil {
		return nil
	}
	return a.blobs[n]
}

// stored returns the blob of content that an old chunk had, or nil.
func (a *again) stored(content format.Digest) *blob {
	if n, ok := a.byContent[content]; ok {
		return a.known(n)
	}
	return nil
}

// pieces returns which files the n bytes at pos belong to.
func (a *again) pieces(pos int64, n int) []piece {
	var pieces []piece
	for i, offset := a.seek(pos), uint64(0); n > 0; i++ {
		it := &a.items[i]
		k := min(it.start+it.size-pos, int64(n))
		pieces = append(pieces, piece{it.inode, offset, uint64(k)})
		offset += uint64(k)
		pos += k
		n -= int(k)
	}
	return pieces
}

// cutAgain is cut for a build that knows an earlier one.
func (p *pipeline) cutAgain(ctx context.Context, a *again) (err error) {
	r := &gapReader{a: a}
	defer func() { err = errors.Join(err, r.close()) }()
	var c chunk.Chunker
	for pos, fresh := int64(0), true; pos < a.total; {
		if b, n := p.reuse(a, pos); b != nil {
			j := &job{pieces: a.pieces(pos, n), done: make(chan struct{}), blob: b}
			close(j.done)
			select {
			case p.order <- j:
			case <-ctx.Done():
				return ctx.Err()
			}
			pos += int64(n)
			fresh = true
			continue
		}
		if fresh {
			if err := r.seek(pos); err != nil {
				return err
			}
			if c == nil {
				c, err = p.cfg.Chunker.New(r)
			} else {
				err = c.Reset(r)
			}
			if err != nil {
				return err
			}
			fresh = false
		}
		data, err := c.Next((*p.buffer())[:0])
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

// reuse is a's, whose blobs the workers use, too.
func (p *pipeline) reuse(a *again, pos int64) (*blob, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return a.reuse(pos)
}

// gapReader reads the stream from some place on. Reading ahead of what is needed is what chunkers do.
type gapReader struct {
	a    *again
	item int
	off  int64 // in the item
	f    *os.File
}

// seek makes the next Read begin at pos.
func (r *gapReader) seek(pos int64) error {
	r.item = r.a.seek(pos)
	r.off = pos - r.a.items[r.item].start
	return r.close()
}

// close releases the file that is open.
func (r *gapReader) close() error {
	if r.f == nil {
		return nil
	}
	err := r.f.Close()
	r.f = nil
	return err
}

// Read implements io.Reader. It fails with ErrChanged if a file is not as it was when it was looked at.
func (r *gapReader) Read(p []byte) (int, error) {
	if r.item == len(r.a.items) {
		return 0, io.EOF
	}
	it := &r.a.items[r.item]
	if r.f == nil {
		var err error
		if r.f, err = r.a.open(it); err != nil {
			return 0, err
		}
	}
	// One byte more than the file should have tells whether it grew.
	left := it.size - r.off
	n, err := r.f.ReadAt(p[:min(int64(len(p)), left+1)], r.off)
	switch {
	case int64(n) > left:
		return 0, fmt.Errorf("read %s: longer than %d bytes: %w", r.f.Name(), it.size, ErrChanged)
	case errors.Is(err, io.EOF) && int64(n) < left:
		return 0, fmt.Errorf("read %s: shorter than %d bytes: %w", r.f.Name(), it.size, ErrChanged)
	case err != nil && !errors.Is(err, io.EOF):
		return 0, err
	}
	if r.off += int64(n); errors.Is(err, io.EOF) {
		r.item++
		r.off = 0
		return n, r.close()
	}
	return n, nil
}

// open opens the file of an item: name by name, so that no link is followed however somebody changes the
// tree, and a path may have any length.
func (a *again) open(it *item) (_ *os.File, err error) {
	path := filepath.Join(a.root.Name(), it.dir, it.name)
	dir := int(a.root.Fd())
	for name := range strings.SplitSeq(it.dir, "/") {
		if name == "" {
			continue
		}
		sub, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if dir != int(a.root.Fd()) {
			_ = unix.Close(dir) // it was for passing through
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		dir = sub
	}
	fd, err := unix.Openat(dir, it.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if dir != int(a.root.Fd()) {
		_ = unix.Close(dir)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(&os.PathError{Op: "stat", Path: path, Err: err}, f.Close())
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || stateOf(&st) != it.fileState {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, ErrChanged), f.Close())
	}
	return f, nil
}

// stateOf translates what stat says.
func stateOf(st *unix.Stat_t) fileState {
	return fileState{ino: st.Ino, size: st.Size, mtime: st.Mtim.Nano(), ctime: st.Ctim.Nano()}
}
