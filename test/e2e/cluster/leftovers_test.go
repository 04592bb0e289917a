package cluster_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/cluster"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// labEnv, set, makes of this test's program one that starts a cluster.
const labEnv = "E2E_TEST_LAB"

func TestMain(m *testing.M) {
	if os.Getenv(labEnv) == "" && os.Getenv("E2E_CLUSTER_STAGE") == "" {
		os.Exit(m.Run())
	}
	cluster.Enter()
	if err := lab(context.Background()); err != nil {
		panic(err)
	}
}

// lab starts a cluster of two nodes, gives up a program on one, reboots that, says that it is ready, and stops it when its
// input ends.
func lab(ctx context.Context) error {
	c, err := cluster.Start(ctx, cluster.Config{Kube: os.Getenv("E2E_KUBE"), Node: os.Getenv("E2E_NODE"), Nodes: 2})
	if err != nil {
		return err
	}
	if err := giveUp(ctx, c.Nodes()[1]); err != nil {
		return err
	}
	if err := c.Nodes()[1].Reboot(ctx); err != nil {
		return err
	}
	if out, err := c.Nodes()[1].Command(ctx, "mount", "-t", "tmpfs", "leak", "/mnt").CombinedOutput(); err != nil {
		os.Stderr.Write(out)
		return err
	}
	os.Stdout.WriteString("ready\n")
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	c.Stop()
	return nil
}

// giveUp starts a program on a node, and ends its context. A node whose processes nobody waits for cannot end.
func giveUp(ctx context.Context, n *cluster.Node) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := n.Command(ctx, "sh", "-c", "echo started; exec sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	cancel()
	if waitErr := cmd.Wait(); waitErr == nil || err != nil {
		return fmt.Errorf("a program that was given up: said %q and ended: %w", line, errors.Join(err, waitErr))
	}
	return nil
}

// traces are what clusters have on the machine.
type traces struct {
	Mounts, Cgroups, Files, Processes []string
}

// look finds the traces of the clusters that have a directory in parent, by its name.
func look(t *testing.T, parent string, names ...string) traces {
	t.Helper()
	var found traces
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range table {
		if strings.HasPrefix(m.Point, parent) || m.Source == "leak" {
			found.Mounts = append(found.Mounts, m.Point)
		}
	}
	err = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it has gone meanwhile
		}
		if err == nil && d.IsDir() && slices.Contains(names, d.Name()) {
			found.Cgroups = append(found.Cgroups, path)
			return fs.SkipDir
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	found.Files = glob(t, filepath.Join(parent, "*[0-9]"))
	for _, file := range glob(t, "/proc/[0-9]*/environ") {
		// One that cannot be read has gone meanwhile.
		if env, err := os.ReadFile(file); err == nil && strings.Contains(string(env), parent) {
			found.Processes = append(found.Processes, file)
		}
	}
	return found
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestNothingIsLeft: nothing of a cluster is on the machine when it has stopped; nor, when the process that waits for it
// was killed, once the next one has.
func TestNothingIsLeft(t *testing.T) {
	if os.Getenv("E2E_KUBE") == "" || os.Getenv("E2E_NODE") == "" {
		t.Skip("E2E_KUBE and E2E_NODE do not say where the programs are: make e2e sets them")
	}
	parent := t.TempDir()

	cmd, stop := startLab(t, parent)
	running := look(t, parent, names(t, parent)...)
	if len(running.Files) != 1 || len(running.Cgroups) == 0 || len(running.Processes) == 0 {
		t.Fatalf("a cluster that runs has these traces: %+v", running)
	}
	killed := names(t, parent)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it says that it was killed
	stop()
	if got := look(t, parent).Mounts; len(got) > 0 {
		t.Errorf("after a kill these are mounted: %s", got)
	}

	cmd, stop = startLab(t, parent)
	all := append(killed, names(t, parent)...)
	stop()
	if err := cmd.Wait(); err != nil {
		t.Errorf("the program that started a cluster: %v", err)
	}
	if diff := cmp.Diff(traces{}, look(t, parent, all...), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("left on the machine (+):\n%s", diff)
	}
}

// names are those of the clusters' directories, and of their cgroups.
func names(t *testing.T, parent string) []string {
	t.Helper()
	var all []string
	for _, dir := range glob(t, filepath.Join(parent, "*[0-9]")) {
		all = append(all, filepath.Base(dir))
	}
	return all
}

// startLab starts a cluster and waits until it is ready. It stops when stop is called.
func startLab(t *testing.T, parent string) (cmd *exec.Cmd, stop func()) {
	t.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), labEnv+"=1", cluster.ParentDir+"="+parent)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n') // or nothing, when it has ended
		said <- line
	}()
	select {
	case line := <-said:
		if line != "ready\n" {
			t.Fatalf("the cluster did not start: %v", cmd.Wait())
		}
	case <-time.After(5 * time.Minute):
		_ = cmd.Process.Kill() // and the test fails
		t.Fatal("the cluster is not ready after five minutes")
	}
	return cmd, func() { in.Close() }
}
