package fuse

import (
	"slices"
	"sync"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

const (
	// smallFile is how large a file may be for what is beside it to matter, in bytes: of larger ones the
	// kernel itself reads ahead.
	smallFile = 64 << 10
	// inOrder is how far a reader goes from one small file to the next who reads all of a tree: there are
	// directories, links and large files between.
	inOrder = 256
	// readers is how many who do so are told apart.
	readers = 8
)

// beside puts small files into the kernel's cache that were loaded together with one that is being read, where
// somebody reads one after the other. Each costs a system call that nobody waits for, instead of a request, for
// which the reader and a server's thread have to be woken in turn.
//
// The kernel locks the page that it is given. Who holds it may be a reader of that file, whose request has to be
// answered for it to be free: so no more than one request at a time gives pages before it is answered, and
// nothing that others need is held meanwhile.
type beside struct {
	img *image.Image
	// store gives the kernel all content of a file. It fails for one that the kernel does not know yet.
	store func(ino uint64, content []byte) bool

	giving sync.Mutex // held by the one request

	mu   sync.Mutex // guards what follows
	last []uint64   // the small files that were read last, by each of the readers, who read last first
}

// storeIn returns what store is on a connection to the kernel.
func storeIn(conn *gofuse.Server) func(ino uint64, content []byte) bool {
	return func(ino uint64, content []byte) bool { return conn.InodeNotifyStoreCache(ino, 0, content).Ok() }
}

// wasRead says that the beginning of a file was read, n bytes, and will be answered when wasRead returns.
func (b *beside) wasRead(ino uint64, n int) {
	if n > smallFile || !b.follows(ino) || !b.giving.TryLock() {
		return
	}
	defer b.giving.Unlock()
	b.img.Beside(ino, b.store)
}

// follows reports whether a file is a next one for one of the readers.
func (b *beside) follows(ino uint64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.IndexFunc(b.last, func(last uint64) bool { return ino > last && ino-last <= inOrder })
	found := i >= 0
	switch {
	case found:
	case len(b.last) < readers:
		b.last = append(b.last, ino)
		i = len(b.last) - 1
	default:
		i = readers - 1
	}
	copy(b.last[1:i+1], b.last[:i])
	b.last[0] = ino
	return found
}
