package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What a process that runs this program again finds in its environment.
const (
	// stageEnv tells what it is to be: see the stages.
	stageEnv = "E2E_CLUSTER_STAGE"
	// dirEnv is the directory for everything that the cluster writes, and by its name also the lab's cgroup.
	dirEnv = "E2E_CLUSTER_DIR"
	// nodeEnv is a node's spec in JSON.
	nodeEnv = "E2E_CLUSTER_NODE"
)

// ParentDir is the environment variable that names the directory in which a cluster's directory is made,
// which is that for temporary files by default. It must not be on overlayfs.
const ParentDir = "E2E_DIR"

// The stages through which a process of the cluster goes. A cgroup namespace shows as its root the cgroup
// of whoever makes it, so that a process joins its cgroup in one stage and looks from inside in the next.
const (
	stageOutside  = "" // called by a person or by go test
	stageLabJoin  = "lab-join"
	stageLab      = "lab"
	stageNodeJoin = "node-join"
	stageNode     = "node"
	stageExec     = "exec" // a program that a test runs in a node
)

// Inside reports whether this process was started by a cluster's program as part of the cluster. Then Enter
// must be called before anything else, even by a program that its command line tells to use another
// cluster: the command line may not be its own.
func Inside() bool { return os.Getenv(stageEnv) != "" }

// Enter is the first call of a program that starts a cluster. It runs the program again, with the
// same arguments, in namespaces and a cgroup of their own, waits, removes what is left, and ends the
// process with the program's status. In that second process Enter returns, with the network that the cluster's
// control plane will be in.
//
// It takes root. An interrupt ends everything.
func Enter() {
	var err error
	switch stage := os.Getenv(stageEnv); stage {
	case stageOutside:
		var status int
		if status, err = runLab(); err == nil {
			os.Exit(status)
		}
	case stageLabJoin:
		err = joinAndContinue(outsideCgroup(filepath.Base(os.Getenv(dirEnv))), stageLab)
	case stageLab:
		if err = enterLab(); err == nil {
			return
		}
	case stageNodeJoin, stageNode:
		err = runNode(stage)
	case stageExec:
		err = runInNode()
	default:
		err = fmt.Errorf("%s is %q", stageEnv, stage)
	}
	fmt.Fprintf(os.Stderr, "cluster: %v\n", err)
	os.Exit(1)
}

// runLab runs this program again as the first process of the lab and returns its exit status.
func runLab() (status int, err error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("run as root: a cluster takes namespaces, mounts and cgroups")
	}
	if err := checkMachine(); err != nil {
		return 0, err
	}
	parent, err := parentDir()
	if err != nil {
		return 0, err
	}
	dir, err := makeDir(parent)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, removeLab(dir)) }()
	group := outsideCgroup(filepath.Base(dir))
	if err := group.make(); err != nil {
		return 0, err
	}
	if err := group.checkControllers(); err != nil {
		return 0, err
	}

	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), stageEnv+"="+stageLabJoin, dirEnv+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGHUP)
	// The thread that starts the lab must not end before it, or the kernel kills it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("make namespaces: %w", err)
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case s := <-signals:
			fmt.Fprintf(os.Stderr, "cluster: %v: ending\n", s)
			_ = cmd.Process.Kill() // fails where it has ended
		case <-ended:
		}
	}()
	if err := cmd.Wait(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			return 0, err
		}
	}
	if status = cmd.ProcessState.ExitCode(); status < 0 {
		return 0, fmt.Errorf("the test was ended: %s", cmd.ProcessState)
	}
	return status, nil
}

