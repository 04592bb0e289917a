package image

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// head is a layer of which inodes are left to be merged, the first being at next.
type head struct {
	inodes format.InodeVector
	next   int
	layer  int // 0 is the topmost
}

func (h *head) ino() uint64 { return h.inodes[h.next].Ino }

// less says that h is merged before o: by inode number, then from the top down.
func (h *head) less(o *head) bool {
	return h.ino() < o.ino() || h.ino() == o.ino() && h.layer < o.layer
}

// heads is a binary heap of layers. How many there are is up to whoever made the image, so
// that nobody may look at all of them for every inode.
type heads []head

func newHeads(layers []format.InodeVector) heads {
	h := make(heads, 0, len(layers))
	for i, l := range layers {
		if len(l) > 0 {
			h = append(h, head{inodes: l, layer: i})
		}
	}
	// What is sorted is a heap.
	slices.SortFunc(h, func(a, b head) int {
		return cmp.Or(cmp.Compare(a.ino(), b.ino()), cmp.Compare(a.layer, b.layer))
	})
	return h
}

// pop takes the inodes of the lowest number from the topmost layer that has it: one, or
// several in an image of the reference's that uses a number twice.
func (h *heads) pop() format.InodeVector {
	top := &(*h)[0]
	first, ino := top.next, top.ino()
	for top.next < len(top.inodes) && top.ino() == ino {
		top.next++
	}
	same := top.inodes[first:top.next]
	if top.next == len(top.inodes) {
		last := len(*h) - 1
		(*h)[0] = (*h)[last]
		*h = (*h)[:last]
	}
	h.sink()
	return same
}

// sink moves the first layer to where it belongs.
func (h *heads) sink() {
	list := *h
	for i := 0; ; {
		least := i
		for child := 2*i + 1; child <= 2*i+2 && child < len(list); child++ {
			if list[child].less(&list[least]) {
				least = child
			}
		}
		if least == i {
			return
		}
		list[i], list[least] = list[least], list[i]
		i = least
	}
}

// merge makes one list of the inodes of all layers.
func (b *indexer) merge(layers []format.InodeVector) error {
	duplicates := 0
	for left := newHeads(layers); len(left) > 0; {
		layer, ino := left[0].layer, left[0].ino()
		same := left.pop()
		inode := &same[0]
		if len(same) > 1 {
			inode = layers[layer].Find(ino)
			if !allWhiteouts(same) {
				duplicates++
			}
		}
		below := lookBelow{inode: inode}
		for len(left) > 0 && left[0].ino() == ino {
			layer := left[0].layer
			lower := &left.pop()[0]
			if below.inode.LookBelow {
				// Of several the one that the reference reads.
				lower = layers[layer].Find(ino)
			}
			below.add(lower)
		}
		if inode = below.inode; inode.Kind == format.KindWhiteout {
			inode = nil
		}
		b.merged, b.inos = append(b.merged, inode), append(b.inos, ino)
	}
	if len(b.merged) > math.MaxUint32-1 {
		return fmt.Errorf("%d inodes: %w", len(b.merged), format.ErrTooLarge)
	}
	if duplicates > 0 {
		b.warnings = append(b.warnings, fmt.Sprintf("%d inode numbers are used twice in one layer, which a delta of the reference does to hard links that were broken; the inode that the reference would read is taken: rebuild the image", duplicates))
	}
	return nil
}

func allWhiteouts(inodes []format.Inode) bool {
	return !slices.ContainsFunc(inodes, func(i format.Inode) bool { return i.Kind != format.KindWhiteout })
}

// lookBelow merges the lists of a directory that says to look below with those of the
// lower layers' directories of its number.
type lookBelow struct {
	inode *format.Inode   // a copy, once there is something to merge
	seen  map[string]bool // names in the copy
}

// add adds the inode that the next layer has, as long as each so far says to look below.
// A name that is there hides that of the lower layer.
func (l *lookBelow) add(lower *format.Inode) {
	if l.inode.Kind != format.KindDir || !l.inode.LookBelow {
		return
	}
	if l.seen == nil {
		merged := *l.inode
		merged.Entries = slices.Clone(merged.Entries)
		l.inode, l.seen = &merged, make(map[string]bool)
		for _, e := range merged.Entries {
			l.seen[string(e.Name)] = true
		}
	}
	if l.inode.LookBelow = lower.Kind == format.KindDir && lower.LookBelow; lower.Kind != format.KindDir {
		return
	}
	for _, e := range lower.Entries {
		if !l.seen[string(e.Name)] {
			l.seen[string(e.Name)] = true
			l.inode.Entries = append(l.inode.Entries, e)
		}
	}
}
