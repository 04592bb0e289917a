package registry

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync/atomic"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// Source is what Push reads blobs from; store.Store is one. It must be safe for concurrent
// use and return no byte that it did not check against the digest.
type Source interface {
	// Size returns the stored size of the blob d, or store.ErrNotFound.
	Size(d format.Digest) (int64, error)
	// Get returns the blob d if it has at most limit bytes.
	Get(ctx context.Context, d format.Digest, limit int64) ([]byte, error)
	// ReadBlobAt reads stored bytes of the blob d with the semantics of io.ReaderAt.
	ReadBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error)
}

var _ Source = (*store.Store)(nil)

// PushOptions modify a Push. The zero value is fine.
type PushOptions struct {
	// Progress is as in PullOptions.
	Progress func(Progress)
	// MountFrom is another repository of the same registry, without the registry, which may
	// have some of the blobs: the registry is asked to take them from there instead of being sent
	// them. "" for none. One that it does not give them from, for whatever reason, does no
	// harm. Blobs taken from there count as reused.
	MountFrom string
	// Warn, if not nil, is called with a sentence for the user, before anything is sent.
	Warn func(message string)
}

// commonManifestLimit is the size in bytes over which most registries refuse a manifest.
const commonManifestLimit = 4 << 20

// Push uploads the image whose manifest root names in src to ref: the blobs that the
// registry lacks, then the manifest under ref.Tag (under its digest if ref has only that). A
// ref.Digest must be the manifest's. A blob that is missing in src is an error only if the
// registry does not have it either.
//
// It returns the manifest's descriptor. Errors are those of Resolve and of src, and
// ErrRefused where the registry does not take the image; format.ErrUnsupportedVersion for a
// version 1 or 2 image, which no registry can hold.
func (c *Client) Push(ctx context.Context, src Source, root format.Descriptor, ref Reference, opts PushOptions) (format.Descriptor, error) {
	ref, err := ref.normalize()
	if err != nil {
		return format.Descriptor{}, err
	}
	desc, err := c.push(ctx, src, root, ref, opts)
	if err != nil {
		return format.Descriptor{}, fmt.Errorf("push %s: %w", ref, err)
	}
	return desc, nil
}

func (c *Client) push(ctx context.Context, src Source, root format.Descriptor, ref Reference, opts PushOptions) (format.Descriptor, error) {
	if root.MediaType == format.MediaTypeRootfs {
		return format.Descriptor{}, fmt.Errorf("the image is of version 1 or 2, which registries cannot hold: "+
			"extract and rebuild it with csi-puzzlefs extract and build: %w", format.ErrUnsupportedVersion)
	}
	if root.MediaType != format.MediaTypeManifest {
		return format.Descriptor{}, fmt.Errorf("%s is of type %s, want an image manifest: %w", root.Digest, quote(root.MediaType), format.ErrNotPuzzleFS)
	}
	if !ref.Digest.IsZero() && ref.Digest != root.Digest {
		return format.Descriptor{}, fmt.Errorf("the reference demands digest %s, the image has %s: leave the digest out or push the image that has it: %w",
			ref.Digest, root.Digest, ErrDigestMismatch)
	}
	manifest, err := src.Get(ctx, root.Digest, format.MaxManifestSize)
	if err != nil {
		return format.Descriptor{}, explainLocal(err)
	}
	m, err := format.ParseManifest(manifest)
	if err != nil {
		return format.Descriptor{}, err
	}
	if len(manifest) > commonManifestLimit && opts.Warn != nil {
		opts.Warn(fmt.Sprintf("the manifest of %s has %d bytes; most registries refuse more than 4 MiB (%d)", ref, len(manifest), commonManifestLimit))
	}
	s, err := c.open(ref)
	if err != nil {
		return format.Descriptor{}, err
	}
	to := s.able(canPush)
	if len(to) == 0 {
		return format.Descriptor{}, fmt.Errorf("hosts.toml of %s names no host with the capability push: %w", ref.Registry, ErrInvalidConfig)
	}
	ctx = s.scopes(ctx, actionPull, actionPush)
	blobs := m.Blobs()
	p := &pusher{s: s, to: to[0], src: src, track: newTracker(blobs, opts.Progress), mountFrom: opts.MountFrom}
	p.noMounts.Store(opts.MountFrom == "" || opts.MountFrom == ref.Repository)
	// The first alone, to log in once and not with each worker.
	if err := p.blob(ctx, blobs[0]); err != nil {
		return format.Descriptor{}, err
	}
	err = parallel(ctx, c.cfg.Concurrency, blobs[1:], func() func(context.Context, format.Descriptor) error { return p.blob })
	if err != nil {
		return format.Descriptor{}, err
	}
	desc := format.Descriptor{MediaType: format.MediaTypeManifest, Digest: root.Digest, Size: int64(len(manifest))}
	err = s.retry(ctx, func(ctx context.Context) error { return p.manifest(ctx, desc, manifest) })
	if err != nil {
		return format.Descriptor{}, p.explainRefusal(desc, m, err)
	}
	return desc, nil
}

