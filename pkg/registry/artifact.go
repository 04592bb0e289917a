package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"mime"
	"net/http"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// headerDigest carries the digest of a manifest as the registry computed it.
const headerDigest = "Docker-Content-Digest"

// RawManifest is a manifest or an index of any kind, as it is in the registry.
type RawManifest struct {
	// MediaType is the one that the document gives itself, else that of the answer's header
	// without parameters; "" where neither says. The digest covers only the document.
	MediaType string
	// Digest is the SHA-256 of Bytes.
	Digest format.Digest
	// Bytes are the caller's. They are some JSON object; nothing else of them was checked.
	Bytes []byte
}

// Manifest fetches the manifest or index that ref names, whatever it is of, if it has at most
// limit bytes. accept are the media types that the caller understands. The bytes have
// ref.Digest if that is not zero; then ref.Tag is not consulted. Mirrors, credentials and
// retries are those of Resolve.
//
// Errors: those of Resolve, but for format.ErrNotPuzzleFS and format.ErrCorrupt;
// format.ErrTooLarge says that there are more than limit bytes.
func (c *Client) Manifest(ctx context.Context, ref Reference, limit int64, accept ...string) (RawManifest, error) {
	ref, err := ref.normalize()
	if err != nil {
		return RawManifest{}, err
	}
	s, err := c.open(ref)
	if err != nil {
		return RawManifest{}, fmt.Errorf("get manifest %s: %w", ref, err)
	}
	m, err := s.manifest(s.scopes(ctx, actionPull), limit, accept)
	if err != nil {
		return RawManifest{}, fmt.Errorf("get manifest %s: %w", ref, err)
	}
	return m, nil
}

// manifest fetches what the session's reference names, from whichever endpoint has it.
func (s *session) manifest(ctx context.Context, limit int64, accept []string) (RawManifest, error) {
	var m RawManifest
	need := canPull
	if s.ref.Digest.IsZero() {
		need = canResolve
	}
	err := s.retry(ctx, func(ctx context.Context) error {
		return s.each(ctx, need, func(ctx context.Context, r *remote) (err error) {
			m, err = s.fetchManifest(ctx, r, limit, accept)
			return err
		})
	})
	if err != nil {
		return RawManifest{}, s.explainMissing(ctx, err)
	}
	return m, nil
}

// fetchManifest gets the manifest from one endpoint and checks its digest.
func (s *session) fetchManifest(ctx context.Context, r *remote, limit int64, accept []string) (RawManifest, error) {
	rq := request{
		method: http.MethodGet,
		url:    r.ep.url(s.ref.Repository, "manifests", s.ref.target()),
		want:   []int{http.StatusOK},
	}
	if len(accept) > 0 {
		rq.header = http.Header{"Accept": {strings.Join(accept, ", ")}}
	}
	x, err := r.do(ctx, rq)
	if err != nil {
		return RawManifest{}, err
	}
	defer x.close()
	b, err := io.ReadAll(io.LimitReader(x, limit+1))
	if err != nil {
		return RawManifest{}, err
	}
	if int64(len(b)) > limit {
		return RawManifest{}, fmt.Errorf("%s sent a manifest of more than %d bytes: %w", r.ep, limit, format.ErrTooLarge)
	}
	if isHTML(x.resp, b) {
		return RawManifest{}, &failure{kind: ErrUnexpectedAnswer, msg: fmt.Sprintf(
			"%s answered with a web page instead of a manifest: it is no registry, or a login page or proxy is in the way", r.ep)}
	}
	got := format.DigestOf(b)
	if want := s.ref.Digest; !want.IsZero() && got != want {
		return RawManifest{}, &failure{kind: ErrDigestMismatch, retry: true, msg: fmt.Sprintf(
			"%s sent a manifest with digest %s: the registry, or what is in between, changes content", r.ep, got)}
	}
	if said, err := format.ParseDigest(x.resp.Header.Get(headerDigest)); err == nil && said != got {
		return RawManifest{}, &failure{kind: ErrDigestMismatch, retry: true, msg: fmt.Sprintf(
			"%s sent a manifest with digest %s and says that it is %s: the registry, or what is in between, changes content", r.ep, got, said)}
	}
	if head := bytes.TrimSpace(b); len(head) == 0 || head[0] != '{' {
		return RawManifest{}, &failure{kind: ErrUnexpectedAnswer, msg: fmt.Sprintf(
			"%s answered with %d bytes that are no manifest: it is no registry, or a proxy is in the way", r.ep, len(b))}
	}
	return RawManifest{MediaType: mediaTypeOf(x.resp, b), Digest: got, Bytes: b}, nil
}

// mediaTypeOf returns the media type of a manifest.
func mediaTypeOf(resp *http.Response, b []byte) string {
	var doc struct {
		MediaType string `json:"mediaType"`
	}
	if err := json.Unmarshal(b, &doc); err == nil && doc.MediaType != "" {
		return doc.MediaType
	}
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")) // malformed: it does not say
	return mediaType
}

