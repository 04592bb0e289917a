// Package node runs the driver as a process of its own and asks it for volumes as kubelet does.
package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Times that kubelet gives a driver.
const (
	startTimeout     = 20 * time.Second
	publishTimeout   = 2 * time.Minute
	unpublishTimeout = time.Minute
)

// Node is a driver's process and a connection to it. Its methods may be called from several
// goroutines, but for Stop.
type Node struct {
	cmd    *exec.Cmd
	log    lockedBuffer
	conn   *grpc.ClientConn
	socket string
	name   string
}

// Volume is one inline volume of a pod.
type Volume struct {
	// Pod is the pod's name, which makes the volume's id, too.
	Pod string
	// Target is where the volume is to appear. Its parent is made if there is none.
	Target string
	// Image and Digest are the attributes of the same names.
	Image, Digest string
}

func (v Volume) id() string { return "csi-" + v.Pod }

// Start runs program as a driver with its socket and its state below dir, which exists, and
// waits until it answers. Flags are given to the driver beside those that it needs.
func Start(ctx context.Context, program, dir string, flags ...string) (*Node, error) {
	n := &Node{socket: filepath.Join(dir, "csi.sock")}
	n.cmd = exec.Command(program, append([]string{
		"driver",
		"--endpoint", "unix://" + n.socket, "--node-id", "test-node", "--state-dir", StateDir(dir),
	}, flags...)...)
	n.cmd.Stdout, n.cmd.Stderr = &n.log, &n.log
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	// A connection that is refused is tried again only after a second.
	for range 1000 {
		if _, err := os.Stat(n.socket); err == nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	conn, err := grpc.NewClient("unix://"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, errors.Join(err, n.Stop())
	}
	n.conn = conn
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	info, err := csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the driver does not answer: %w\n%s", err, n.Log()), n.Stop())
	}
	n.name = info.GetName()
	return n, nil
}

// StateDir is the state directory of a driver that was started with dir.
func StateDir(dir string) string { return filepath.Join(dir, "state") }

// Socket is the path of the driver's CSI socket.
func (n *Node) Socket() string { return n.socket }

// Name is what the driver calls itself.
func (n *Node) Name() string { return n.name }

// PID is the number of the driver's process.
func (n *Node) PID() int { return n.cmd.Process.Pid }

// Log is what the driver has logged so far.
func (n *Node) Log() string { return n.log.String() }

// Publish asks for a volume as kubelet does for a pod's inline volume.
func (n *Node) Publish(ctx context.Context, v Volume) error {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	if err := os.MkdirAll(filepath.Dir(v.Target), 0o755); err != nil {
		return err
	}
	_, err := csi.NewNodeClient(n.conn).NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId:   v.id(),
		TargetPath: v.Target,
		VolumeCapability: &csi.VolumeCapability{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		Readonly: true,
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/ephemeral": "true",
			"csi.storage.k8s.io/pod.name":  v.Pod,
			"image":                        v.Image,
			"digest":                       v.Digest,
		},
	})
	return err
}

// Stats asks for the size of a published volume, in bytes and inodes.
func (n *Node) Stats(ctx context.Context, v Volume) (bytes, inodes int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, unpublishTimeout)
	defer cancel()
	resp, err := csi.NewNodeClient(n.conn).NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: v.id(), VolumePath: v.Target})
	for _, u := range resp.GetUsage() {
		if u.GetUnit() == csi.VolumeUsage_BYTES {
			bytes = u.GetTotal()
		} else {
			inodes = u.GetTotal()
		}
	}
	return bytes, inodes, err
}

// Unpublish takes a volume away, even when ctx is done.
func (n *Node) Unpublish(ctx context.Context, v Volume) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unpublishTimeout)
	defer cancel()
	_, err := csi.NewNodeClient(n.conn).NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id(), TargetPath: v.Target})
	return err
}

// Stop ends the driver as kubelet would, and waits for it.
func (n *Node) Stop() error {
	var err error
	if n.conn != nil {
		err = n.conn.Close()
	}
	if serr := n.cmd.Process.Signal(unix.SIGTERM); serr != nil {
		return errors.Join(err, serr, n.cmd.Wait())
	}
	if werr := n.cmd.Wait(); werr != nil {
		err = errors.Join(err, fmt.Errorf("the driver ends with %w\n%s", werr, n.Log()))
	}
	return err
}

// Mounts returns the mount points below dir.
func Mounts(dir string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range bytes.Lines(b) {
		if fields := bytes.Fields(line); len(fields) > 4 && bytes.HasPrefix(fields[4], []byte(dir+"/")) {
			points = append(points, string(fields[4]))
		}
	}
	return points, nil
}

// lockedBuffer collects a process's output.
type lockedBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

// Write implements io.Writer.
func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String returns what was written.
func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
