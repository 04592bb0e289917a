package main

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

// node is the driver's process, and the connection that kubelet would have to it.
type node struct {
	cmd    *exec.Cmd
	log    lockedBuffer
	conn   *grpc.ClientConn
	socket string
	name   string // the driver's
}

// startNode starts the driver below dir and waits until it answers.
func startNode(ctx context.Context, program, dir string) (*node, error) {
	n := &node{socket: filepath.Join(dir, "csi.sock")}
	n.cmd = exec.Command(program, "driver",
		"--endpoint", "unix://"+n.socket, "--node-id", "demo-node", "--state-dir", filepath.Join(dir, "state"))
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
		return nil, errors.Join(err, n.stop())
	}
	n.conn = conn
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	info, err := csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the driver does not answer: %w\n%s", err, n.log.String()), n.stop())
	}
	n.name = info.GetName()
	return n, nil
}

// publish asks for an inline volume as kubelet does.
func (n *node) publish(ctx context.Context, pod, target, image, digest string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := makeParent(target); err != nil {
		return err
	}
	_, err := csi.NewNodeClient(n.conn).NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId:   "csi-" + pod,
		TargetPath: target,
		VolumeCapability: &csi.VolumeCapability{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		Readonly: true,
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/ephemeral": "true",
			"csi.storage.k8s.io/pod.name":  pod,
			"image":                        image,
			"digest":                       digest,
		},
	})
	return err
}

func (n *node) unpublish(ctx context.Context, pod, target string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	_, err := csi.NewNodeClient(n.conn).NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "csi-" + pod, TargetPath: target})
	return err
}

// stop ends the driver as kubelet would, and waits for it.
func (n *node) stop() error {
	var err error
	if n.conn != nil {
		err = n.conn.Close()
	}
	if serr := n.cmd.Process.Signal(unix.SIGTERM); serr != nil {
		return errors.Join(err, serr, n.cmd.Wait())
	}
	if werr := n.cmd.Wait(); werr != nil {
		err = errors.Join(err, fmt.Errorf("the driver ends with %w\n%s", werr, n.log.String()))
	}
	return err
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
