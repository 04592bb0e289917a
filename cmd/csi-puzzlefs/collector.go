package main

import (
	"math"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

const (
	// usualPercent is how much a heap may grow over what is alive before it is collected, as Go has it.
	usualPercent = 100
	// leastHeap is the size in bytes at which a heap is collected first, as Go has it.
	leastHeap = 4 << 20
	// lateHeap is what it is here.
	lateHeap = 96 << 20
)

// collectLate puts the first collection of garbage off until there is more than most builds ever have: a
// build uses all CPUs and has none to spare for it. From then on garbage is collected as usual. What GOGC and
// GOMEMLIMIT say counts.
func collectLate() {
	if os.Getenv("GOGC") != "" {
		return
	}
	debug.SetGCPercent(lateHeap / leastHeap * usualPercent)
	// The first collection finds that nobody needs this.
	first := new([4]*byte)
	runtime.AddCleanup(first, func(percent int) { debug.SetGCPercent(percent) }, usualPercent)
}

// serverBytes is about how much memory a server needs besides the index and the cache of content: for
// requests, and for what the collector has not got to yet.
const serverBytes = 40 << 20

// collectForServer has garbage collected when a server of an image takes more memory than it needs, instead of when
// it takes twice as much. What GOMEMLIMIT says counts.
func collectForServer(im *image.Image) {
	const ask = -1
	if debug.SetMemoryLimit(ask) == math.MaxInt64 {
		debug.SetMemoryLimit(im.Memory() + image.DefaultCacheBytes + serverBytes)
	}
}
