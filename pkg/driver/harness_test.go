package driver_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

// childEnv holds, as JSON, what a driver process that a test started is to do.
const childEnv = "PUZZLEFS_TEST_DRIVER"

// childConfig is what a driver process gets.
type childConfig struct {
	Endpoint, StateDir, KubeletRootDir string
	// KillAt is the step at which the process kills itself.
	KillAt string
	// Collect makes it a process that collects, without a driver.
	Collect bool
}

func TestMain(m *testing.M) {
	if text := os.Getenv(childEnv); text != "" {
		if err := runChild(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runChild is the main function of a driver process.
func runChild(text string) error {
	var c childConfig
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return err
	}
	if c.Collect {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		return runCollector(ctx, c.StateDir)
	}
	cfg := testConfig(c.Endpoint, c.StateDir, c.KubeletRootDir)
	cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	cfg.Fault = func(step string) error {
		if step == c.KillAt {
			if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
				return err
			}
			select {}
		}
		return nil
	}
	d, err := driver.New(cfg)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return d.Run(ctx)
}

func testConfig(endpoint, state, kubelet string) driver.Config {
	return driver.Config{
		Endpoint:       endpoint,
		NodeID:         "node-1",
		StateDir:       state,
		KubeletRootDir: kubelet,
		Policy:         driver.Policy{RequireDigest: true},
		Registry: registry.Config{
			Retry: registry.Retry{Attempts: 2, MinWait: time.Millisecond, MaxWait: time.Millisecond},
		},
		Mounter: mounter{},
		Logger:  slog.New(slog.DiscardHandler),
		Version: "test",
	}
}

// testNode is a machine with kubelet's directories and at most one driver.
type testNode struct {
	t       *testing.T
	dir     string
	cfg     driver.Config
	log     *strings.Builder
	stop    func() // of the driver in this process
	process *exec.Cmd
	// conn and csi reach the driver, whichever it is.
	csi.NodeClient
	conn *grpc.ClientConn
}

// newNode makes a node without a driver. When the test ends nothing may be mounted there.
func newNode(t *testing.T) *testNode {
	t.Helper()
	// Short, because of the limit on the paths of sockets.
	dir, err := os.MkdirTemp("", "pzd")
	if err != nil {
		t.Fatal(err)
	}
	n := &testNode{t: t, dir: dir}
	for _, sub := range []string{"pods", "kubelet/plugins_registry"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.cfg = testConfig("unix://"+filepath.Join(dir, "csi.sock"), filepath.Join(dir, "state"), "")
	t.Cleanup(n.cleanup)
	n.conn, err = grpc.NewClient("unix://"+filepath.Join(dir, "csi.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second}))
	if err != nil {
		t.Fatal(err)
	}
	n.NodeClient = csi.NewNodeClient(n.conn)
	return n
}

func (n *testNode) cleanup() {
	if n.stop != nil {
		n.stop()
	}
	if n.process != nil {
		n.kill()
	}
	if n.conn != nil {
		if err := n.conn.Close(); err != nil {
			n.t.Error(err)
		}
	}
	left := n.mounts()
	for i := len(left) - 1; i >= 0; i-- {
		n.t.Errorf("left mounted: %s", left[i])
		if err := unix.Unmount(left[i], unix.MNT_DETACH); err != nil {
			n.t.Error(err)
		}
	}
	if err := os.RemoveAll(n.dir); err != nil {
		n.t.Error(err)
	}
}

// newPublished returns a node whose driver has published a volume of an image, see makeImage, for
// the pod a.
func newPublished(t *testing.T, blocks int) (*testRegistry, *testNode, *testImage, *csi.NodePublishVolumeRequest) {
	t.Helper()
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", blocks)
	ref := reg.push(t, im, "app", "1")
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	return reg, n, im, req
}

// start runs a driver in this process and waits until it is ready.
func (n *testNode) start() {
	n.t.Helper()
	n.launch()
	n.waitReady()
}

// startProcess runs a driver in a process of its own, which kills itself at a step.
func (n *testNode) startProcess(killAt string) {
	n.t.Helper()
	text, err := json.Marshal(childConfig{Endpoint: n.cfg.Endpoint, StateDir: n.cfg.StateDir, KubeletRootDir: n.cfg.KubeletRootDir, KillAt: killAt})
	if err != nil {
		n.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		n.t.Fatal(err)
	}
	n.process = exec.Command(self, "-test.run=^$")
	n.process.Env = append(os.Environ(), childEnv+"="+string(text))
	out, err := n.process.StderrPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.process.Start(); err != nil {
		n.t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			if testing.Verbose() {
				fmt.Println("driver:", s.Text())
			}
		}
	}()
}

// kill kills the driver process, and waits for its end.
func (n *testNode) kill() {
	n.t.Helper()
	if err := n.process.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		n.t.Error(err)
	}
	n.wait()
}

// wait waits for the end of the driver process.
func (n *testNode) wait() {
	if err := n.process.Wait(); err != nil && n.process.ProcessState == nil {
		n.t.Error(err)
	}
	n.process = nil
}

// waitReady waits until the driver answers.
func (n *testNode) waitReady() {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 30*time.Second)
	defer cancel()
	identity := csi.NewIdentityClient(n.conn)
	for {
		n.conn.ResetConnectBackoff()
		_, err := identity.Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return
		}
		// The connection may not have noticed yet that its driver was killed.
		if status.Code(err) != codes.Unavailable {
			n.t.Fatalf("the driver does not answer: %v", err)
		}
	}
}

