package image

import "slices"

// numbers finds the node of an inode number, and the number of a node. Nodes are in the order of their
// numbers. Builders use numbers one after another, so that most images have a few runs of them.
type numbers struct {
	runs []run
	// inos has the numbers of all nodes where there are too many runs; nil otherwise.
	inos []uint64
	// dense has node+1 of each number, where there are inos and most numbers are used; nil otherwise.
	dense []uint32
}

// run is a run of consecutive numbers, up to the next one.
type run struct {
	ino   uint64 // the first number
	node  uint32 // its node
	count uint32
}

// inodesPerRun is how many inodes there must be for a run, so that runs take little memory and are
// found fast.
const inodesPerRun = 16

// newNumbers returns the numbers of n nodes. ino returns that of a node, which is larger than that of the node before.
func newNumbers(n int, ino func(i int) uint64) numbers {
	var x numbers
	most := 1 + n/inodesPerRun
	for i := range n {
		number := ino(i)
		if last := len(x.runs) - 1; last >= 0 && number == x.runs[last].ino+uint64(x.runs[last].count) {
			x.runs[last].count++
			continue
		}
		if len(x.runs) == most {
			return listNumbers(n, ino)
		}
		x.runs = append(x.runs, run{ino: number, node: uint32(i), count: 1})
	}
	return x
}

// listNumbers is newNumbers for what has too many runs.
func listNumbers(n int, ino func(i int) uint64) numbers {
	x := numbers{inos: make([]uint64, n)}
	for i := range x.inos {
		x.inos[i] = ino(i)
	}
	if largest := x.inos[n-1]; largest < 2*uint64(n)+1024 {
		x.dense = make([]uint32, largest+1)
		for i, ino := range x.inos {
			x.dense[ino] = uint32(i) + 1
		}
	}
	return x
}

// find returns the node of a number.
func (x *numbers) find(ino uint64) (uint32, bool) {
	switch {
	case x.dense != nil:
		if ino >= uint64(len(x.dense)) || x.dense[ino] == 0 {
			return 0, false
		}
		return x.dense[ino] - 1, true
	case x.inos != nil:
		i, ok := slices.BinarySearch(x.inos, ino)
		return uint32(i), ok
	}
	low, high := 0, len(x.runs) // the run is in [low, high)
	for high-low > 1 {
		if middle := (low + high) / 2; x.runs[middle].ino <= ino {
			low = middle
		} else {
			high = middle
		}
	}
	if low == high || ino < x.runs[low].ino || ino-x.runs[low].ino >= uint64(x.runs[low].count) {
		return 0, false
	}
	return x.runs[low].node + uint32(ino-x.runs[low].ino), true
}

// ino returns the number of a node, which there must be.
func (x *numbers) ino(n uint32) uint64 {
	if x.inos != nil {
		return x.inos[n]
	}
	low, high := 0, len(x.runs)
	for high-low > 1 {
		if middle := (low + high) / 2; x.runs[middle].node <= n {
			low = middle
		} else {
			high = middle
		}
	}
	return x.runs[low].ino + uint64(n-x.runs[low].node)
}

// bytes returns how much memory it takes.
func (x *numbers) bytes() int { return 16*len(x.runs) + 8*len(x.inos) + 4*len(x.dense) }
