package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// Destination is where Pull puts blobs; store.Store is one. It must be safe for concurrent
// use. Errors other than store.ErrNotFound and store.ErrDigestMismatch end the Pull.
type Destination interface {
	// Size returns the stored size of the blob d, or store.ErrNotFound.
	Size(d format.Digest) (int64, error)
	// Verify reads the blob d and checks its digest: store.ErrDigestMismatch, store.ErrNotFound.
	Verify(ctx context.Context, d format.Digest) error
	// Put stores data, whose digest d is. It must not keep data.
	Put(data []byte, d format.Digest) error
	// PutReader stores what r yields, checking that its digest is d and its length size
	// (negative: unknown); store.ErrDigestMismatch if it is not. Nothing is left behind if it
	// fails, and an error of r comes back wrapped.
	PutReader(ctx context.Context, d format.Digest, size int64, r io.Reader) error
	// Sync makes durable what was put.
	Sync() error
}

var _ Destination = (*store.Store)(nil)

// PullOptions modify a Pull. The zero value is fine.
type PullOptions struct {
	// Progress, if not nil, is called at the beginning, for each blob, and about once a MiB
	// within large ones; one call at a time, from several goroutines. It must not block.
	Progress func(Progress)
}

// smallBlob is up to which size, in bytes, a blob is read into memory and checked there.
// It is also how much of a blob is taken whatever small size its descriptor claims.
const smallBlob = 1 << 20

// Pull fetches the image that ref names into dst: rootfs, configuration and chunks, each
// distinct blob once, and the manifest last. Blobs that dst has are not fetched again: one of
// the size that the manifest says is taken to be good, since dst checks it when it is read,
// another is checked here. It does not tag.
//
// It returns the manifest's descriptor, as Resolve does, with its errors; further ones are
// those of dst. After an error dst keeps the blobs that were complete, so that a next attempt
// goes on from there. When ctx ends Pull returns its error, and no goroutine or unfinished
// file of it is left.
func (c *Client) Pull(ctx context.Context, ref Reference, dst Destination, opts PullOptions) (format.Descriptor, error) {
	ref, err := ref.normalize()
	if err != nil {
		return format.Descriptor{}, err
	}
	desc, err := c.pull(ctx, ref, dst, opts)
	if err != nil {
		return format.Descriptor{}, fmt.Errorf("pull %s: %w", ref, err)
	}
	return desc, nil
}

func (c *Client) pull(ctx context.Context, ref Reference, dst Destination, opts PullOptions) (format.Descriptor, error) {
	s, err := c.open(ref)
	if err != nil {
		return format.Descriptor{}, err
	}
	ctx = s.scopes(ctx, actionPull)
	desc, manifest, m, err := s.resolve(ctx)
	if err != nil {
		return format.Descriptor{}, err
	}
	if _, err := rootfsOf(m); err != nil {
		return format.Descriptor{}, err
	}
	blobs := m.Blobs()
	p := &puller{s: s, dst: dst, track: newTracker(blobs, opts.Progress)}
	err = parallel(ctx, c.cfg.Concurrency, blobs, func() func(context.Context, format.Descriptor) error {
		var buf []byte // each worker's own
		return func(ctx context.Context, d format.Descriptor) error { return p.blob(ctx, d, &buf) }
	})
	if err != nil {
		return format.Descriptor{}, err
	}
	if err := dst.Put(manifest, desc.Digest); err != nil {
		return format.Descriptor{}, err
	}
	if err := dst.Sync(); err != nil {
		return format.Descriptor{}, err
	}
	return desc, nil
}

// PullMetadata fetches of the image that ref names what tells its tree, the manifest and
// the rootfs, into dst, but no chunks: enough to build a delta on it. A rootfs that dst has is
// not fetched again. It returns the manifest's descriptor; errors are those of Pull.
func (c *Client) PullMetadata(ctx context.Context, ref Reference, dst Destination) (format.Descriptor, error) {
	ref, err := ref.normalize()
	if err != nil {
		return format.Descriptor{}, err
	}
	fail := func(err error) (format.Descriptor, error) {
		return format.Descriptor{}, fmt.Errorf("pull metadata of %s: %w", ref, err)
	}
	s, err := c.open(ref)
	if err != nil {
		return fail(err)
	}
	ctx = s.scopes(ctx, actionPull)
	desc, manifest, m, err := s.resolve(ctx)
	if err != nil {
		return fail(err)
	}
	rootfs, err := rootfsOf(m)
	if err != nil {
		return fail(err)
	}
	p := &puller{s: s, dst: dst, track: newTracker([]format.Descriptor{rootfs}, nil)}
	if err := p.blob(ctx, rootfs, new([]byte)); err != nil {
		return fail(err)
	}
	if err := dst.Put(manifest, desc.Digest); err != nil {
		return fail(err)
	}
	return desc, nil
}