// mounts returns what is mounted under the node's directory, in the order of mounting.
func (n *testNode) mounts() []string {
	n.t.Helper()
	return n.mountsUnder("")
}

func (n *testNode) mountsUnder(sub string) []string {
	n.t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		n.t.Fatal(err)
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if strings.HasPrefix(f[4], filepath.Join(n.dir, sub)+"/") {
			points = append(points, f[4])
		}
	}
	return points
}

// target returns the target path of a pod, whose parent exists.
func (n *testNode) target(pod string) string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "pods", pod)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		n.t.Fatal(err)
	}
	return filepath.Join(dir, "mount")
}

// request returns what kubelet sends for a pod.
func (n *testNode) request(pod, ref, digest string) *csi.NodePublishVolumeRequest {
	n.t.Helper()
	return &csi.NodePublishVolumeRequest{
		VolumeId:         "csi-" + pod,
		TargetPath:       n.target(pod),
		Readonly:         true,
		VolumeCapability: mountCapability(),
		VolumeContext: map[string]string{
			"image": ref, "digest": digest,
			"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.name": pod,
		},
	}
}

// publish publishes and wants success.
func (n *testNode) publish(req *csi.NodePublishVolumeRequest) {
	n.t.Helper()
	if _, err := n.NodePublishVolume(n.t.Context(), req); err != nil {
		n.t.Fatalf("publish %s: %v", req.GetVolumeId(), err)
	}
}

// refused publishes and wants an error of that code that says all of says, and nothing left
// at the target.
func (n *testNode) refused(req *csi.NodePublishVolumeRequest, code codes.Code, says ...string) {
	n.t.Helper()
	before := len(n.mounts())
	_, err := n.NodePublishVolume(n.t.Context(), req)
	if status.Code(err) != code {
		n.t.Errorf("publish %s: got %v, want %v", req.GetVolumeId(), err, code)
	}
	for _, s := range says {
		if err != nil && !strings.Contains(err.Error(), s) {
			n.t.Errorf("publish %s: the message does not say %q: %v", req.GetVolumeId(), s, err)
		}
	}
	if _, err := os.Lstat(req.GetTargetPath()); !errors.Is(err, os.ErrNotExist) {
		n.t.Errorf("publish %s failed and left the target (%v)", req.GetVolumeId(), err)
	}
	if after := n.mounts(); len(after) != before {
		n.t.Errorf("publish %s failed and left mounts: %v", req.GetVolumeId(), after)
	}
}

// unpublish unpublishes, wants success and no target.
func (n *testNode) unpublish(req *csi.NodePublishVolumeRequest) {
	n.t.Helper()
	_, err := n.NodeUnpublishVolume(n.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: req.GetVolumeId(), TargetPath: req.GetTargetPath()})
	if err != nil {
		n.t.Fatalf("unpublish %s: %v", req.GetVolumeId(), err)
	}
	if _, err := os.Lstat(req.GetTargetPath()); !errors.Is(err, os.ErrNotExist) {
		n.t.Errorf("unpublish %s left the target (%v)", req.GetVolumeId(), err)
	}
}

// nothingLeft checks that no volume is left in any form.
func (n *testNode) nothingLeft() {
	n.t.Helper()
	n.nothingMounted()
	n.nothingPinned()
}

// nothingMounted checks that no mount and no record is left.
func (n *testNode) nothingMounted() {
	n.t.Helper()
	if left := n.mounts(); len(left) > 0 {
		n.t.Errorf("left mounted: %v", left)
	}
	for _, sub := range []string{"state/volumes", "state/mounts"} {
		entries, err := os.ReadDir(filepath.Join(n.dir, sub))
		if err != nil {
			n.t.Error(err)
		}
		for _, e := range entries {
			n.t.Errorf("left in %s: %s", sub, e.Name())
		}
	}
}

// nothingPinned checks that no mount and no pull keeps an image, once the mounts have ended, and
// that no killed driver left the files of such.
func (n *testNode) nothingPinned() {
	n.t.Helper()
	waitFor(n.t, "all images to be unpinned", func() bool {
		entries, err := os.ReadDir(filepath.Join(n.cfg.StateDir, "pins"))
		if err != nil {
			n.t.Fatal(err)
		}
		return len(n.pinned()) == 0 && !slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() != "lock" })
	})
}

// shows checks that path shows the files of an image.
func (n *testNode) shows(path string, im *testImage) {
	n.t.Helper()
	for name, want := range im.files {
		got, err := os.ReadFile(filepath.Join(path, name))
		if err != nil || string(got) != want {
			n.t.Errorf("read %s: %d bytes, %v; want the image's %d bytes", filepath.Join(path, name), len(got), err, len(want))
		}
	}
}

// capture makes the node's driver log into the returned buffer, to be read when it stopped.
func (n *testNode) capture() *strings.Builder {
	n.log = new(strings.Builder)
	n.cfg.Logger = slog.New(slog.NewTextHandler(io.Writer(n.log), nil))
	return n.log
}
