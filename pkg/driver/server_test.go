package driver_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

func TestNewChecksConfig(t *testing.T) {
	tests := []struct {
		name   string
		change func(*driver.Config)
		says   string
	}{
		{"endpoint", func(c *driver.Config) { c.Endpoint = "tcp://0.0.0.0:1" }, "unix:///"},
		{"relative endpoint", func(c *driver.Config) { c.Endpoint = "unix://csi.sock" }, "unix:///"},
		{"node id", func(c *driver.Config) { c.NodeID = "" }, "node id"},
		{"long node id", func(c *driver.Config) { c.NodeID = strings.Repeat("x", 257) }, "256"},
		{"state", func(c *driver.Config) { c.StateDir = "state" }, "absolute"},
		{"kubelet", func(c *driver.Config) { c.KubeletRootDir = "kubelet" }, "absolute"},
		{"mounter", func(c *driver.Config) { c.Mounter = nil }, "Mounter"},
		{"certificates", func(c *driver.Config) { c.Registry.CertsDir = "/nonexistent" }, "/nonexistent"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := testConfig("unix:///run/csi.sock", "/state", "")
			tt.change(&cfg)
			if _, err := driver.New(cfg); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want an error that says %q", err, tt.says)
			}
		})
	}
}

func TestIdentityAndNode(t *testing.T) {
	n := newNode(t)
	n.start()
	identity := csi.NewIdentityClient(n.conn)
	info, err := identity.GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
	if err != nil || info.GetName() != "csi.puzzlefs.io" || info.GetVendorVersion() != "test" {
		t.Errorf("plugin info: %v, %v", info, err)
	}
	if caps, err := identity.GetPluginCapabilities(t.Context(), &csi.GetPluginCapabilitiesRequest{}); err != nil || len(caps.GetCapabilities()) > 0 {
		t.Errorf("plugin capabilities: %v, %v; want none", caps, err)
	}
	if probe, err := identity.Probe(t.Context(), &csi.ProbeRequest{}); err != nil || !probe.GetReady().GetValue() {
		t.Errorf("probe: %v, %v", probe, err)
	}
	node, err := n.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	if err != nil || node.GetNodeId() != "node-1" || node.GetMaxVolumesPerNode() != 0 || node.GetAccessibleTopology() != nil {
		t.Errorf("node info: %v, %v", node, err)
	}
	caps, err := n.NodeGetCapabilities(t.Context(), &csi.NodeGetCapabilitiesRequest{})
	if err != nil || len(caps.GetCapabilities()) != 1 || caps.GetCapabilities()[0].GetRpc().GetType() != csi.NodeServiceCapability_RPC_GET_VOLUME_STATS {
		t.Errorf("node capabilities: %v, %v", caps, err)
	}
	if _, err := n.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("stage: %v, want Unimplemented", err)
	}
}

