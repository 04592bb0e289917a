package registry

import (
	"sync"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// Progress says how far a Pull or Push is. Sizes are those of the manifest's descriptors,
// in bytes; each blob counts once, however often the manifest lists it.
type Progress struct {
	DoneBytes, TotalBytes int64
	DoneBlobs, TotalBlobs int
	// ReusedBytes and ReusedBlobs, part of what is done, were already where they belong.
	ReusedBytes int64
	ReusedBlobs int
	// MovedBytes went over the network, whole blobs and parts of them, retries included.
	MovedBytes int64
	// MirrorBytes, part of what was moved, came from mirrors of the registry.
	MirrorBytes int64
}

// tracker adds up Progress. Safe for concurrent use.
type tracker struct {
	mu     sync.Mutex // guards p, and keeps calls of report in order
	p      Progress
	report func(Progress)
	// partial is what is reported of blobs under way, by digest.
	partial map[format.Digest]int64
	// sinceReport is how many bytes moved since the last call of report.
	sinceReport int64
}

// reportEvery is after how many bytes within a blob progress is reported.
const reportEvery = 1 << 20

func newTracker(blobs []format.Descriptor, report func(Progress)) *tracker {
	t := &tracker{report: report, partial: make(map[format.Digest]int64)}
	t.p.TotalBlobs = len(blobs)
	for _, d := range blobs {
		t.p.TotalBytes += d.Size
	}
	if report != nil {
		report(t.p)
	}
	return t
}

// moved says that n more bytes of d went over the network, starting again at 0 if restart;
// mirror says that they came from one.
func (t *tracker) moved(d format.Descriptor, n int64, restart, mirror bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.p.MovedBytes += n
	if mirror {
		t.p.MirrorBytes += n
	}
	before := t.partial[d.Digest]
	now := before + n
	if restart {
		now = n
	}
	// The descriptor's size may be wrong; never report more than it promises.
	now = min(now, d.Size)
	t.partial[d.Digest] = now
	t.p.DoneBytes += now - before
	if t.sinceReport += n; t.sinceReport >= reportEvery && t.report != nil {
		t.sinceReport = 0
		t.report(t.p)
	}
}

// done says that d is where it belongs, reused if it was there before.
func (t *tracker) done(d format.Descriptor, reused bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.p.DoneBytes += d.Size - t.partial[d.Digest]
	delete(t.partial, d.Digest)
	t.p.DoneBlobs++
	if reused {
		t.p.ReusedBlobs++
		t.p.ReusedBytes += d.Size
	}
	t.sinceReport = 0
	if t.report != nil {
		t.report(t.p)
	}
}