// explainLocal adds the cure to an error of the layout that is pushed from.
func explainLocal(err error) error {
	switch {
	case errors.Is(err, store.ErrNotFound):
		return fmt.Errorf("%w: the layout is incomplete: build the image again, or pull it again from where it is complete", err)
	case errors.Is(err, store.ErrDigestMismatch):
		return fmt.Errorf("%w: the layout is damaged: see csi-puzzlefs verify, then build or pull the image again", err)
	}
	return err
}

// pusher is a Push under way.
type pusher struct {
	s     *session
	to    *remote
	src   Source
	track *tracker
	// mountFrom is PushOptions.MountFrom; noMounts says not to ask for it, or not any more.
	mountFrom string
	noMounts  atomic.Bool
}

// blob sees to it that the registry has d.
func (p *pusher) blob(ctx context.Context, d format.Descriptor) error {
	reused := false
	err := p.s.retry(ctx, func(ctx context.Context) (err error) {
		if reused, err = p.exists(ctx, d); err != nil || reused {
			return err
		}
		reused, err = p.upload(ctx, d)
		return err
	})
	var local *localError
	if errors.As(err, &local) {
		return explainLocal(local.err)
	}
	if err != nil {
		return fmt.Errorf("put blob %s: %w", d.Digest, err)
	}
	p.track.done(d, reused)
	return nil
}

// exists asks whether the registry has d.
func (p *pusher) exists(ctx context.Context, d format.Descriptor) (bool, error) {
	x, err := p.to.do(ctx, request{
		method: http.MethodHead,
		url:    p.to.ep.url(p.s.ref.Repository, "blobs", d.Digest.String()),
		want:   []int{http.StatusOK, http.StatusNotFound},
	})
	if err != nil {
		return false, err
	}
	x.close()
	return x.resp.StatusCode == http.StatusOK, nil
}

// upload sends d: one request to begin, one with all the content. mounted says that the
// first did, since the registry had d in mountFrom.
func (p *pusher) upload(ctx context.Context, d format.Descriptor) (mounted bool, err error) {
	size, body, err := p.content(ctx, d)
	if err != nil {
		return false, &localError{err}
	}
	x, err := p.begin(ctx, d)
	if err != nil {
		return false, err
	}
	x.close()
	if x.resp.StatusCode == http.StatusCreated {
		return true, nil
	}
	location, err := p.location(x.resp, d.Digest)
	if err != nil {
		return false, err
	}
	x, err = p.to.do(ctx, request{
		method: http.MethodPut,
		url:    location,
		header: http.Header{"Content-Type": {"application/octet-stream"}},
		body:   body,
		size:   size,
		want:   []int{http.StatusCreated},
	})
	if err != nil {
		return false, err
	}
	x.close()
	return false, nil
}

// begin asks for a place to upload d to, or for d to be taken from mountFrom.
func (p *pusher) begin(ctx context.Context, d format.Descriptor) (*exchange, error) {
	rq := request{
		method: http.MethodPost,
		url:    p.to.ep.url(p.s.ref.Repository, "blobs", "uploads", ""),
		want:   []int{http.StatusAccepted},
	}
	if p.noMounts.Load() {
		return p.to.do(ctx, rq)
	}
	u, err := url.Parse(rq.url)
	if err != nil {
		return nil, err
	}
	q := u.Query()
	q.Set("mount", d.Digest.String())
	q.Set("from", p.mountFrom)
	u.RawQuery = q.Encode()
	mount := rq
	mount.url = u.String()
	mount.want = []int{http.StatusCreated, http.StatusAccepted}
	x, err := p.to.do(auth.AppendScopes(ctx, auth.ScopeRepository(p.mountFrom, actionPull)), mount)
	if !p.refusedMount(err) {
		return x, err
	}
	return p.to.do(ctx, rq)
}

// refusedMount reports whether d is to be sent since it cannot be taken from mountFrom. A
// registry should say 202 then, but not all do. Where the reason holds for all blobs, none of
// them is asked for any more.
func (p *pusher) refusedMount(err error) bool {
	switch {
	case errors.Is(err, ErrUnauthorized), errors.Is(err, ErrForbidden), errors.Is(err, ErrRefused):
		p.noMounts.Store(true) // these credentials do not reach that far, or nothing does
		return true
	case errors.Is(err, ErrNotFound):
		return true
	}
	var f *failure // of the registry, not of the way to it
	return errors.Is(err, ErrUnavailable) && errors.As(err, &f) && f.status != 0
}

// location returns where the content of an upload goes to. It may be another host; that one
// gets no credentials, since those are bound to the endpoint.
func (p *pusher) location(resp *http.Response, d format.Digest) (string, error) {
	u, err := resp.Location()
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return "", &failure{kind: ErrUnexpectedAnswer, msg: fmt.Sprintf("%s does not say where to upload to", p.to.ep)}
	}
	if p.to.ep.base.Scheme == "https" && u.Scheme != "https" {
		return "", &failure{kind: ErrUnexpectedAnswer, msg: fmt.Sprintf(
			"%s wants the upload over plain HTTP at %s: if a proxy is before it, let that set X-Forwarded-Proto", p.to.ep, originOf(u))}
	}
	// What is there may be signed as it is: only append.
	if u.RawQuery != "" {
		u.RawQuery += "&"
	}
	u.RawQuery += "digest=" + url.QueryEscape(d.String())
	return u.String(), nil
}

