package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
)

// answer returns a handler that is not ready for as many requests as it is told.
func answer(notReady int64) http.Handler {
	var asked atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/readyz" {
			http.NotFound(w, r)
			return
		}
		if asked.Add(1) <= notReady {
			http.Error(w, "the driver is starting", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
}

func TestProbe(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := "http://" + closed.Addr().String() + "/readyz"
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	start := func(h http.Handler) string {
		srv := httptest.NewServer(h)
		t.Cleanup(srv.Close)
		return srv.URL
	}
	redirects := start(http.RedirectHandler("/readyz", http.StatusFound))
	tests := []struct {
		name, timeout, url string
		code               int
		says               string
	}{
		{"ready", "1m", start(answer(0)) + "/readyz", exitOK, "127.0.0.1 is ready"},
		{"becomes ready", "1m", start(answer(1)) + "/readyz", exitOK, "127.0.0.1 is ready"},
		{"is not ready", "10ms", start(answer(1000)) + "/readyz", exitError, "not ready after 10ms: 127.0.0.1: answered 503 Service Unavailable: the driver is starting"},
		{"another path", "10ms", start(answer(0)) + "/", exitError, "answered 404"},
		{"redirect", "10ms", redirects + "/x", exitError, "answered 302"},
		{"nobody listens", "10ms", nobody, exitError, "127.0.0.1"},
		{"no such host", "10ms", "http://drivers.invalid:9809/readyz", exitError, "drivers.invalid"},
		{"scheme", "1s", "https://127.0.0.1/readyz", exitUsage, "want http://HOST"},
		{"no host", "1s", "http:///readyz", exitUsage, "want http://HOST"},
		{"no time", "0s", "http://127.0.0.1/readyz", exitUsage, "more than nothing"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr strings.Builder
			code := run([]string{"probe", "--timeout", tt.timeout, tt.url}, &stdout, &stderr)
			if out := stdout.String() + stderr.String(); code != tt.code || !strings.Contains(out, tt.says) {
				t.Errorf("exit code %d and %q, want %d and something that says %q", code, out, tt.code, tt.says)
			}
		})
	}
}

// One driver that is not ready is enough, whatever the others say.
func TestProbeAsksEveryAddress(t *testing.T) {
	srv := httptest.NewServer(answer(0)) // on 127.0.0.1 only
	defer srv.Close()
	target, err := url.Parse(srv.URL + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	one, two := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2")
	if err := probeAll(t.Context(), target, []netip.Addr{one}); err != nil {
		t.Errorf("with the one that is ready: %v", err)
	}
	err = probeAll(t.Context(), target, []netip.Addr{one, two})
	if err == nil || !strings.HasPrefix(err.Error(), "127.0.0.2: ") || strings.Contains(err.Error(), "127.0.0.1: ") {
		t.Errorf("got %v, want a complaint about 127.0.0.2 alone", err)
	}
}
