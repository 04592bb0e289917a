package e2e_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/cluster"
)

// machine is what a node runs on, and what the API server cannot do to it.
type machine interface {
	// RestartKubelet ends kubelet and starts it again. It returns when that was done; kubelet may need
	// longer to be ready.
	RestartKubelet(ctx context.Context) error
	// PowerOff ends all processes and mounts of the node and empties /run, as a power cut does. Files
	// elsewhere stay.
	PowerOff(ctx context.Context) error
	// PowerOn starts the node again. It returns when that was done; the node may need longer to be ready.
	PowerOn(ctx context.Context) error
}

// machine returns the machine of a node. Where nothing controls it, the test is skipped, and says that
// what is to be tested, such as "reboot of a node", is unrun.
func (s *suite) machine(t *testing.T, node, what string) machine {
	t.Helper()
	switch s.settings.machines {
	case "own":
		for _, n := range s.cluster.Nodes() {
			if n.Name() == node {
				return n
			}
		}
		t.Fatalf("find the machine of node %s: the cluster has none of that name", node)
	case "kind":
		return kindMachine(node)
	}
	s.skip(t, "%s: nothing controls the machine of node %s; E2E_MACHINES=kind does where nodes are kind's containers, and a cluster of the suite's own does", what, node)
	return nil
}

var (
	_ machine = (*cluster.Node)(nil)
	_ machine = kindMachine("")
)

// kindMachine is a node of kind, which is a container of that name with systemd in it.
type kindMachine string

func (m kindMachine) RestartKubelet(ctx context.Context) error {
	return engine(ctx, "exec", string(m), "systemctl", "restart", "kubelet")
}

// PowerOff ends the container, whose /run is in memory.
func (m kindMachine) PowerOff(ctx context.Context) error {
	return engine(ctx, "stop", "-t", "0", string(m))
}

func (m kindMachine) PowerOn(ctx context.Context) error {
	return engine(ctx, "start", string(m))
}

// engineCommand is a command of the container engine that kind's nodes are in, found as hack/kind.sh finds it.
func engineCommand(ctx context.Context, args ...string) *exec.Cmd {
	program := os.Getenv("KIND_EXPERIMENTAL_PROVIDER")
	if program == "" {
		program = "docker"
		if exec.CommandContext(ctx, "docker", "info").Run() != nil {
			program = "podman"
		}
	}
	return exec.CommandContext(ctx, program, args...)
}

// engine runs the container engine on the machine of the test.
func engine(ctx context.Context, args ...string) error {
	cmd := engineCommand(ctx, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%q: %w: %s", cmd.Args, err, out)
	}
	return nil
}

// machineLogs returns the ends of the logs of what runs the nodes, as far as it can be had.
func (s *suite) machineLogs(ctx context.Context) string {
	if s.cluster != nil {
		return s.cluster.Logs()
	}
	if s.settings.machines != "kind" {
		return "the logs of kubelet and containerd are on the nodes; E2E_MACHINES=kind would show them here\n"
	}
	names, err := s.nodes(ctx)
	if err != nil {
		return err.Error() + "\n"
	}
	text := ""
	for _, name := range names {
		out, err := engineCommand(ctx, "exec", name, "journalctl", "--no-pager", "-n", "80", "-u", "kubelet").CombinedOutput()
		text += "---- kubelet on " + name + "\n" + string(out)
		if err != nil {
			text += err.Error() + "\n"
		}
	}
	return text
}
