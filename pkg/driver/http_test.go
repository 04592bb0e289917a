package driver_test

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
)

func TestHTTPEndpointIsChecked(t *testing.T) {
	for _, addr := range []string{"9809", "localhost", "localhost:http", ":99999", "http://localhost:1", ":"} {
		t.Run(addr, func(t *testing.T) {
			cfg := testConfig("unix:///run/csi.sock", "/state", "")
			cfg.HTTPEndpoint = addr
			if _, err := driver.New(cfg); err == nil || !strings.Contains(err.Error(), "[HOST]:PORT") {
				t.Errorf("got %v, want an error that says what is meant", err)
			}
		})
	}
	t.Run("pprof without it", func(t *testing.T) {
		cfg := testConfig("unix:///run/csi.sock", "/state", "")
		cfg.Pprof = true
		if _, err := driver.New(cfg); err == nil || !strings.Contains(err.Error(), "HTTP endpoint") {
			t.Errorf("got %v, want an error", err)
		}
	})
	t.Run("taken", func(t *testing.T) {
		n := newNode(t)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		n.cfg.HTTPEndpoint = l.Addr().String()
		d, err := driver.New(n.cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), n.cfg.HTTPEndpoint) {
			t.Errorf("got %v, want an error that names the address", err)
		}
		if _, err := os.Lstat(filepath.Join(n.dir, "state")); err == nil {
			t.Error("the state directory was made all the same")
		}
	})
}

// TestProbesWhileStarting: the driver is alive and not ready while it mounts volumes again, as
// long as that may take, and ready afterwards.
func TestProbesWhileStarting(t *testing.T) {
	_, n, im, req := newPublished(t, 1)
	n.stop()

	n.serveHTTP()
	arrived, release := make(chan struct{}), make(chan struct{})
	n.cfg.Fault = func(step string) error {
		if step == driver.StepRestore {
			close(arrived)
			<-release
		}
		return nil
	}
	n.launch()
	<-arrived
	if code, body := n.get("/healthz"); code != http.StatusOK {
		t.Errorf("healthz while starting: %d %s", code, body)
	}
	if code, body := n.get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "starting") {
		t.Errorf("readyz while starting: %d %s", code, body)
	}
	n.metricsAre(map[string]string{"puzzlefs_ready": "0", `puzzlefs_volumes{state="published"}`: "1"})
	close(release)
	n.waitReady()
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, body := n.get(path); code != http.StatusOK || body != "ok\n" {
			t.Errorf("%s: %d %q, want 200 and ok", path, code, body)
		}
	}
	n.metricsAre(map[string]string{
		"puzzlefs_ready": "1", `puzzlefs_restores_total{result="mounted"}`: "1", `puzzlefs_restores_total{result="failed"}`: "0",
		"puzzlefs_mounts": "1",
	})
	n.shows(req.TargetPath, im)
	n.unpublish(req)
	n.nothingLeft()
}

