package image

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// indexer makes an index. Its nodes are numbered like merged until compact.
type indexer struct {
	*maker
	merged   []*format.Inode // sorted by number; whiteouts are nil
	inos     []uint64
	numbers  numbers
	first    []uint32 // by node, where the entries of a directory begin
	count    []uint32 // by node, how many there are
	nlink    []uint32 // 0: no name leads here
	parent   []uint32
	warnings []string
}

func newIndex(layers []format.InodeVector) (*index, []string, error) {
	b := &indexer{maker: newMaker(0, 0, 0)}
	if err := b.merge(layers); err != nil {
		return nil, nil, err
	}
	if err := b.link(); err != nil {
		return nil, nil, err
	}
	x, err := b.compact()
	return x, b.warnings, err
}

// link walks the tree from the root, makes the lists of the directories, counts links and
// makes sure that the directories are a tree.
func (b *indexer) link() error {
	b.numbers = numbersOf(b.inos)
	numbers := make([]uint32, 4*len(b.merged))
	for _, to := range []*[]uint32{&b.nlink, &b.parent, &b.first, &b.count} {
		*to, numbers = numbers[:len(b.merged)], numbers[len(b.merged):]
	}
	b.x.entries = make([]entry, 0, len(b.merged)+1)
	root, ok := b.numbers.find(format.RootIno)
	if !ok || b.merged[root] == nil || b.merged[root].Kind != format.KindDir {
		return fmt.Errorf("inode %d is not a directory: %w", format.RootIno, format.ErrCorrupt)
	}
	b.nlink[root] = 2
	b.parent[root] = root
	for queue := []uint32{root}; len(queue) > 0; {
		dir := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		b.first[dir] = uint32(len(b.x.entries))
		if err := b.list(dir); err != nil {
			return fmt.Errorf("directory %d: %w", b.inos[dir], err)
		}
		list := b.x.entries[b.first[dir]:]
		b.count[dir] = uint32(len(list))
		for _, e := range list {
			if b.merged[e.node].Kind != format.KindDir {
				b.nlink[e.node]++
				continue
			}
			if b.nlink[e.node] != 0 {
				return fmt.Errorf("directory %d has several names: %w", b.inos[e.node], format.ErrCorrupt)
			}
			b.nlink[e.node] = 2
			b.nlink[dir]++
			b.parent[e.node] = dir
			queue = append(queue, e.node)
		}
	}
	return nil
}

// list adds the entries of a directory, sorted, without those that point at whiteouts.
func (b *indexer) list(dir uint32) error {
	sorted := b.merged[dir].Entries
	byName := func(x, y format.DirEntry) int { return bytes.Compare(x.Name, y.Name) }
	if !slices.IsSortedFunc(sorted, byName) {
		sorted = slices.SortedFunc(slices.Values(sorted), byName)
	}
	for i, e := range sorted {
		if i > 0 && bytes.Equal(e.Name, sorted[i-1].Name) {
			return fmt.Errorf("two entries are named %q: %w", e.Name, format.ErrCorrupt)
		}
		n, ok := b.numbers.find(e.Ino)
		if !ok {
			return fmt.Errorf("%q points at inode %d, which no layer has: %w", e.Name, e.Ino, format.ErrCorrupt)
		}
		target := b.merged[n]
		if target == nil {
			continue
		}
		if target.Kind == format.KindUnknown {
			return fmt.Errorf("%q is of no known kind: %w", e.Name, format.ErrCorrupt)
		}
		b.addEntry(e.Name, n)
	}
	return nil
}

// compact numbers the reachable inodes and makes the arrays.
func (b *indexer) compact() (*index, error) {
	renumbered := make([]uint32, len(b.merged))
	inos := make([]uint64, 0, len(b.merged))
	chunks := 0
	for i, inode := range b.merged {
		if b.nlink[i] > 0 {
			renumbered[i] = uint32(len(inos))
			inos = append(inos, b.inos[i])
			chunks += len(inode.Chunks)
		}
	}
	b.x.nodes = make([]node, 0, len(inos))
	b.x.chunks = make([]extent, 0, chunks)
	for i := range b.x.entries {
		b.x.entries[i].node = renumbered[b.x.entries[i].node]
	}
	for i, inode := range b.merged {
		if b.nlink[i] == 0 {
			continue
		}
		n := node{nlink: b.nlink[i]}
		if err := b.fill(&n, inode); err != nil {
			return nil, err
		}
		if inode.Kind == format.KindDir {
			n.first, n.count = b.first[i], b.count[i]
			n.size = uint64(renumbered[b.parent[i]])
		}
		b.x.nodes = append(b.x.nodes, n)
	}
	return b.finish(numbersOf(inos))
}

// numbersOf returns the numbers in a list, which is sorted and has none twice.
func numbersOf(inos []uint64) numbers {
	x, _ := newNumbers(len(inos), func(i int) uint64 { return inos[i] })
	return x
}
