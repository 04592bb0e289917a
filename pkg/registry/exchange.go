package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"
)

// uploadPatience is how many idle timeouts a registry may take to store what it was sent:
// those that keep blobs in an object store copy a large one before they answer.
const uploadPatience = 5

// errStalled is the cause of a context that the watch cancelled.
var errStalled = errors.New("no data")

// watch cancels an exchange that stands still. Close it when the exchange is over.
type watch struct {
	ctx    context.Context // the exchange's, and gone with it
	cancel context.CancelCauseFunc
	timer  *time.Timer
	idle   time.Duration
}

// newWatch returns a watch and the context of the exchange that it watches.
func newWatch(ctx context.Context, idle time.Duration) (context.Context, *watch) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watch{ctx: ctx, cancel: cancel, idle: idle}
	w.timer = time.AfterFunc(idle, func() { cancel(errStalled) })
	return ctx, w
}

// touch says that there was progress.
func (w *watch) touch() { w.timer.Reset(w.idle) }

func (w *watch) close() {
	w.timer.Stop()
	w.cancel(nil)
}

// exchange is an answer being read.
type exchange struct {
	resp *http.Response
	w    *watch
	r    *remote
}

// Read reads the body. Errors are failures, or the caller's context's.
func (x *exchange) Read(p []byte) (int, error) {
	n, err := x.resp.Body.Read(p)
	if n > 0 {
		x.w.touch()
	}
	if err != nil && !errors.Is(err, io.EOF) {
		if err2 := x.r.interrupted(x.w); err2 != nil {
			return n, err2
		}
		err = networkFailure(x.r.ep, x.r.ep.String(), err)
	}
	return n, err
}

// close ends the exchange. A short rest of the body is read so that the connection can be
// used again.
func (x *exchange) close() {
	_, _ = io.CopyN(io.Discard, x.resp.Body, maxErrorBody)
	_ = x.resp.Body.Close()
	x.w.close()
}

// request is what do sends. body may be called again for each attempt.
type request struct {
	method, url string
	header      http.Header
	body        func() io.ReadCloser
	size        int64
	// want are the statuses that are no failure.
	want []int
}

// do sends one request, logging in where it is asked to, and returns the answer if its
// status is wanted. Errors are failures, or ctx's.
func (r *remote) do(ctx context.Context, rq request) (*exchange, error) {
	idle := r.cfg.IdleTimeout
	if rq.body != nil {
		idle *= uploadPatience
	}
	watched, w := newWatch(ctx, idle)
	req, err := http.NewRequestWithContext(watched, rq.method, rq.url, nil)
	if err != nil {
		w.close()
		return nil, &failure{kind: ErrUnexpectedAnswer, msg: fmt.Sprintf("%s gave an address that cannot be used", r.ep)}
	}
	if rq.header != nil {
		req.Header = rq.header.Clone()
	}
	if rq.body != nil {
		// Each part of the body that is read is progress.
		req.GetBody = func() (io.ReadCloser, error) { return &touching{rq.body(), w}, nil }
		req.ContentLength = rq.size
		if rq.size == 0 {
			req.GetBody = func() (io.ReadCloser, error) { return http.NoBody, nil }
		}
		if req.Body, err = req.GetBody(); err != nil {
			w.close()
			return nil, err
		}
	}
	resp, err := r.auth.Do(req) //nolint:bodyclose // exchange.close closes it
	if err != nil {
		err = r.sendFailure(w, err)
		w.close()
		return nil, err
	}
	w.touch()
	x := &exchange{resp: resp, w: w, r: r}
	for _, s := range rq.want {
		if resp.StatusCode == s {
			r.letIn(rq.method).Store(true)
			return x, nil
		}
	}
	f := answerFailure(r.ep, resp)
	if f.status == http.StatusUnauthorized && r.letIn(rq.method).Load() {
		// A token that was good a moment ago ran out between being got and being used.
		f.retry = true
	}
	x.close()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return nil, f
}

// touching is a request body that tells the watch that it is read.
type touching struct {
	io.ReadCloser
	w *watch
}

func (t *touching) Read(p []byte) (int, error) {
	t.w.touch()
	return t.ReadCloser.Read(p)
}

// interrupted returns the caller's error if its context ended, a failure if the watch ended
// the exchange, nil otherwise.
func (r *remote) interrupted(w *watch) error {
	cause := context.Cause(w.ctx)
	if errors.Is(cause, errStalled) {
		return &failure{
			kind: ErrUnavailable, retry: true, cause: os.ErrDeadlineExceeded,
			msg: fmt.Sprintf("%s sent nothing for %v: check the network, or try again later", r.ep, w.idle),
		}
	}
	return cause
}

