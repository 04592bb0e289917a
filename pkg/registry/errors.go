package registry

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// Errors of this package. All are wrapped with the reference, the endpoint and the cure;
// use errors.Is. Errors of the local store, format.ErrNotPuzzleFS, format.ErrCorrupt and
// format.ErrTooLarge come through as they are.
var (
	// ErrInvalidReference says that a text is not an image reference.
	ErrInvalidReference = errors.New("invalid image reference")
	// ErrInvalidConfig says that a Config, a hosts.toml, a certificate file or a Docker config
	// cannot be used.
	ErrInvalidConfig = errors.New("invalid registry configuration")
	// ErrNotFound says that the registry does not have the repository, tag, manifest or blob.
	ErrNotFound = errors.New("not found in the registry")
	// ErrUnauthorized says that the registry wants credentials, or other ones (401).
	ErrUnauthorized = errors.New("unauthorized by the registry")
	// ErrForbidden says that the credentials were accepted but do not suffice (403).
	ErrForbidden = errors.New("forbidden by the registry")
	// ErrRateLimited says that the registry still asked to slow down (429) after all retries.
	ErrRateLimited = errors.New("rate limited by the registry")
	// ErrUnavailable says that the registry cannot be reached, fails (5xx), stalls or breaks off
	// after all retries.
	ErrUnavailable = errors.New("registry unavailable")
	// ErrRefused says that the registry does not take what was pushed.
	ErrRefused = errors.New("refused by the registry")
	// ErrUnexpectedAnswer says that an answer is not one that a registry gives, such as the
	// login page of a proxy.
	ErrUnexpectedAnswer = errors.New("not the answer of a registry")
	// ErrDigestMismatch is the store's: bytes do not have the digest they were asked for by.
	ErrDigestMismatch = store.ErrDigestMismatch
)

// failure is what went wrong in one exchange with one endpoint.
type failure struct {
	// kind is the sentinel that callers test for.
	kind error
	// msg is the whole text, free of secrets.
	msg string
	// cause is the error underneath, without URLs; or nil.
	cause error
	// status is the HTTP status, 0 when there was no answer.
	status int
	// codes are the error codes of the answer, such as MANIFEST_INVALID.
	codes []string
	// retry says that the same request may succeed later, after says how much later at least.
	retry bool
	after time.Duration
}

func (f *failure) Error() string { return f.msg }

// Unwrap makes both the sentinel and the cause visible to errors.Is and errors.As.
func (f *failure) Unwrap() []error {
	if f.cause == nil {
		return []error{f.kind}
	}
	return []error{f.kind, f.cause}
}

// has reports whether the answer carried one of the error codes.
func (f *failure) has(codes ...string) bool {
	for _, have := range f.codes {
		for _, c := range codes {
			if have == c {
				return true
			}
		}
	}
	return false
}

// localError is a failure on this side, of the store: another endpoint would not help.
type localError struct{ err error }

func (e *localError) Error() string { return e.err.Error() }
func (e *localError) Unwrap() error { return e.err }

const (
	// maxErrorBody is how much of an answer is read to find out what went wrong, in bytes.
	maxErrorBody = 8 << 10
	// maxQuoted is how much foreign text a message quotes, in bytes.
	maxQuoted = 200
)

// quote returns foreign text fit for a message: one line, printable, of bounded length.
func quote(s string) string {
	if len(s) > maxQuoted {
		s = strings.ToValidUTF8(s[:maxQuoted], "") + "…"
	}
	return strconv.Quote(strings.ToValidUTF8(s, "\uFFFD"))
}

// answerFailure turns an answer with an unexpected status into a failure. It reads a little
// of the body and leaves closing to the caller.
func answerFailure(ep *endpoint, resp *http.Response) *failure {
	f := &failure{status: resp.StatusCode, after: retryAfter(resp)}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // what arrived is all there is to say
	said := ""
	// Another host than the one that was asked is a stranger, perhaps one that only this
	// node can reach: what it says is not passed on.
	if ep.sameOrigin(resp.Request.URL) {
		f.codes, said = describeBody(resp, body)
	}
	f.msg = fmt.Sprintf("%s answered %d %s%s", ep, resp.StatusCode, http.StatusText(resp.StatusCode), said)
	f.classify(ep)
	return f
}