// Blob returns the blob d of ref's repository; ref's tag and digest do not matter. size is its
// length in bytes, or negative where it is not known: then the caller bounds what is read. The
// reader checks the digest as it goes, and where the content is another it fails with
// ErrDigestMismatch instead of ending, or with format.ErrTooLarge where it goes on after size
// bytes. So until it has ended, what it gave must not be relied on. A blob of at most 1 MiB is
// checked before Blob returns.
//
// A connection that breaks is made again where it was, with another mirror if need be, as
// in Pull. The reader is for one goroutine, lives no longer than ctx, and must be closed. Errors
// are those of Pull.
func (c *Client) Blob(ctx context.Context, ref Reference, d format.Digest, size int64) (io.ReadCloser, error) {
	ref, err := ref.normalize()
	if err != nil {
		return nil, err
	}
	s, err := c.open(ref)
	if err != nil {
		return nil, fmt.Errorf("get blob %s from %s: %w", d, ref.name(), err)
	}
	b := &blobStream{s: s, ctx: s.scopes(ctx, actionPull), d: d, size: size, hash: sha256.New(), lost: make(map[*remote]bool)}
	if size >= 0 && size <= smallBlob {
		data, err := b.small()
		if err != nil {
			return nil, b.failed(err)
		}
		return io.NopCloser(bytes.NewReader(data)), nil
	}
	if err := b.open(); err != nil {
		return nil, b.failed(err)
	}
	return b, nil
}

// blobStream is a blob on its way to the caller of Blob.
type blobStream struct {
	s    *session
	ctx  context.Context // io.Reader has no other way to it
	d    format.Digest
	size int64 // negative: not known
	b    *blobReader
	hash hash.Hash
	// off is how many bytes came, opened how many at the last opening, breaks how many
	// openings there were since there was headway.
	off, opened int64
	breaks      int
	// lost are the endpoints that are not asked again.
	lost map[*remote]bool
	err  error // what the stream ended with
}

// reader returns a reader of the blob from one endpoint.
func (b *blobStream) reader(ctx context.Context, r *remote) *blobReader {
	br := &blobReader{s: b.s, r: r, d: format.Descriptor{Digest: b.d, Size: b.size}, ctx: ctx, off: b.off, opened: b.off, limit: b.size, size: b.size}
	if b.size < 0 {
		br.limit = math.MaxInt64
	}
	return br
}

// small gets a blob that fits into memory, and checks it.
func (b *blobStream) small() (data []byte, err error) {
	err = b.s.retry(b.ctx, func(ctx context.Context) error {
		return b.s.each(ctx, canPull, func(ctx context.Context, r *remote) error {
			br := b.reader(ctx, r)
			defer br.close()
			if err := br.open(); err != nil {
				return err
			}
			if data, err = br.readAll(data[:0]); err != nil {
				return err
			}
			return b.check(r, format.DigestOf(data), int64(len(data)))
		})
	})
	return data, err
}

// open opens the blob at off, at the first endpoint that is not lost and has it.
func (b *blobStream) open() error {
	b.opened = b.off
	return b.s.retry(b.ctx, func(ctx context.Context) error {
		return b.s.each(ctx, canPull, func(ctx context.Context, r *remote) error {
			if b.lost[r] {
				return fmt.Errorf("%s broke off before: %w", r.ep, ErrUnavailable)
			}
			br := b.reader(ctx, r)
			if err := br.open(); err != nil {
				br.close()
				return err
			}
			b.b = br
			return nil
		})
	})
}

// Read reads on, over breaks of the connection and the loss of mirrors.
func (b *blobStream) Read(p []byte) (int, error) {
	for b.err == nil {
		n, err := b.b.Read(p)
		b.hash.Write(p[:n])
		b.off += int64(n)
		switch {
		case errors.Is(err, io.EOF):
			b.err = io.EOF
			if err := b.check(b.b.r, format.Digest(b.hash.Sum(nil)), b.off); err != nil {
				b.err = b.failed(err)
			}
		case err != nil:
			b.err = b.reopen(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, b.err
}

// check fails unless what r sent, n bytes with the digest got, is what was asked for.
func (b *blobStream) check(r *remote, got format.Digest, n int64) error {
	if got != b.d {
		return wrongBytes(r, got, int(n))
	}
	if b.size >= 0 && n != b.size {
		return &failure{kind: ErrDigestMismatch, msg: fmt.Sprintf("%s has %d bytes of this digest, the manifest says %d", r.ep, n, b.size)}
	}
	return nil
}

// reopen goes on after cause, here or elsewhere, or returns why not.
func (b *blobStream) reopen(cause error) error {
	r := b.b.r
	b.b.close()
	if b.ctx.Err() != nil {
		return b.failed(context.Cause(b.ctx))
	}
	if b.off > b.opened {
		b.breaks = 0
	}
	b.breaks++
	if err := b.s.pause(b.ctx, b.breaks, cause); err != nil {
		// Nothing more is to be had from this one.
		b.lost[r] = true
		cause = err
	}
	for _, r := range b.s.able(canPull) {
		if !b.lost[r] {
			if err := b.open(); err != nil {
				return b.failed(err)
			}
			return nil
		}
	}
	return b.failed(cause)
}

// failed says what was being done.
func (b *blobStream) failed(err error) error {
	if errors.Is(err, ErrNotFound) {
		err = fmt.Errorf("the manifest lists it but it is not there: push the image again: %w", err)
	}
	return fmt.Errorf("get blob %s from %s: %w", b.d, b.s.ref.name(), err)
}

// Close ends the exchange with the registry. Closing twice is allowed.
func (b *blobStream) Close() error {
	if b.err == nil {
		b.err = fmt.Errorf("read blob %s: it was closed", b.d)
	}
	if b.b != nil {
		b.b.close()
	}
	return nil
}
