package driver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
)

// What the tests of metrics, probes, events and logs share.

// eventually waits until ok, for as long as a slow machine may need.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("did not happen: %s", what)
}

// serveHTTP makes the node's driver serve HTTP on a port that was free just now.
func (n *testNode) serveHTTP() {
	n.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	n.cfg.HTTPEndpoint = l.Addr().String()
	if err := l.Close(); err != nil {
		n.t.Fatal(err)
	}
}

// launch runs a driver without waiting until it is ready.
func (n *testNode) launch() {
	n.t.Helper()
	d, err := driver.New(n.cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	n.stop = func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("driver ended with: %v", err)
		}
		n.stop = nil
	}
}

// get asks the driver's HTTP endpoint, 0 if nobody answers. Connections are not kept.
func (n *testNode) get(path string) (code int, body string) {
	n.t.Helper()
	req, err := http.NewRequestWithContext(n.t.Context(), http.MethodGet, "http://"+n.cfg.HTTPEndpoint+path, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Error(err)
	}
	return resp.StatusCode, string(b)
}

// metric returns the value of a series, as Prometheus would see it, "" if there is none.
func (n *testNode) metric(series string) string {
	n.t.Helper()
	_, body := n.get("/metrics")
	for line := range strings.Lines(body) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// metricsAre compares series with what they should be.
func (n *testNode) metricsAre(want map[string]string) {
	n.t.Helper()
	for series, value := range want {
		if got := n.metric(series); got != value {
			n.t.Errorf("%s is %q, want %q", series, got, value)
		}
	}
}

// logBuffer takes log lines as JSON.
type logBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

// Write implements io.Writer.
func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// lines returns the lines so far with that message, or all for "".
func (l *logBuffer) lines(t *testing.T, msg string) (list []map[string]any) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatal(err)
		}
		if msg == "" || m["msg"] == msg {
			list = append(list, m)
		}
	}
	return list
}

// logJSON makes the node's driver log into the returned buffer.
func (n *testNode) logJSON() *logBuffer {
	l := new(logBuffer)
	n.cfg.Logger = slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
	return l
}

// podRequest is what kubelet sends for a pod that it tells all about.
func (n *testNode) podRequest(pod, ref, digest string) *csi.NodePublishVolumeRequest {
	n.t.Helper()
	req := n.request(pod, ref, digest)
	req.VolumeContext["csi.storage.k8s.io/pod.namespace"] = "team"
	req.VolumeContext["csi.storage.k8s.io/pod.uid"] = "uid-of-" + pod
	return req
}

// apiServer is as much of a Kubernetes API server as events need.
type apiServer struct {
	url string

	mu     sync.Mutex // guards what follows
	events map[string]*corev1.Event
	order  []string
	asked  []string
	// hang, if not nil, holds all answers back until it is closed; refuse answers 403.
	hang   chan struct{}
	refuse bool
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	s := &apiServer{events: map[string]*corev1.Event{}}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	s.url = srv.URL
	return s
}

// ServeHTTP implements http.Handler.
func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.asked = append(s.asked, r.Method+" "+r.URL.Path)
	hang := s.hang
	s.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-r.Context().Done():
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	event := new(corev1.Event)
	if old := s.events[r.URL.Path]; r.Method == http.MethodPatch && old != nil {
		*event = *old
	} else if r.Method == http.MethodPatch {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)
		return
	}
	if s.refuse {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","message":"no events for you","code":403}`)
		return
	}
	// The fields of an event that are patched are plain: a merge is a decoding on top.
	if err := json.Unmarshal(body, event); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	path := r.URL.Path
	if r.Method == http.MethodPost {
		path += "/" + event.Name
		s.order = append(s.order, path)
		w.WriteHeader(http.StatusCreated)
	}
	s.events[path] = event
	_ = json.NewEncoder(w).Encode(event)
}

// set changes the API server's mood.
func (s *apiServer) set(change func(*apiServer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

// all returns the events in the order in which they were made, those for a pod if it is not "".
func (s *apiServer) all(pod string) (list []corev1.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, path := range s.order {
		if e := s.events[path]; pod == "" || e.InvolvedObject.Name == pod {
			list = append(list, *e)
		}
	}
	return list
}

// kubeconfig writes a file that names the API server.
func (s *apiServer) kubeconfig(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c",
"clusters":[{"name":"k","cluster":{"server":%q}}],"users":[{"name":"u","user":{}}],
"contexts":[{"name":"c","context":{"cluster":"k","user":"u"}}]}`, s.url)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// sendEvents makes the node's driver send events to a new API server.
func (n *testNode) sendEvents() *apiServer {
	n.t.Helper()
	s := newAPIServer(n.t)
	n.cfg.PodEvents, n.cfg.Kubeconfig = true, s.kubeconfig(n.t)
	return s
}

// shortContext is for a call that is not to wait for a pull.
func shortContext(t *testing.T) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), 600*time.Millisecond)
}