// TestSocket: a socket left behind is replaced, one in use and other files are not.
func TestSocket(t *testing.T) {
	run := func(t *testing.T, n *testNode) error {
		d, err := driver.New(n.cfg)
		if err != nil {
			t.Fatal(err)
		}
		return d.Run(t.Context())
	}
	t.Run("stale", func(t *testing.T) {
		n := newNode(t)
		path := filepath.Join(n.dir, "csi.sock")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		n.start()
		fi, err := os.Lstat(path)
		if err != nil || fi.Mode() != fs.ModeSocket|0o600 {
			t.Errorf("socket: %v, %v", fi, err)
		}
		n.stop()
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket is left (%v)", err)
		}
	})
	t.Run("in use", func(t *testing.T) {
		n := newNode(t)
		l, err := net.Listen("unix", filepath.Join(n.dir, "csi.sock"))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := run(t, n); err == nil || !strings.Contains(err.Error(), "another process listens") {
			t.Errorf("got %v, want an error that says so", err)
		}
	})
	t.Run("a file", func(t *testing.T) {
		n := newNode(t)
		if err := os.WriteFile(filepath.Join(n.dir, "csi.sock"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := run(t, n); err == nil || !strings.Contains(err.Error(), "not a socket") {
			t.Errorf("got %v, want an error that says so", err)
		}
	})
	t.Run("parent is made", func(t *testing.T) {
		n := newNode(t)
		n.cfg.Endpoint = "unix://" + filepath.Join(n.dir, "a/b/csi.sock")
		d, err := driver.New(n.cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := d.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Run("too long", func(t *testing.T) {
		n := newNode(t)
		n.cfg.Endpoint = "unix://" + filepath.Join(n.dir, strings.Repeat("x", 100))
		if err := run(t, n); err == nil || !strings.Contains(err.Error(), "shorter") {
			t.Errorf("got %v, want an error that says so", err)
		}
	})
}

// TestServe serves on a listener of the caller's.
func TestServe(t *testing.T) {
	n := newNode(t)
	d, err := driver.New(n.cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(n.dir, "csi.sock"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx, l) }()
	n.waitReady()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestRegistration plays kubelet.
func TestRegistration(t *testing.T) {
	n := newNode(t)
	n.cfg.KubeletRootDir = filepath.Join(n.dir, "kubelet")
	log := n.capture()
	n.serveHTTP()
	n.start()
	path := filepath.Join(n.dir, "kubelet/plugins_registry/csi.puzzlefs.io-reg.sock")
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	kubelet := registerapi.NewRegistrationClient(conn)
	info, err := kubelet.GetInfo(t.Context(), &registerapi.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	if info.GetType() != "CSIPlugin" || info.GetName() != "csi.puzzlefs.io" || info.GetEndpoint() != filepath.Join(n.dir, "csi.sock") ||
		len(info.GetSupportedVersions()) != 1 || info.GetSupportedVersions()[0] != "1.0.0" {
		t.Errorf("info is %v", info)
	}
	n.metricsAre(map[string]string{"puzzlefs_kubelet_registered": "0"})
	for _, s := range []*registerapi.RegistrationStatus{{PluginRegistered: true}, {PluginRegistered: false, Error: "no such node"}, {PluginRegistered: true}} {
		if _, err := kubelet.NotifyRegistrationStatus(t.Context(), s); err != nil {
			t.Error(err)
		}
		want := map[bool]string{true: "1", false: "0"}[s.GetPluginRegistered()]
		n.metricsAre(map[string]string{"puzzlefs_kubelet_registered": want})
	}
	n.stop()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the registration socket is left (%v)", err)
	}
	for _, want := range []string{"no such node", "kubelet registered the driver"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q: %s", want, log)
		}
	}
}

// TestExternalRegistration leaves the registration to the sidecar, which makes a socket of the
// same name.
func TestExternalRegistration(t *testing.T) {
	n := newNode(t)
	n.cfg.KubeletRootDir = filepath.Join(n.dir, "kubelet")
	n.cfg.ExternalRegistration = true
	path := filepath.Join(n.dir, "kubelet/plugins_registry/csi.puzzlefs.io-reg.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n.start()
	n.stop()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the sidecar's socket is gone: %v", err)
	}
}

// TestPluginDirectory: what a driver made below kubelet's directory goes with it, unless somebody uses it.
func TestPluginDirectory(t *testing.T) {
	for name, used := range map[string]bool{"alone": false, "with another's file": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.cfg.KubeletRootDir = filepath.Join(n.dir, "kubelet")
			plugins := filepath.Join(n.cfg.KubeletRootDir, "plugins")
			dir := filepath.Join(plugins, "csi.puzzlefs.io")
			n.cfg.Endpoint = "unix://" + dir + "/csi.sock"
			n.launch()
			eventually(t, "the socket is there", func() bool {
				_, err := os.Stat(filepath.Join(dir, "csi.sock"))
				return err == nil
			})
			if used {
				if err := os.WriteFile(filepath.Join(dir, "other"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			n.stop()
			if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) == used {
				t.Errorf("the directory of the socket after the driver: %v, in use %v", err, used)
			}
			if _, err := os.Stat(plugins); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFailedCallIsLoggedOnce, with what it takes to find it, and panics end in one, too.
func TestFailedCallIsLoggedOnce(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	log := n.capture()
	n.cfg.Fault = func(step string) error {
		if strings.HasPrefix(step, "publish:") { // in the call, not in the pull beside it
			panic("boom")
		}
		return nil
	}
	n.start()
	req := n.request("a", ref, im.digest.String())
	if _, err := n.NodePublishVolume(t.Context(), req); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "boom") {
		t.Errorf("got %v, want Unavailable: nothing was undone", err)
	}
	n.refused(n.request("b", "!", im.digest.String()), codes.InvalidArgument)
	n.stop()
	if got := strings.Count(log.String(), "call failed"); got != 2 {
		t.Errorf("%d log lines, want 2: %s", got, log)
	}
	for _, want := range []string{"volume=csi-a", "target=" + req.TargetPath, "code=Unavailable", "code=InvalidArgument", "request=", "method=/csi.v1.Node/NodePublishVolume"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q: %s", want, log)
		}
	}
}

// TestStopWhilePulling: stopping ends a stalled pull and the call that waits for it, and
// leaves no goroutine.
func TestStopWhilePulling(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	release := make(chan struct{})
	defer close(release)
	reg.set(func(r *testRegistry) {
		r.stalled = release
		r.hold = map[format.Digest]bool{im.chunks[0]: true}
	})
	n.start()
	req := n.request("a", ref, im.digest.String())
	result := make(chan error, 1)
	go func() {
		_, err := n.NodePublishVolume(t.Context(), req)
		result <- err
	}()
	for !strings.Contains(strings.Join(reg.requests(), "\n"), im.chunks[0].Hex()) {
		time.Sleep(time.Millisecond)
	}
	n.stop()
	if err := <-result; status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want Unavailable", err)
	}
	for range 1000 {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		if n := strings.Count(string(stacks), "pkg/driver.(*"); n == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("goroutines of the driver are left")
}
