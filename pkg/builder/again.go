package builder

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

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
	// last is the old file that was found last, byIno finds those that come in another order; nil
	// until there is one. start says where their content began in the old stream.
	last  int
	byIno map[uint64]int32
	start []int64
	// cuts says where the old chunks begin; the last element is the end of the old stream.
	cuts      []int64
	byContent map[format.Digest]int32
	blobs     []blob // of the old chunks; not to be used before look is done
	maxSize   int64
	store     Store

	root  *hostDir // of the tree, to open files
	items []item   // the files with content, in the order of the stream
	total int64
	// at is the item where the search for the next one begins.
	at int
}

// errGone says that the store does not have a blob of an old chunk as it was.
var errGone = errors.New("the blob is gone")

// item is a file of the new stream.
type item struct {
	fileState
	dir, name string // dir is relative to the root of the tree
	inode     *format.Inode
	start     int64
	old       int32 // the same file in the old stream; -1 for none
}

// newAgain prepares to build from root what r is the record of. root stays the caller's.
func newAgain(cfg *Config, r *record, root *hostDir) *again {
	a := &again{
		old: r, root: root, store: cfg.Store, maxSize: int64(cfg.Chunker.MaxSize()),
		items: make([]item, 0, len(r.files)+len(r.files)/16), byContent: make(map[format.Digest]int32, len(r.chunks)),
		start: make([]int64, len(r.files)+1), cuts: make([]int64, len(r.chunks)+1), blobs: make([]blob, len(r.chunks)),
	}
	for i := range r.files {
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
	i := a.number(s.ino)
	if i < 0 || !a.old.files[i].settled || a.old.files[i].fileState != s {
		return -1
	}
	return int32(i)
}

// number returns the number that an inode had in the old stream, or -1 if it was not there.
func (a *again) number(ino uint64) int {
	// Most come in the order in which they came then, and are asked for twice.
	for i := a.last; i < min(a.last+2, len(a.old.files)); i++ {
		if a.old.files[i].ino == ino {
			a.last = i
			return i
		}
	}
	if a.byIno == nil {
		a.byIno = make(map[uint64]int32, len(a.old.files))
		for i := range a.old.files {
			a.byIno[a.old.files[i].ino] = int32(i)
		}
	}
	i, ok := a.byIno[ino]
	if !ok {
		return -1
	}
	a.last = int(i)
	return a.last
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
	return a.known(int32(n)), int(length)
}

// expect returns how many bytes behind pos the stream is cut next, as far as what is known of the old one
// tells: that is right almost always, but nothing may rely on it.
func (a *again) expect(pos int64) int64 {
	for i := a.seek(pos); i < len(a.items) && a.items[i].start-pos < a.maxSize; i++ {
		it := &a.items[i]
		if it.old < 0 {
			continue
		}
		// A chunk has more than one byte.
		from := max(pos+1, it.start)
		was := a.start[it.old] + from - it.start
		n, _ := slices.BinarySearch(a.cuts, was)
		if n < len(a.cuts) && a.cuts[n] < a.start[it.old]+it.size {
			return min(from-pos+a.cuts[n]-was, a.maxSize)
		}
	}
	return a.maxSize
}

// look finds out which blobs of old chunks the store still has. It looks at several at a time.
func (a *again) look(ctx context.Context, workers int) error {
	const batch = 256
	ready := make(chan struct{})
	close(ready)
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range workers {
		g.Go(func() error {
			for {
				end := int(next.Add(batch))
				if end-batch >= len(a.blobs) {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				for n := end - batch; n < min(end, len(a.blobs)); n++ {
					c := &a.old.chunks[n]
					a.blobs[n] = blob{ready: ready, content: c.content, digest: c.blob, size: c.size, compressed: c.compressed, verity: c.verity}
					if size, err := a.store.Size(c.blob); err != nil || size != c.size {
						a.blobs[n].err = errGone
					}
				}
			}
		})
	}
	return g.Wait()
}

// known returns the blob of an old chunk, or nil if the store does not have it any more.
func (a *again) known(n int32) *blob {
	if a.blobs[n].err != nil {
		return nil
	}
	return &a.blobs[n]
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
