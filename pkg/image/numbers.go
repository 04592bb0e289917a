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

// newNumbers returns the numbers of n nodes. ino returns that of a node. ok is false if they do not grow, as
// far as that was seen: where the last is as far from the first as if they did, nobody looks at those between.
func newNumbers(n int, ino func(i int) uint64) (x numbers, ok bool) {
	if n > 0 && ino(n-1)-ino(0) == uint64(n-1) {
		return numbers{runs: []run{{ino: ino(0), count: uint32(n)}}}, true
	}
	last, most := uint64(0), 1+n/inodesPerRun
	for i := range n {
		number := ino(i)
		switch {
		case number <= last:
			return numbers{}, false
		case number == last+1 && len(x.runs) > 0:
			x.runs[len(x.runs)-1].count++
		case len(x.runs) == most:
			return listNumbers(n, ino)
		default:
			x.runs = append(x.runs, run{ino: number, node: uint32(i), count: 1})
		}
		last = number
	}
	return x, true
}

// listNumbers is newNumbers for what has too many runs.
func listNumbers(n int, ino func(i int) uint64) (numbers, bool) {
	x := numbers{inos: make([]uint64, n)}
	for i := range x.inos {
		x.inos[i] = ino(i)
		if i > 0 && x.inos[i] <= x.inos[i-1] {
			return numbers{}, false
		}
	}
	if largest := x.inos[n-1]; largest < 2*uint64(n)+1024 {
		x.dense = make([]uint32, largest+1)
		for i, ino := range x.inos {
			x.dense[ino] = uint32(i) + 1
		}
	}
	return x, true
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
