package registry

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

const (
	defaultConcurrency = 16
	maxConcurrency     = 128
	defaultUserAgent   = "csi-puzzlefs"
	defaultIdleTimeout = time.Minute
)

// Config says how a Client reaches registries. The zero value is an anonymous client with
// the system's certificates.
type Config struct {
	// CertsDir is a directory in containerd's layout (certs.d/HOST/hosts.toml) with
	// certificates and mirrors, read anew for each operation; "" for none. It must exist.
	CertsDir string
	// Credentials is asked when a registry or a mirror wants to know who asks; nil: anonymous.
	Credentials CredentialFunc
	// UserAgent is sent with each request; "" means "csi-puzzlefs".
	UserAgent string
	// Logger gets a warning when a mirror is given up, and retries at debug level; nil: nobody.
	Logger *slog.Logger
	// Concurrency is how many blobs of one Pull or Push are under way at a time, 1 to 128;
	// 0 means 16. Each takes up to 1 MiB of memory.
	Concurrency int
	// MaxManifestBytes bounds the manifests of images that Resolve and Pull take into memory,
	// where decoding takes a few times as much; 0 means format.MaxManifestSize, which is also
	// the most.
	MaxManifestBytes int64
	// Retry bounds the attempts at each request.
	Retry Retry
	// IdleTimeout is how long an exchange may stand still before it is given up and tried
	// again; 0 means one minute.
	IdleTimeout time.Duration
}

// Retry bounds the attempts at one request that fails with 408, 429, 500, 502, 503, 504, a
// broken connection, half a body or a wrong digest. Zero fields get the default.
type Retry struct {
	// Attempts includes the first; default 5. A large blob that advances between two breaks
	// of the connection starts counting anew.
	Attempts int
	// MinWait is the first pause, doubled up to MaxWait, with jitter; default 250 ms and 5 s.
	MinWait, MaxWait time.Duration
	// MaxRetryAfter is the longest Retry-After that is waited for; default one minute. A
	// registry that asks for more is given up at once.
	MaxRetryAfter time.Duration
}

func (r Retry) withDefaults() Retry {
	if r.Attempts == 0 {
		r.Attempts = 5
	}
	if r.MinWait == 0 {
		r.MinWait = 250 * time.Millisecond
	}
	if r.MaxWait == 0 {
		r.MaxWait = max(5*time.Second, r.MinWait)
	}
	if r.MaxRetryAfter == 0 {
		r.MaxRetryAfter = time.Minute
	}
	return r
}

// Client moves images. It holds connections and no credentials: each operation
// authenticates for itself and forgets the tokens it got. Safe for concurrent use.
type Client struct {
	cfg        Config
	transports *transports
}