// sendFailure turns an error of the HTTP client into a failure, without the URLs that the
// client puts into it.
func (r *remote) sendFailure(w *watch, err error) error {
	var (
		local    *localError
		fromAuth *errcode.ErrorResponse
		cred     *credentialError
		urlErr   *url.Error
	)
	if errors.As(err, &local) {
		return local // from the body of the request
	}
	if err := r.interrupted(w); err != nil {
		return err
	}
	switch {
	case errors.As(err, &fromAuth):
		return r.tokenFailure(fromAuth)
	case errors.As(err, &cred):
		return &failure{kind: ErrUnauthorized, cause: cred.err, msg: fmt.Sprintf("%s wants credentials: %s", r.ep, cred.err)}
	case errors.Is(err, auth.ErrBasicCredentialNotFound):
		f := &failure{status: http.StatusUnauthorized, msg: fmt.Sprintf("%s answered 401 Unauthorized", r.ep)}
		f.classify(r.ep)
		return f
	case errors.As(err, &urlErr):
		host := r.ep.String()
		if u, err := url.Parse(urlErr.URL); err == nil {
			host = originOf(u) // the token server's, or where a redirect leads
		}
		return networkFailure(r.ep, host, urlErr.Err)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF), errors.Is(err, context.Canceled):
		// The token server's answer, or that of another worker who asked it for both.
		return networkFailure(r.ep, r.ep.String(), err)
	}
	return r.loginFailure(err)
}

// networkFailure is about the connection to host, which belongs to ep.
func networkFailure(ep *endpoint, host string, err error) *failure {
	f := &failure{kind: ErrUnavailable, cause: err, retry: true}
	f.msg = fmt.Sprintf("cannot reach %s: %s", host, withoutQueries(plainNetwork(err)))
	f.explainNetwork(ep, host)
	if errors.Is(f.cause, context.Canceled) {
		// Another worker's, whose request for a token served this one too; it must not look
		// like the caller's.
		f.cause = nil
	}
	return f
}

// plainNetwork leaves the names of system calls out of an error of the network, whose text has one
// part for each layer that it came through: who reads it wants where and why.
func plainNetwork(err error) error {
	var (
		dnsErr *net.DNSError
		opErr  *net.OpError
		call   *os.SyscallError
	)
	switch {
	case errors.As(err, &dnsErr):
		plain := *dnsErr
		if at := strings.LastIndex(plain.Err, ": "); at >= 0 {
			plain.Err = plain.Err[at+len(": "):]
		}
		return &plain
	case errors.As(err, &opErr) && errors.As(opErr.Err, &call):
		plain := *opErr
		plain.Err = call.Err
		return &plain
	}
	return err
}

// explainNetwork adds the cure, and says where trying again does not help.
func (f *failure) explainNetwork(ep *endpoint, host string) {
	var (
		certErr *tls.CertificateVerificationError
		unknown x509.UnknownAuthorityError
		dnsErr  *net.DNSError
		remote  *net.OpError
	)
	err := f.cause
	switch {
	case errors.Is(err, errRedirect):
		f.kind, f.retry = ErrUnexpectedAnswer, false
	case errors.Is(err, http.ErrSchemeMismatch):
		f.retry = false
		f.msg += `: it speaks plain HTTP, which is for loopback addresses only: if that is meant, say http:// in the certs directory's ` +
			ep.registry + "/hosts.toml"
	case errors.As(err, &unknown):
		f.retry = false
		f.msg += ": put the CA's certificate into the certs directory as " + ep.registry + "/ca.crt, or name it in hosts.toml"
	case errors.As(err, &certErr):
		f.retry = false
		f.msg += ": the certificate is not valid for this host now: renew it, or use the name that it is for"
	case errors.As(err, &remote) && remote.Op == "remote error" && strings.Contains(remote.Err.Error(), "certificate"):
		// The type of a TLS alert is crypto/tls's own; its text is all there is.
		f.kind, f.retry = ErrUnauthorized, false
		f.msg += ": it does not accept this client: put a client certificate into the certs directory as " +
			ep.registry + "/client.cert and client.key"
	case strings.Contains(err.Error(), "http2: client conn could not be established"):
		// What HTTP/2 says when the server hangs up after the handshake; the alert is lost.
		f.msg += ": it hung up after the TLS handshake: it may want a client certificate, in the certs directory as " +
			ep.registry + "/client.cert and client.key"
	case errors.As(err, &dnsErr) && dnsErr.IsNotFound:
		f.retry = false
		f.msg += ": check the name of the registry, or the name server"
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		f.cause = io.ErrUnexpectedEOF
		f.msg = fmt.Sprintf("%s broke off its answer: check the network, or try again later", host)
	default:
		f.msg += ": check the network, or try again later"
	}
}

