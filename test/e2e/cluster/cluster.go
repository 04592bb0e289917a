// Package cluster runs a whole Kubernetes for tests on one machine that has neither a container
// engine nor a virtual machine: etcd, API server, controller manager, scheduler and DNS, and nodes
// with containerd, kubelet and kube-proxy. All of it is the real thing, built from its modules.
//
// What separates it from the machine are namespaces and a cgroup, in two levels:
//
//	this machine           the caller of Enter, which waits
//	└─ the lab             the same program again: control plane, DNS, the test itself   10.77.0.1
//	   ├─ node-1           containerd, kubelet, kube-proxy, pods                         10.77.0.11
//	   └─ node-2           …                                                             10.77.0.12
//
// The lab has network, process, mount, IPC and host name namespaces of its own, and every node has its
// own again, below. The test runs in the lab, so that it reaches the API server, pods and DNS, and
// the first process of the lab is the test: when it ends, however it does, the kernel ends everything in
// the lab, and with the namespaces go networks and mounts. What is left then are cgroups and one
// directory, which the caller of Enter removes.
//
// A node's root is a directory of its own, with this machine's programs and libraries bound into it
// read-only; /run is in memory. So a node that is rebooted keeps what a machine would keep.
//
// It takes root, and a directory that is not on overlayfs, because containerd's state cannot be there.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/process"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// startTimeout is how long all of it may take until it is ready: 15 s on an idle machine.
const startTimeout = 5 * time.Minute

// Config says what a cluster is made of.
type Config struct {
	// Kube is the directory that hack/kube.sh printed, Node that of hack/node.sh.
	Kube, Node string
	// Images are archives of container images that every node has from the start. One of them holds
	// [PauseImage].
	Images []string
	// Nodes is the number of nodes, 1 to 9; 0 means 1.
	Nodes int
}

// PauseImage is what the sandboxes of pods are made of.
const PauseImage = "e2e.csi-puzzlefs.io/pause:1"

// Address is that of the lab, in which the test and the control plane run: pods and nodes reach
// servers of the test there.
var Address = netip.MustParseAddr("10.77.0.1")

// Cluster is a running cluster. Its methods may be called from several goroutines, but for Stop.
type Cluster struct {
	cfg   Config
	dir   string
	files *pki
	parts []*process.Process // etcd first
	nodes []*Node
}

// Start starts a cluster in the lab, where [Enter] has returned, and waits until its nodes are
// ready and have the images. There is one cluster in a lab. It ends with Stop, or with the process.
func Start(ctx context.Context, cfg Config) (_ *Cluster, err error) {
	dir := os.Getenv(dirEnv)
	if dir == "" {
		return nil, errors.New("start cluster: call cluster.Enter first: it runs the program in namespaces of its own")
	}
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("start cluster: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	c := &Cluster{cfg: cfg, dir: dir}
	defer func() {
		if err != nil {
			err = fmt.Errorf("start cluster: %w\n%s", err, c.Logs())
			c.Stop()
		}
	}()
	if err := os.MkdirAll(c.LogDir(), 0o755); err != nil {
		return nil, err
	}
	if c.files, err = writeSecrets(filepath.Join(dir, "etc"), cfg.Nodes); err != nil {
		return nil, err
	}
	if err := c.startNetwork(); err != nil {
		return nil, err
	}
	// The nodes come up beside the control plane, and are told by its absence to try again.
	for i := range cfg.Nodes {
		n, err := c.startNode(i + 1)
		if err != nil {
			return nil, err
		}
		c.nodes = append(c.nodes, n)
	}
	client, err := c.client()
	if err != nil {
		return nil, err
	}
	if err := c.startControlPlane(ctx, client); err != nil {
		return nil, err
	}
	if err := c.loadImages(ctx); err != nil {
		return nil, err
	}
	return c, c.waitReady(ctx, client)
}

func (cfg *Config) validate() error {
	if cfg.Nodes == 0 {
		cfg.Nodes = 1
	}
	if cfg.Nodes < 1 || cfg.Nodes > 9 {
		return fmt.Errorf("%d nodes: want 1 to 9", cfg.Nodes)
	}
	for _, p := range []string{filepath.Join(cfg.Kube, "kubelet"), filepath.Join(cfg.Node, "containerd")} {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("%q: want an absolute directory", filepath.Dir(p))
		}
		if _, err := os.Stat(p); err != nil {
			return fmt.Errorf("find the programs: %w", err)
		}
	}
	for _, image := range cfg.Images {
		if _, err := os.Stat(image); err != nil {
			return fmt.Errorf("find the images: %w", err)
		}
	}
	return nil
}

// Kubeconfig is the path of a file for clients that may do everything. It is valid in the lab.
func (c *Cluster) Kubeconfig() string { return c.files.kubeconfig("admin") }

// client returns a client that may do everything.
func (c *Cluster) client() (kubernetes.Interface, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return nil, fmt.Errorf("read the cluster's kubeconfig: %w", err)
	}
	cfg.QPS = -1
	return kubernetes.NewForConfig(cfg)
}

// Nodes are the cluster's nodes, node-1 first.
func (c *Cluster) Nodes() []*Node { return slices.Clone(c.nodes) }

// Path is a value for PATH with which kubectl, helm and ctr are found.
func (c *Cluster) Path() string {
	return c.cfg.Kube + ":" + c.cfg.Node + ":" + os.Getenv("PATH")
}

// Logs returns the ends of the logs of all parts and nodes, for a test that has failed.
func (c *Cluster) Logs() string {
	logs, err := filepath.Glob(filepath.Join(c.LogDir(), "*.log"))
	if err != nil {
		return err.Error()
	}
	var all strings.Builder
	for _, log := range logs {
		all.WriteString(process.LogEnd(log))
	}
	return all.String()
}

// LogDir is the directory with the whole logs: one file for each part of the control plane and each node.
func (c *Cluster) LogDir() string { return filepath.Join(c.dir, "log") }

func (c *Cluster) log(name string) string   { return filepath.Join(c.LogDir(), name+".log") }
func (c *Cluster) state(name string) string { return filepath.Join(c.dir, name) }

// Stop ends everything at once; there is nothing worth saving. Files and cgroups are removed when the
// process ends.
func (c *Cluster) Stop() {
	for _, n := range c.nodes {
		n.kill()
	}
	for _, p := range slices.Backward(c.parts) {
		p.Kill()
	}
	c.nodes, c.parts = nil, nil
}

// loadImages gives the images to all nodes.
func (c *Cluster) loadImages(ctx context.Context) error {
	return c.eachNode(func(n *Node) error { return n.load(ctx, c.cfg.Images) })
}

// eachNode calls f for all nodes at the same time, and waits.
func (c *Cluster) eachNode(f func(*Node) error) error {
	errs := make([]error, len(c.nodes))
	var wg sync.WaitGroup
	for i, n := range c.nodes {
		wg.Go(func() { errs[i] = f(n) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// waitReady waits until pods can be made: the nodes are ready, and so is the account that pods have.
func (c *Cluster) waitReady(ctx context.Context, client kubernetes.Interface) error {
	if err := c.eachNode(func(n *Node) error { return n.waitReady(ctx, client) }); err != nil {
		return err
	}
	return c.waitAccount(ctx, client)
}
