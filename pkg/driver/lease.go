package driver

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// receive lets pull put an image into the store, whose manifest is given and held, within the
// limits. what is for messages.
func (sp *space) receive(ctx context.Context, what string, manifest []byte, pull func(registry.Destination) error) error {
	need, err := sp.missing(manifest)
	if err != nil {
		return err
	}
	err = sp.makeRoom(ctx, what, need)
	if errors.Is(err, store.ErrUnknownContent) {
		// It may be this manifest that keeps everything from being evicted, of an image that is
		// mounted and lost it. It had its room.
		if err := sp.store.Put(manifest, format.DigestOf(manifest)); err != nil {
			return err
		}
		if need, err = need-onDisk(int64(len(manifest))), nil; need > 0 {
			err = sp.makeRoom(ctx, what, need)
		}
	}
	if err != nil {
		return err
	}
	l := &lease{Store: sp.store, sp: sp, ctx: ctx, what: what, left: need}
	defer l.end()
	return sp.relieved(ctx, func() error {
		// First of all: a hold that is made now keeps the blobs that are there, see store.Pins.
		d := format.DigestOf(manifest)
		if err := l.Put(manifest, d); err != nil {
			return err
		}
		release, err := sp.pins.Hold(d)
		if err != nil {
			return err
		}
		defer release()
		return pull(l)
	})
}

// missing returns how many bytes the store lacks of an image. It is an upper bound: of images of
// PuzzleFS 0.2.0 the descriptors have the sizes before compression.
func (sp *space) missing(manifest []byte) (int64, error) {
	m, err := format.ParseManifest(manifest)
	if err != nil {
		return 0, err
	}
	need := onDisk(int64(len(manifest)))
	for _, d := range m.Blobs() {
		_, err := sp.store.Size(d.Digest)
		switch {
		case errors.Is(err, store.ErrNotFound):
			if d.Size > maxPromise-need {
				return 0, fmt.Errorf("add up the sizes of the blobs in the manifest: %w", format.ErrTooLarge)
			}
			need += onDisk(d.Size)
		case err != nil && !errors.Is(err, store.ErrDigestMismatch):
			return 0, err
		}
	}
	return need, nil
}

const (
	// diskBlock is what the smallest blob takes up on common file systems, in bytes.
	diskBlock = 4096
	// maxPromise bounds the bytes of an image, so that sums do not overflow.
	maxPromise = 1 << 60
)

// onDisk returns what n bytes take up on a disk.
func onDisk(n int64) int64 { return (n + diskBlock - 1) / diskBlock * diskBlock }

// lease is a store into which a pull writes: what was promised to it, and more only as far as
// there is room. Registries, and manifests, may lie about sizes.
type lease struct {
	*store.Store
	sp   *space
	ctx  context.Context // a Put has no other way to it
	what string
	left int64 // of what was promised; guarded by sp.mu
}

var _ registry.Destination = (*lease)(nil)

// Put is that of the store.
func (l *lease) Put(data []byte, d format.Digest) error {
	n := onDisk(int64(len(data)))
	if _, err := l.Size(d); err == nil {
		n = 0 // it is there, or takes the place of a torn one
	}
	if err := l.take(n); err != nil {
		return err
	}
	err := l.Store.Put(data, d)
	l.wrote(n, err)
	return err
}

// PutReader is that of the store.
func (l *lease) PutReader(ctx context.Context, d format.Digest, size int64, r io.Reader) error {
	t := &taker{l: l, r: r}
	if size > 0 {
		if err := l.take(onDisk(size)); err != nil {
			return err
		}
		t.taken = onDisk(size) // the store reads no more
	}
	err := l.Store.PutReader(ctx, d, size, t)
	l.wrote(t.taken, err)
	return err
}

// take takes n bytes off what was promised, and asks for more if that is not enough.
func (l *lease) take(n int64) error {
	sp := l.sp
	sp.mu.Lock()
	promised := min(n, l.left)
	l.left -= promised
	sp.mu.Unlock()
	if more := n - promised; more > 0 {
		if err := sp.makeRoom(l.ctx, l.what+", which is larger than its manifest says", more); err != nil {
			sp.mu.Lock()
			defer sp.mu.Unlock()
			l.left += promised
			return err
		}
	}
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.promised -= n
	sp.used += n
	sp.begun += n
	sp.writing += n
	return nil
}

// wrote says that n bytes that were taken are in the store, or not.
func (l *lease) wrote(n int64, err error) {
	sp := l.sp
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.writing -= n
	if err != nil {
		sp.used -= n
		sp.promised += n
		l.left += n
	}
}

// end gives back what is left.
func (l *lease) end() {
	l.sp.mu.Lock()
	l.sp.promised -= l.left
	l.left = 0
	l.sp.mu.Unlock()
	l.sp.wake()
}

// taker takes from a lease what it reads.
type taker struct {
	l           *lease
	r           io.Reader
	taken, read int64
}

// Read implements io.Reader.
func (t *taker) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.read += int64(n)
	if more := onDisk(t.read) - t.taken; more > 0 {
		if takeErr := t.l.take(more); takeErr != nil {
			return n, takeErr
		}
		t.taken += more
	}
	return n, err
}