// checkMachine says what the machine lacks that would otherwise be noticed by a node, minutes later and in its words.
// Nothing is loaded into the machine's kernel: br_netfilter changes what goes over its other bridges.
func checkMachine() error {
	for _, need := range []struct{ path, module, what string }{
		{"/dev/fuse", "fuse", "FUSE, which the driver mounts with"},
		{"/proc/sys/net/bridge", "br_netfilter", "filters on bridges, without which pods of a node do not reach each other through a Service"},
	} {
		if _, err := os.Stat(need.path); err != nil {
			return fmt.Errorf("find %s: %w: run modprobe %s", need.what, err, need.module)
		}
	}
	return nil
}

// parentDir is the directory in which those of clusters are made, as the table of mounts would name it.
func parentDir() (string, error) {
	dir := os.Getenv(ParentDir)
	if dir == "" {
		dir = os.TempDir()
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return "", fmt.Errorf("find the directory for clusters, %s: %w", ParentDir, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return "", fmt.Errorf("look at %s: %w", dir, err)
	}
	if fs.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return "", fmt.Errorf("%s is on overlayfs, on which containerd cannot work: let %s name a directory on another file system", dir, ParentDir)
	}
	return dir, nil
}

// joinAndContinue puts this process into a cgroup, of which it makes a namespace, and goes on
// as another stage.
func joinAndContinue(groups cgroup, stage string) error {
	// A namespace belongs to a thread, and exec makes this one the whole process.
	runtime.LockOSThread()
	if err := groups.join(); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a cgroup namespace: %w", err)
	}
	if err := os.Setenv(stageEnv, stage); err != nil {
		return err
	}
	return fmt.Errorf("run again: %w", syscall.Exec("/proc/self/exe", os.Args, os.Environ()))
}

// enterLab makes of the new namespaces something in which to live. The programs and files are this
// machine's.
func enterLab() error {
	// What is started from here on, and is this program again, starts at the beginning.
	if err := os.Unsetenv(stageEnv); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := mountSystem("/"); err != nil {
		return err
	}
	if err := delegate(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("lab")); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	return replaceResolver()
}

// replaceResolver lets programs in the lab find names of the cluster, and no others: there is no way to anywhere else.
func replaceResolver() error {
	if err := coverFile("/etc/resolv.conf", "nameserver "+Address.String()+"\n"); err != nil {
		return err
	}
	// It may say to ask systemd-resolved, whose socket is seen here, and which knows only the machine's names.
	old, err := os.ReadFile("/etc/nsswitch.conf")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return coverFile("/etc/nsswitch.conf", resolveByDNS(string(old)))
}

// resolveByDNS changes the text of an nsswitch.conf so that host names are looked up in files and by DNS.
func resolveByDNS(text string) string {
	var all strings.Builder
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(strings.TrimSpace(line), "hosts:") {
			all.WriteString(strings.TrimSuffix(line, "\n") + "\n")
		}
	}
	return all.String() + "hosts: files dns\n"
}

// coverFile lets a file have another content in the lab.
func coverFile(name, content string) error {
	target, err := filepath.EvalSymlinks(name)
	if err != nil {
		return fmt.Errorf("find the file that the lab's is mounted on: %w: make an empty one", err)
	}
	cover := filepath.Join(os.Getenv(dirEnv), filepath.Base(name))
	if err := os.WriteFile(cover, []byte(content), 0o644); err != nil {
		return err
	}
	return mountOne(cover, target, "", unix.MS_BIND, "")
}

// runNode becomes the first process of a node.
func runNode(stage string) error {
	var spec nodeSpec
	if err := json.Unmarshal([]byte(os.Getenv(nodeEnv)), &spec); err != nil {
		return fmt.Errorf("%s: %w", nodeEnv, err)
	}
	if stage == stageNodeJoin {
		return joinAndContinue(insideCgroup(spec.Name), stageNode)
	}
	return spec.run()
}

// waitFor calls try until it succeeds, the context ends, or one of the channels says that it is in vain.
func waitFor(done <-chan struct{}, dead <-chan struct{}, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-dead:
			return fmt.Errorf("it has ended: %w", err)
		case <-done:
			return fmt.Errorf("not in time: %w", err)
		}
	}
}