// rootfsOf returns the descriptor of a rootfs that is not too large.
func rootfsOf(m *format.Manifest) (format.Descriptor, error) {
	rootfs, err := m.Rootfs()
	if err == nil && rootfs.Size > format.MaxRootfsSize {
		err = fmt.Errorf("the manifest says that the rootfs has %d bytes, at most %d are read: %w",
			rootfs.Size, format.MaxRootfsSize, format.ErrTooLarge)
	}
	return rootfs, err
}

// parallel calls a function for each blob, in order, n at a time. Each worker gets its
// function from newWorker. It waits for all; the first error cancels the others.
func parallel(ctx context.Context, n int, blobs []format.Descriptor, newWorker func() func(context.Context, format.Descriptor) error) error {
	g, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range min(n, len(blobs)) {
		work := newWorker()
		g.Go(func() error {
			for {
				i := next.Add(1) - 1
				if i >= int64(len(blobs)) {
					return nil
				}
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				if err := work(ctx, blobs[i]); err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

// puller is a Pull under way.
type puller struct {
	s     *session
	dst   Destination
	track *tracker
}

// blob sees to it that dst has d. buf is the worker's buffer.
func (p *puller) blob(ctx context.Context, d format.Descriptor, buf *[]byte) error {
	have, err := p.has(ctx, d)
	if err != nil {
		return err
	}
	if have {
		p.track.done(d, true)
		return nil
	}
	if d.Data != nil && format.DigestOf(d.Data) == d.Digest {
		if err := p.dst.Put(d.Data, d.Digest); err != nil {
			return err
		}
		p.track.done(d, false)
		return nil
	}
	err = p.s.retry(ctx, func(ctx context.Context) error {
		return p.s.each(ctx, canPull, func(ctx context.Context, r *remote) error { return p.fetch(ctx, r, d, buf) })
	})
	if errors.Is(err, ErrNotFound) {
		err = fmt.Errorf("the manifest lists it but it is not there: push the image again: %w", err)
	}
	var local *localError
	if errors.As(err, &local) {
		return local.err // says itself which blob
	}
	if err != nil {
		return fmt.Errorf("get blob %s: %w", d.Digest, err)
	}
	p.track.done(d, false)
	return nil
}

// has reports whether dst has d in good order. A size other than the descriptor's proves
// nothing: crate 0.2.0 wrote the size before compression.
func (p *puller) has(ctx context.Context, d format.Descriptor) (bool, error) {
	size, err := p.dst.Size(d.Digest)
	if err == nil && size != d.Size {
		err = p.dst.Verify(ctx, d.Digest)
	}
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrDigestMismatch) {
		return false, nil
	}
	return err == nil, err
}

// fetch gets d from one endpoint and puts it into dst.
func (p *puller) fetch(ctx context.Context, r *remote, d format.Descriptor, buf *[]byte) error {
	b := &blobReader{
		s: p.s, r: r, d: d, ctx: ctx, limit: max(d.Size, smallBlob), size: -1,
		moved: func(n int64, restarted bool) { p.track.moved(d, n, restarted, r.ep.isMirror()) },
	}
	defer b.close()
	if err := b.open(); err != nil {
		return err
	}
	if b.size > smallBlob || b.size < 0 && d.Size > smallBlob {
		return p.stream(ctx, r, d, b)
	}
	data, err := b.readAll((*buf)[:0])
	*buf = data
	if err != nil {
		return err
	}
	if got := format.DigestOf(data); got != d.Digest {
		return wrongBytes(r, got, len(data))
	}
	if err := p.dst.Put(data, d.Digest); err != nil {
		return &localError{err}
	}
	return nil
}

// stream puts a blob into dst that is too large for memory.
func (p *puller) stream(ctx context.Context, r *remote, d format.Descriptor, b *blobReader) error {
	err := p.dst.PutReader(ctx, d.Digest, b.size, b)
	switch {
	case err == nil:
		return nil
	case b.err != nil:
		return b.err
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, store.ErrDigestMismatch):
		return &failure{kind: ErrDigestMismatch, retry: true, msg: fmt.Sprintf(
			"%s sent %d bytes with another digest: the registry, or what is in between, changes content", r.ep, b.off)}
	}
	return &localError{err}
}

func wrongBytes(r *remote, got format.Digest, n int) *failure {
	return &failure{kind: ErrDigestMismatch, retry: true, msg: fmt.Sprintf(
		"%s sent %d bytes with digest %s: the registry, or what is in between, changes content", r.ep, n, got)}
}