// TestProbesTakeNoLocks: a publish that is stuck in the middle, with the locks of its target and of its mount
// held, holds up neither probes nor metrics; nor does an API server that hangs.
func TestProbesTakeNoLocks(t *testing.T) {
	reg := newRegistry(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	publish, _ := driver.Steps()
	for _, step := range publish {
		t.Run(step, func(t *testing.T) {
			n := newNode(t) // where nothing was pulled yet
			n.serveHTTP()
			arrived, release := make(chan struct{}), make(chan struct{})
			var once sync.Once
			n.cfg.Fault = func(at string) error {
				if at == step {
					once.Do(func() { close(arrived) })
					<-release
				}
				return nil
			}
			n.start()
			req := n.request("a", ref, im.digest.String())
			result := make(chan error, 1)
			go func() {
				_, err := n.NodePublishVolume(t.Context(), req)
				result <- err
			}()
			<-arrived
			for _, path := range []string{"/healthz", "/readyz", "/metrics"} {
				if code, body := n.get(path); code != http.StatusOK {
					t.Errorf("%s: %d %s", path, code, body)
				}
			}
			close(release)
			if err := <-result; err != nil {
				t.Fatal(err)
			}
			n.unpublish(req)
			n.stop()
		})
	}
}

// TestHealthzAsksTheSocket: it fails when kubelet would not get an answer either.
func TestHealthzAsksTheSocket(t *testing.T) {
	n := newNode(t)
	n.serveHTTP()
	n.start()
	if err := os.Remove(filepath.Join(n.dir, "csi.sock")); err != nil {
		t.Fatal(err)
	}
	if code, body := n.get("/healthz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "CSI socket") {
		t.Errorf("healthz without the socket: %d %s", code, body)
	}
}

// TestStopIsOrderly: while the driver stops it is alive and not ready, for HTTP and for CSI,
// and a call under way ends well; then HTTP is gone.
func TestStopIsOrderly(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.serveHTTP()
	publish, _ := driver.Steps()
	last := publish[len(publish)-1]
	arrived, release := make(chan struct{}), make(chan struct{})
	n.cfg.Fault = func(step string) error {
		if step == last {
			close(arrived)
			<-release
		}
		return nil
	}
	n.start()
	if probe, err := csi.NewIdentityClient(n.conn).Probe(t.Context(), &csi.ProbeRequest{}); err != nil || !probe.GetReady().GetValue() {
		t.Errorf("probe: %v, %v; want ready", probe, err)
	}
	req := n.request("a", ref, im.digest.String())
	result := make(chan error, 1)
	go func() {
		_, err := n.NodePublishVolume(t.Context(), req)
		result <- err
	}()
	<-arrived
	stopped := make(chan struct{})
	stop := n.stop
	go func() {
		stop()
		close(stopped)
	}()
	eventually(t, "readyz says that the driver stops", func() bool {
		code, body := n.get("/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(body, "stopping")
	})
	if code, body := n.get("/healthz"); code != http.StatusOK {
		t.Errorf("healthz while stopping: %d %s", code, body)
	}
	close(release)
	if err := <-result; err != nil {
		t.Errorf("the call under way ended with %v", err)
	}
	<-stopped
	if code, body := n.get("/healthz"); code != 0 {
		t.Errorf("after the end: %d %s", code, body)
	}
	n.cfg.Fault = nil
	n.start()
	n.unpublish(req)
	n.nothingLeft()
}

// TestHTTPServesNoMore than it says, and to nobody who sends too much.
func TestHTTPServesNoMore(t *testing.T) {
	for _, pprof := range []bool{false, true} {
		t.Run(fmt.Sprintf("pprof %v", pprof), func(t *testing.T) {
			n := newNode(t)
			n.serveHTTP()
			n.cfg.Pprof = pprof
			n.start()
			want := map[string]int{"/": http.StatusNotFound, "/healthz/x": http.StatusNotFound, "/debug/pprof/": http.StatusNotFound, "/debug/pprof/heap": http.StatusNotFound}
			if pprof {
				want["/debug/pprof/"], want["/debug/pprof/heap"], want["/debug/pprof/cmdline"] = http.StatusOK, http.StatusOK, http.StatusOK
			}
			for path, code := range want {
				if got, _ := n.get(path); got != code {
					t.Errorf("%s: %d, want %d", path, got, code)
				}
			}
			conn, err := net.Dial("tcp", n.cfg.HTTPEndpoint)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprintf(conn, "GET /readyz HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n", strings.Repeat("x", 64<<10))
			line, _ := bufio.NewReader(conn).ReadString('\n') // the rest may be cut off
			if !strings.Contains(line, "431") {
				t.Errorf("a header of 64 KiB: %q, want 431", line)
			}
		})
	}
}

// TestVolumeStats: of what is published only, without a look at the mount.
func TestVolumeStats(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	_, unpublish := driver.Steps()
	var fail atomic.Bool
	n.cfg.Fault = func(step string) error {
		if step == unpublish[1] && fail.Load() {
			return driver.ErrUnavailable
		}
		return nil
	}
	n.start()
	sub := n.request("a", ref, im.digest.String())
	sub.VolumeContext["subPath"] = "dir/sub"
	n.publish(sub)
	stats := func() (*csi.NodeGetVolumeStatsResponse, error) {
		return n.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: sub.VolumeId, VolumePath: sub.TargetPath})
	}
	var size int64
	for _, content := range im.files {
		size += int64(len(content))
	}
	got, err := stats()
	if err != nil || got.GetUsage()[0].GetTotal() != size || got.GetUsage()[0].GetAvailable() != 0 || got.GetUsage()[1].GetUsed() != 8 {
		t.Errorf("of a subPath: %v, %v; want the whole image, %d bytes", got, err, size)
	}
	fail.Store(true)
	if _, err := n.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: sub.VolumeId, TargetPath: sub.TargetPath}); status.Code(err) != codes.Unavailable {
		t.Fatalf("unpublish: %v", err)
	}
	if got, err := stats(); status.Code(err) != codes.Aborted {
		t.Errorf("of a volume half unpublished: %v, %v; want Aborted", got, err)
	}
	fail.Store(false)
	n.unpublish(sub)
	if got, err := stats(); status.Code(err) != codes.NotFound {
		t.Errorf("of an unpublished volume: %v, %v; want NotFound", got, err)
	}
}