// content returns the size of d in src and a function that gives a new reader of it.
func (p *pusher) content(ctx context.Context, d format.Descriptor) (int64, func() io.ReadCloser, error) {
	size, err := p.src.Size(d.Digest)
	if errors.Is(err, store.ErrNotFound) && d.Data != nil && format.DigestOf(d.Data) == d.Digest {
		return int64(len(d.Data)), p.counted(d, func() io.Reader { return bytes.NewReader(d.Data) }), nil
	}
	if err != nil {
		return 0, nil, err
	}
	if size > smallBlob {
		return size, p.counted(d, func() io.Reader {
			return bufio.NewReaderSize(&localReader{ctx: ctx, src: p.src, d: d.Digest, size: size}, smallBlob)
		}), nil
	}
	b, err := p.src.Get(ctx, d.Digest, smallBlob)
	if err != nil {
		return 0, nil, err
	}
	return int64(len(b)), p.counted(d, func() io.Reader { return bytes.NewReader(b) }), nil
}

// counted makes a body of a reader that reports progress.
func (p *pusher) counted(d format.Descriptor, open func() io.Reader) func() io.ReadCloser {
	return func() io.ReadCloser { return &countingReader{r: open(), t: p.track, d: d, restarted: true} }
}

// countingReader reports what is read of the body of a request.
type countingReader struct {
	r         io.Reader
	t         *tracker
	d         format.Descriptor
	restarted bool
}

func (c *countingReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	if n > 0 {
		c.t.moved(c.d, int64(n), c.restarted, false)
		c.restarted = false
	}
	return n, err
}

func (c *countingReader) Close() error { return nil }

// localReader reads a large blob in order.
type localReader struct {
	ctx       context.Context // io.Reader has no other way to it
	src       Source
	d         format.Digest
	off, size int64
}

func (l *localReader) Read(b []byte) (int, error) {
	if l.off >= l.size {
		return 0, io.EOF
	}
	n, err := l.src.ReadBlobAt(l.ctx, l.d, b[:min(int64(len(b)), l.size-l.off)], l.off)
	l.off += int64(n)
	if errors.Is(err, io.EOF) && l.off < l.size {
		err = fmt.Errorf("read blob %s: it has %d bytes, it had %d: %w", l.d, l.off, l.size, store.ErrDigestMismatch)
	}
	if err != nil && !errors.Is(err, io.EOF) && l.ctx.Err() == nil {
		err = &localError{err}
	}
	return n, err
}

// manifest puts the manifest and checks what the registry made of it.
func (p *pusher) manifest(ctx context.Context, desc format.Descriptor, b []byte) error {
	target := p.s.ref.Tag
	if target == "" {
		target = desc.Digest.String()
	}
	x, err := p.to.do(ctx, request{
		method: http.MethodPut,
		url:    p.to.ep.url(p.s.ref.Repository, "manifests", target),
		header: http.Header{"Content-Type": {desc.MediaType}},
		body:   func() io.ReadCloser { return io.NopCloser(bytes.NewReader(b)) },
		size:   int64(len(b)),
		want:   []int{http.StatusCreated},
	})
	if err != nil {
		return err
	}
	x.close()
	said := x.resp.Header.Get(headerDigest)
	if said == "" && p.s.ref.Tag != "" {
		if _, said, err = p.s.headTag(ctx, p.to); err != nil {
			return err
		}
	}
	if said != "" && said != desc.Digest.String() {
		return &failure{kind: ErrDigestMismatch, msg: fmt.Sprintf("%s stored the manifest %s as %s: it, or what is in between, changes content",
			p.to.ep, desc.Digest, quote(said))}
	}
	return nil
}

// explainRefusal says why a registry may have refused a manifest, where that can be told.
func (p *pusher) explainRefusal(desc format.Descriptor, m *format.Manifest, err error) error {
	err = fmt.Errorf("put manifest: %w", err)
	var f *failure
	if !errors.As(err, &f) {
		return err
	}
	switch f.status {
	case http.StatusRequestEntityTooLarge, http.StatusBadRequest, http.StatusInternalServerError, http.StatusBadGateway:
	default:
		return err
	}
	if desc.Size > commonManifestLimit || f.status == http.StatusRequestEntityTooLarge {
		return fmt.Errorf("the manifest has %d bytes, most registries refuse more than 4 MiB: "+
			"build with larger chunks (csi-puzzlefs build --chunker jotfs:AVERAGE) or raise the registry's limit: %w", desc.Size, err)
	}
	if f.status == http.StatusBadRequest {
		for _, d := range m.Layers {
			if size, e := p.src.Size(d.Digest); e == nil && size != d.Size {
				return fmt.Errorf("the manifest says that blob %s has %d bytes, it has %d, as puzzlefs 0.2.0 wrote it for compressed images: "+
					"extract and rebuild: %w", d.Digest, d.Size, size, err)
			}
		}
	}
	return err
}
