package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/process"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"golang.org/x/sys/unix"
)

// Node is one node of a cluster. Its methods may be called from several goroutines.
type Node struct {
	spec nodeSpec
	log  string

	mu   sync.Mutex       // guards init
	init *process.Process // the node's first process
}

// startNode makes a node and returns as soon as its first process is there.
func (c *Cluster) startNode(index int) (*Node, error) {
	name := fmt.Sprintf("node-%d", index)
	n := &Node{
		log: c.log(name),
		spec: nodeSpec{
			Name: name, Index: index, Nodes: c.cfg.Nodes,
			Root: filepath.Join(c.dir, name),
			Kube: c.cfg.Kube, Programs: c.cfg.Node,
			Secrets: c.files.nodeDir(name), LogDir: c.LogDir(),
		},
	}
	if err := n.boot(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return n, nil
}

// boot starts the node's first process, and gives it a network.
func (n *Node) boot() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := insideCgroup(n.spec.Name).make(); err != nil {
		return err
	}
	spec, err := json.Marshal(n.spec)
	if err != nil {
		return err
	}
	ready, connected, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	defer connected.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), stageEnv+"="+stageNodeJoin, nodeEnv+"="+string(spec))
	cmd.ExtraFiles = []*os.File{ready} // networkFile
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	first, err := process.Start(cmd, n.log)
	if err != nil {
		return err
	}
	n.init = first
	if err := n.connect(n.init.PID()); err != nil {
		n.init.Kill()
		return err
	}
	return nil // and "connected" is closed, which the node waits for
}

// connect makes a cable between the lab's bridge and the node whose first process is pid.
func (n *Node) connect(pid int) error {
	bridge, err := netlink.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("find network device %s: %w", bridgeName, err)
	}
	// That of a node which has just ended may still be there.
	if old, err := netlink.LinkByName(n.spec.Name); err == nil {
		_ = netlink.LinkDel(old) // or it has gone meanwhile
	}
	cable := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: n.spec.Name, MasterIndex: bridge.Attrs().Index},
		PeerName:      "eth0",
		PeerNamespace: netlink.NsPid(pid),
	}
	if err := netlink.LinkAdd(cable); err != nil {
		return fmt.Errorf("make network device %s: %w", n.spec.Name, err)
	}
	if err := up(cable, ""); err != nil {
		return err
	}
	return addRoute(podNetwork(n.spec.Index), n.spec.address())
}

// Name is the node's, as Kubernetes knows it.
func (n *Node) Name() string { return n.spec.Name }

// Command returns a command that runs a program in the node's namespaces and cgroup, as root, with its
// own PATH. The program is killed when the context ends.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", enterArgs(n.pid(), append([]string{name}, args...))...)
	cmd.Env = append(os.Environ(), stageEnv+"="+stageExec, nodeEnv+"="+n.Name())
	// The command is nsenter, and the program its child. If nsenter were killed, the program would go on as a child of the
	// lab's first process, which waits for none but its own; and the node cannot end before somebody has waited.
	cmd.Cancel = func() error { return killChildren(cmd.Process) }
	return cmd
}

// killChildren kills the children of a process, or the process itself if it has none yet.
func killChildren(p *os.Process) error {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.Pid, p.Pid))
	if err != nil || len(children) == 0 {
		return p.Kill()
	}
	for field := range strings.FieldsSeq(string(children)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return err
		}
		_ = unix.Kill(pid, unix.SIGKILL) // fails where it has ended
	}
	return nil
}

// first is the node's first process, which another takes the place of when it is rebooted.
func (n *Node) first() *process.Process {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.init
}

func (n *Node) pid() int { return n.first().PID() }