// classify sets kind and retry by the status, and appends the cure.
func (f *failure) classify(ep *endpoint) {
	switch s := f.status; {
	case s == http.StatusUnauthorized:
		f.kind = ErrUnauthorized
		f.msg += ": no or wrong credentials, or no such repository: give credentials for " + ep.loginName() +
			", by docker login, or for a pod's volume by a nodePublishSecretRef"
	case s == http.StatusForbidden:
		f.kind = ErrForbidden
		f.msg += ": these credentials do not allow it: ask for access to the repository, or use others"
	case s == http.StatusNotFound:
		f.kind = ErrNotFound
	case s == http.StatusTooManyRequests:
		f.kind, f.retry = ErrRateLimited, true
		f.msg += ": too many requests: wait, log in, or use a mirror"
	case s == http.StatusRequestTimeout || s == http.StatusInternalServerError || s == http.StatusBadGateway ||
		s == http.StatusServiceUnavailable || s == http.StatusGatewayTimeout:
		f.kind, f.retry = ErrUnavailable, true
		f.msg += ": the registry is failing: try again later"
	case s >= 500:
		f.kind = ErrUnavailable
	case s >= 400:
		f.kind = ErrRefused
	default:
		f.kind = ErrUnexpectedAnswer
	}
}

// describeBody returns the error codes of the body and what it says, quoted, with a space
// and parentheses around it.
func describeBody(resp *http.Response, body []byte) (codes []string, said string) {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	text := ""
	if err := json.Unmarshal(body, &doc); err == nil && len(doc.Errors) > 0 {
		for _, e := range doc.Errors {
			codes = append(codes, e.Code)
		}
		text = doc.Errors[0].Code
		if m := doc.Errors[0].Message; m != "" {
			text += ": " + m
		}
	} else if isHTML(resp, body) {
		return nil, " (with a web page)"
	} else {
		text = strings.TrimSpace(string(body))
	}
	if text == "" {
		return codes, ""
	}
	return codes, " (" + quote(withoutSecrets(text, resp.Request)) + ")"
}

// withoutSecrets removes from text what req carried as credentials, should the registry
// send it back.
func withoutSecrets(text string, req *http.Request) string {
	scheme, token, _ := strings.Cut(req.Header.Get("Authorization"), " ")
	secrets := []string{token}
	if strings.EqualFold(scheme, "basic") {
		if b, err := base64.StdEncoding.DecodeString(token); err == nil {
			_, password, _ := strings.Cut(string(b), ":")
			secrets = append(secrets, string(b), password)
		}
	}
	for _, s := range secrets {
		if s != "" {
			text = strings.ReplaceAll(text, s, "[redacted]")
		}
	}
	return text
}

// isHTML reports whether an answer is a web page.
func isHTML(resp *http.Response, body []byte) bool {
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")) // malformed: not a web page
	if mediaType == "text/html" || mediaType == "application/xhtml+xml" {
		return true
	}
	head := strings.ToLower(strings.TrimSpace(string(body[:min(len(body), 64)])))
	return strings.HasPrefix(head, "<!doctype html") || strings.HasPrefix(head, "<html")
}

// retryAfter returns how long the answer asks to wait, 0 if it does not say.
func retryAfter(resp *http.Response) time.Duration {
	v := resp.Header.Get("Retry-After")
	if v == "" {
		return 0
	}
	if s, err := strconv.ParseInt(v, 10, 32); err == nil {
		return max(0, time.Duration(s)*time.Second)
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(0, time.Until(t))
	}
	return 0
}

// urlQuery matches the query of a URL in the text of an error. Queries hold signatures and
// upload states, which are as good as a password while they last.
var urlQuery = regexp.MustCompile(`\?[^\s"']+`)

// withoutQueries returns the text of err without the queries of URLs, on one line.
func withoutQueries(err error) string {
	text := urlQuery.ReplaceAllString(err.Error(), "?…")
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "\uFFFD"))
}