// New returns a Client, or an error that wraps ErrInvalidConfig.
func New(cfg Config) (*Client, error) {
	bad := func(format string, args ...any) (*Client, error) {
		return nil, fmt.Errorf("configure registry client: %s: %w", fmt.Sprintf(format, args...), ErrInvalidConfig)
	}
	if cfg.CertsDir != "" {
		fi, err := os.Stat(cfg.CertsDir)
		if err != nil {
			return nil, fmt.Errorf("configure registry client: certificates: %w: %w", err, ErrInvalidConfig)
		}
		if !fi.IsDir() {
			return bad("certificates: %s is not a directory; want one with HOST/hosts.toml in it", cfg.CertsDir)
		}
	}
	if cfg.Concurrency == 0 {
		cfg.Concurrency = defaultConcurrency
	}
	if cfg.Concurrency < 1 || cfg.Concurrency > maxConcurrency {
		return bad("concurrency %d is not from 1 to %d", cfg.Concurrency, maxConcurrency)
	}
	if cfg.MaxManifestBytes == 0 {
		cfg.MaxManifestBytes = format.MaxManifestSize
	}
	if cfg.MaxManifestBytes < 0 || cfg.MaxManifestBytes > format.MaxManifestSize {
		return bad("manifests of %d bytes are not from 1 to %d", cfg.MaxManifestBytes, format.MaxManifestSize)
	}
	cfg.Retry = cfg.Retry.withDefaults()
	if r := cfg.Retry; r.Attempts < 1 || r.MinWait < 0 || r.MaxWait < r.MinWait || r.MaxRetryAfter < 0 {
		return bad("retry: %+v: want at least 1 attempt and 0 <= MinWait <= MaxWait", r)
	}
	if cfg.IdleTimeout == 0 {
		cfg.IdleTimeout = defaultIdleTimeout
	}
	if cfg.IdleTimeout < 0 {
		return bad("idle timeout %v is negative", cfg.IdleTimeout)
	}
	if cfg.UserAgent == "" {
		cfg.UserAgent = defaultUserAgent
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Client{cfg: cfg, transports: &transports{perHost: 2 * cfg.Concurrency}}, nil
}

// WithCredentials returns a Client that shares c's connections and configuration but not
// its credentials. It is cheap: one for each pod is fine.
func (c *Client) WithCredentials(f CredentialFunc) *Client {
	cfg := c.cfg
	cfg.Credentials = f
	return &Client{cfg: cfg, transports: c.transports}
}

// CloseIdleConnections closes connections that no operation uses. The Client stays usable.
func (c *Client) CloseIdleConnections() { c.transports.closeIdle() }

// maxMirrorFailures is after how many failures in a row a mirror is left alone for the rest
// of an operation: enough for a hiccup, few enough that a dead mirror does not slow down
// thousands of blobs.
const maxMirrorFailures = 3

// session is one operation on one repository: who is asked, and the tokens they gave.
type session struct {
	cfg     *Config
	ref     Reference
	remotes []*remote
}

// remote is an endpoint within a session.
type remote struct {
	ep   *endpoint
	auth *auth.Client
	cfg  *Config
	// failures counts the failures since the last success.
	failures atomic.Int32
	// mayRead and mayWrite are set once a request of that sort was let in.
	mayRead, mayWrite atomic.Bool
}

// letIn returns the flag for the sort of a request.
func (r *remote) letIn(method string) *atomic.Bool {
	if method == http.MethodGet || method == http.MethodHead {
		return &r.mayRead
	}
	return &r.mayWrite
}

// open starts an operation on ref.
func (c *Client) open(ref Reference) (*session, error) {
	eps, err := loadEndpoints(c.cfg.CertsDir, ref.Registry)
	if err != nil {
		return nil, err
	}
	s := &session{cfg: &c.cfg, ref: ref}
	for i := range eps {
		ep := &eps[i]
		rt, err := c.transports.forEndpoint(ep)
		if err != nil {
			return nil, err
		}
		s.remotes = append(s.remotes, &remote{ep: ep, cfg: &c.cfg, auth: &auth.Client{
			Client: &http.Client{Transport: rt, CheckRedirect: checkRedirect},
			Header: http.Header{"User-Agent": {c.cfg.UserAgent}},
			// One repository, one cache: tokens are found again even where the registry's
			// challenge asks for another scope than the one that was expected.
			Cache:      auth.NewSingleContextCache(),
			Credential: c.credentialFor(ep, ref.Repository),
			ClientID:   defaultUserAgent,
		}})
	}
	return s, nil
}

// credentialFor returns what oras asks for credentials: those of this endpoint, and none
// for any other host, whatever asks for them.
func (c *Client) credentialFor(ep *endpoint, repository string) auth.CredentialFunc {
	return func(ctx context.Context, hostport string) (auth.Credential, error) {
		if c.cfg.Credentials == nil || hostport != ep.base.Host {
			return auth.EmptyCredential, nil
		}
		cred, err := c.cfg.Credentials(ctx, ep.loginName(), repository)
		if err != nil {
			return auth.EmptyCredential, &credentialError{err}
		}
		return cred.oras(), nil
	}
}

// credentialError is an error of a CredentialFunc, which says itself what is wrong.
type credentialError struct{ err error }

func (e *credentialError) Error() string { return e.err.Error() }
func (e *credentialError) Unwrap() error { return e.err }

// What a token may be for.
const (
	actionPull = auth.ActionPull
	actionPush = auth.ActionPush
)

// scopes returns ctx with the token scope that the operation needs, so that one token does
// for all requests of it.
func (s *session) scopes(ctx context.Context, actions ...string) context.Context {
	return auth.WithScopes(ctx, auth.ScopeRepository(s.ref.Repository, actions...))
}

// able returns the remotes that may be asked, mirrors that keep failing left out. The last
// one that has the capability is always among them.
func (s *session) able(need capability) []*remote {
	var list []*remote
	last := -1
	for i, r := range s.remotes {
		if r.ep.caps&need == need {
			last = i
		}
	}
	for i, r := range s.remotes {
		if r.ep.caps&need == need && (i == last || r.failures.Load() < maxMirrorFailures) {
			list = append(list, r)
		}
	}
	return list
}
