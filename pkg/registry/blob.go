package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// blobReader reads a blob from one endpoint. When the connection breaks it goes on from
// where it was, as long as that makes headway.
type blobReader struct {
	s *session
	r *remote
	d format.Descriptor
	// moved, if not nil, is told how many bytes came, and whether they are the blob's first.
	moved func(n int64, restarted bool)
	ctx   context.Context // PutReader has no other way to it
	x     *exchange
	// off is how many bytes were read, limit how many there may be; size is how many the
	// endpoint announced, or the caller knows; -1 if neither.
	off, limit, size int64
	// breaks counts the attempts to go on since opened, the offset after the last one.
	breaks int
	opened int64
	// restarted says that the next bytes are the blob's first, as far as progress goes.
	restarted bool
	// err is what ended the reading, if not io.EOF.
	err error
}

// open asks for the blob from off on.
func (b *blobReader) open() error {
	rq := request{
		method: http.MethodGet,
		url:    b.r.ep.url(b.s.ref.Repository, "blobs", b.d.Digest.String()),
		want:   []int{http.StatusOK},
	}
	if b.off > 0 && b.size > 0 {
		// Some registries understand a range only with an end.
		rq.header = http.Header{"Range": {fmt.Sprintf("bytes=%d-%d", b.off, b.size-1)}}
		rq.want = append(rq.want, http.StatusPartialContent)
	}
	x, err := b.r.do(b.ctx, rq)
	if err != nil {
		return err
	}
	b.x = x
	if b.off == 0 {
		b.restarted = true
		if n := x.resp.ContentLength; n >= 0 {
			b.size = n
		}
		return b.check()
	}
	if x.resp.StatusCode == http.StatusOK {
		// It does not do ranges: read past what is known already.
		_, err := io.CopyN(io.Discard, x, b.off)
		if errors.Is(err, io.EOF) {
			err = networkFailure(b.r.ep, b.r.ep.String(), io.ErrUnexpectedEOF)
		}
		return err
	}
	var first, last int64
	if _, err := fmt.Sscanf(x.resp.Header.Get("Content-Range"), "bytes %d-%d/", &first, &last); err != nil || first != b.off {
		return &failure{kind: ErrUnexpectedAnswer, msg: fmt.Sprintf("%s answered with another range than it was asked for", b.r.ep)}
	}
	return nil
}

// check looks at the header of the first answer.
func (b *blobReader) check() error {
	if b.size > b.limit {
		return &failure{kind: ErrUnexpectedAnswer, cause: format.ErrTooLarge, msg: fmt.Sprintf(
			"%s announces %d bytes, the manifest says %d: the registry, or what is in between, changes content", b.r.ep, b.size, b.d.Size)}
	}
	if isHTML(b.x.resp, nil) {
		return &failure{kind: ErrUnexpectedAnswer, msg: fmt.Sprintf(
			"%s answered with a web page instead of a blob: it is no registry, or a login page or proxy is in the way", b.r.ep)}
	}
	return nil
}

// Read reads on, over breaks of the connection.
func (b *blobReader) Read(p []byte) (int, error) {
	for b.err == nil {
		n, err := b.x.Read(p)
		if n > 0 {
			b.off += int64(n)
			if b.moved != nil {
				b.moved(int64(n), b.restarted)
			}
			b.restarted = false
		}
		if b.off > b.limit {
			b.err = &failure{kind: ErrUnexpectedAnswer, cause: format.ErrTooLarge, msg: fmt.Sprintf(
				"%s sends more than the %d bytes that the manifest says", b.r.ep, b.d.Size)}
			break
		}
		if err == nil || errors.Is(err, io.EOF) {
			return n, err
		}
		if b.off == b.size {
			return n, io.EOF // it broke after the last byte
		}
		b.err = b.resume(err)
		if n > 0 {
			return n, nil
		}
	}
	return 0, b.err
}

// resume opens the blob again after err, from where it was, or returns why not.
func (b *blobReader) resume(err error) error {
	if b.off > b.opened {
		b.breaks, b.opened = 0, b.off
	}
	if b.off == 0 || b.size < 0 {
		return err // the caller starts it anew
	}
	for {
		b.breaks++
		if err := b.s.pause(b.ctx, b.breaks, err); err != nil {
			return err
		}
		b.close()
		if err = b.open(); err == nil {
			return nil
		}
		if b.ctx.Err() != nil {
			return context.Cause(b.ctx)
		}
	}
}

// readAll appends the whole blob to buf. Read's limit bounds it.
func (b *blobReader) readAll(buf []byte) ([]byte, error) {
	for {
		if len(buf) == cap(buf) {
			grow := make([]byte, len(buf), max(2*cap(buf), ioBuffer, int(min(b.size, smallBlob))+1))
			copy(grow, buf)
			buf = grow
		}
		n, err := b.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if errors.Is(err, io.EOF) {
			return buf, nil
		}
		if err != nil {
			return buf, err
		}
	}
}

// close ends the exchange, if there is one.
func (b *blobReader) close() {
	if b.x != nil {
		b.x.close()
		b.x = nil
	}
}