// RestartKubelet ends kubelet as a crash would, and returns when another is there. It may not
// be ready yet.
func (n *Node) RestartKubelet(ctx context.Context) error {
	old, err := n.daemonPID("kubelet")
	if err != nil {
		return fmt.Errorf("restart kubelet on %s: %w", n.Name(), err)
	}
	if err := unix.Kill(old, unix.SIGKILL); err != nil {
		return fmt.Errorf("kill kubelet on %s: %w", n.Name(), err)
	}
	err = waitFor(ctx.Done(), n.first().Done(), func() error {
		pid, err := n.daemonPID("kubelet")
		if err == nil && pid == old {
			err = errors.New("kubelet is still there")
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("restart kubelet on %s: %w", n.Name(), err)
	}
	return nil
}

// daemonPID finds one of the programs that the node's first process has started.
func (n *Node) daemonPID(name string) (int, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", n.pid()))
	if err != nil {
		return 0, err
	}
	for _, task := range tasks {
		children, err := os.ReadFile(task)
		if err != nil {
			continue // a thread that has ended
		}
		for field := range strings.FieldsSeq(string(children)) {
			argv, err := os.ReadFile(filepath.Join("/proc", field, "cmdline"))
			if err != nil {
				continue
			}
			program, _, _ := strings.Cut(string(argv), "\x00")
			if filepath.Base(program) == name {
				return strconv.Atoi(field)
			}
		}
	}
	return 0, fmt.Errorf("%s does not run", name)
}

// PowerOff ends the node as a power cut would: its processes and mounts, and all that is in memory.
// What is on its disk stays.
func (n *Node) PowerOff(context.Context) error {
	n.kill()
	if err := insideCgroup(n.spec.Name).remove(); err != nil {
		return fmt.Errorf("power %s off: %w", n.Name(), err)
	}
	return nil
}

// PowerOn starts a node that is off. It returns when kubelet has been started; Kubernetes notices later.
func (n *Node) PowerOn(ctx context.Context) error {
	if err := n.boot(); err != nil {
		return fmt.Errorf("power %s on: %w", n.Name(), err)
	}
	err := waitFor(ctx.Done(), n.first().Done(), func() error {
		_, err := n.daemonPID("kubelet")
		return err
	})
	if err != nil {
		return fmt.Errorf("power %s on: %w", n.Name(), err)
	}
	return nil
}

// Reboot is PowerOff and PowerOn.
func (n *Node) Reboot(ctx context.Context) error {
	if err := n.PowerOff(ctx); err != nil {
		return err
	}
	return n.PowerOn(ctx)
}

// kill ends all processes of the node, and with them its namespaces.
func (n *Node) kill() { n.first().Kill() }

// load gives images to the node's containerd.
func (n *Node) load(ctx context.Context, archives []string) error {
	err := waitFor(ctx.Done(), n.first().Done(), func() error { return n.ctr(ctx, "", "version") })
	if err != nil {
		return fmt.Errorf("wait for containerd on %s: %w", n.Name(), err)
	}
	for _, archive := range archives {
		if err := n.ctr(ctx, archive, "images", "import", "--digests=false", "-"); err != nil {
			return fmt.Errorf("load %s on %s: %w", archive, n.Name(), err)
		}
	}
	return nil
}

// ctr runs containerd's client with a file as its input, if there is one.
func (n *Node) ctr(ctx context.Context, input string, args ...string) error {
	cmd := n.Command(ctx, "ctr", slices.Concat([]string{"--namespace", "k8s.io"}, args)...)
	if input != "" {
		f, err := os.Open(input)
		if err != nil {
			return err
		}
		defer f.Close()
		cmd.Stdin = f
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// waitReady waits until Kubernetes calls the node ready.
func (n *Node) waitReady(ctx context.Context, client kubernetes.Interface) error {
	err := waitFor(ctx.Done(), n.first().Done(), func() error {
		node, err := client.CoreV1().Nodes().Get(ctx, n.Name(), metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range node.Status.Conditions {
			if condition.Type != corev1.NodeReady {
				continue
			}
			if condition.Status == corev1.ConditionTrue {
				return nil
			}
			return errors.New(condition.Message)
		}
		return errors.New("kubelet has said nothing")
	})
	if err != nil {
		return fmt.Errorf("wait for %s: %w", n.Name(), err)
	}
	return nil
}