// tokenFailure is a token server that did not give a token.
func (r *remote) tokenFailure(e *errcode.ErrorResponse) *failure {
	f := &failure{status: e.StatusCode}
	if f.status == http.StatusBadRequest || f.status == http.StatusNotFound {
		f.status = http.StatusUnauthorized // a refresh token or a user it does not know
	}
	server := r.ep.String()
	if e.URL != nil {
		server = originOf(e.URL)
	}
	f.msg = fmt.Sprintf("%s sends to %s for a token, which answered %d %s", r.ep, server, e.StatusCode, http.StatusText(e.StatusCode))
	f.classify(r.ep)
	return f
}

// loginFailure is any other end of an attempt to log in.
func (r *remote) loginFailure(err error) *failure {
	// err is not kept as the cause: its text may hold the queries of URLs.
	f := &failure{kind: ErrUnauthorized, msg: fmt.Sprintf("cannot log in to %s: %s", r.ep, withoutQueries(err))}
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		f.kind = ErrUnexpectedAnswer
	}
	return f
}

// exhausted is an error that all attempts were spent on: a loop further out does not begin
// them again.
type exhausted struct{ err error }

func (e *exhausted) Error() string { return e.err.Error() }
func (e *exhausted) Unwrap() error { return e.err }

// retry calls op until it succeeds, fails for good or the attempts are used up.
func (s *session) retry(ctx context.Context, op func(context.Context) error) error {
	for attempt := 1; ; attempt++ {
		err := op(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := s.pause(ctx, attempt, err); err != nil {
			return err
		}
	}
}

// pause waits before the next attempt, or returns err if there is to be none.
func (s *session) pause(ctx context.Context, attempt int, err error) error {
	var (
		f     *failure
		local *localError
		over  *exhausted
		r     = s.cfg.Retry
	)
	if errors.As(err, &local) || errors.As(err, &over) || !errors.As(err, &f) || !f.retry {
		return err
	}
	if attempt >= r.Attempts {
		return &exhausted{fmt.Errorf("%w (after %d attempts)", err, attempt)}
	}
	if f.after > r.MaxRetryAfter {
		return &exhausted{fmt.Errorf("%w (it asks to wait %v, at most %v is waited)", err, f.after.Round(time.Second), r.MaxRetryAfter)}
	}
	wait := r.MinWait << min(attempt-1, 20)
	if wait <= 0 || wait > r.MaxWait {
		wait = r.MaxWait
	}
	// Half to all of it, so that the workers do not come back all at once.
	if wait > 1 {
		wait = wait/2 + rand.N(wait/2) //nolint:gosec // not a secret
	}
	wait = max(wait, f.after)
	s.cfg.Logger.DebugContext(ctx, "registry request failed, trying again", "error", err, "attempt", attempt, "wait", wait)
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// each asks the remotes with the capability one after the other until op succeeds. The error
// is that of the last one, the registry itself as a rule, with what the others said.
func (s *session) each(ctx context.Context, need capability, op func(context.Context, *remote) error) error {
	remotes := s.able(need)
	if len(remotes) == 0 {
		return fmt.Errorf("hosts.toml of %s names no host that may do this: check its capabilities: %w", s.ref.Registry, ErrInvalidConfig)
	}
	var mirrors []string
	for i, r := range remotes {
		err := op(ctx, r)
		if err == nil {
			r.failures.Store(0)
			return nil
		}
		var local *localError
		if ctx.Err() != nil || errors.As(err, &local) {
			return err
		}
		if i == len(remotes)-1 {
			if len(mirrors) > 0 {
				return fmt.Errorf("%w; before that: %s", err, strings.Join(mirrors, "; "))
			}
			return err
		}
		mirrors = append(mirrors, err.Error())
		if !errors.Is(err, ErrNotFound) && r.failures.Add(1) == maxMirrorFailures {
			s.cfg.Logger.WarnContext(ctx, "registry mirror keeps failing and is left alone for this operation",
				"mirror", r.ep.String(), "registry", s.ref.Registry, "error", err)
		}
	}
	return nil
}
