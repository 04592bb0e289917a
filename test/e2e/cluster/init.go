package cluster

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nodeSpec says what a node is. It is all that its first process knows.
type nodeSpec struct {
	Name string
	// Index is the node's number, from 1; Nodes is how many there are.
	Index, Nodes int
	// Root is the directory that is the node's root.
	Root string
	// Kube and Programs are the directories of programs.
	Kube, Programs string
	// Secrets is the directory with the node's kubeconfigs.
	Secrets string
	// LogDir is the directory of the logs, open for writing before the root changes.
	LogDir string
}

// address is the node's in the cluster's network.
func (s *nodeSpec) address() string { return nodeAddress(s.Index) }

func nodeAddress(index int) string { return fmt.Sprintf("10.77.0.%d", 10+index) }

// podNetwork is where the pods of a node are.
func podNetwork(index int) string { return fmt.Sprintf("10.78.%d.0/24", index) }

// daemon is a program that runs as long as its node does.
type daemon struct {
	name string
	argv []string
	log  *os.File
}

// restartDelay is how long a daemon stays away when it has ended, as with systemd.
const restartDelay = time.Second

// networkFile is the file from which the first process of a node reads until its end, which says
// that the lab has given it its network device.
const networkFile = 3

// run is the life of a node's first process: it makes the node, starts the daemons, starts again
// those that end, and buries whose parents are dead. It ends when it is killed.
func (s *nodeSpec) run() error {
	if err := s.startNetwork(); err != nil {
		return err
	}
	daemons, err := s.daemons()
	if err != nil {
		return err
	}
	secrets, err := readFiles(s.Secrets)
	if err != nil {
		return err
	}
	if err := s.makeRoot(); err != nil {
		return err
	}
	if err := delegate(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := s.configure(secrets); err != nil {
		return err
	}
	if err := s.guardSysctls(); err != nil {
		return err
	}
	return supervise(daemons)
}

// startNetwork waits for the network device and sets it up.
func (s *nodeSpec) startNetwork() error {
	ready := os.NewFile(networkFile, "network")
	if _, err := ready.Read(make([]byte, 1)); err == nil {
		return errors.New("the network is not ready")
	}
	ready.Close()
	for name, address := range map[string]string{"lo": "", "eth0": s.address() + "/24"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find network device %s: %w", name, err)
		}
		if err := up(link, address); err != nil {
			return err
		}
	}
	// A default route, because kubelet looks for one; and the ways to pods of other nodes.
	routes := map[string]string{"0.0.0.0/0": Address.String()}
	for i := 1; i <= s.Nodes; i++ {
		if i != s.Index {
			routes[podNetwork(i)] = nodeAddress(i)
		}
	}
	for network, gateway := range routes {
		if err := addRoute(network, gateway); err != nil {
			return err
		}
	}
	for _, setting := range []string{
		"net/ipv4/ip_forward",
		// Answers that pods give each other through their bridge pass kube-proxy's rules, too.
		"net/bridge/bridge-nf-call-iptables",
	} {
		if err := os.WriteFile(filepath.Join("/proc/sys", setting), []byte("1"), 0o644); err != nil {
			return fmt.Errorf("set %s: %w", setting, err)
		}
	}
	return nil
}

// up gives a device an address, if there is one, and starts it.
func up(link netlink.Link, address string) error {
	name := link.Attrs().Name
	if address != "" {
		addr, err := netlink.ParseAddr(address)
		if err != nil {
			return err
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("give %s the address %s: %w", name, address, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("start network device %s: %w", name, err)
	}
	return nil
}

func addRoute(network, gateway string) error {
	_, dst, err := net.ParseCIDR(network)
	if err != nil {
		return err
	}
	if err := netlink.RouteReplace(&netlink.Route{Dst: dst, Gw: net.ParseIP(gateway)}); err != nil {
		return fmt.Errorf("add route to %s: %w", network, err)
	}
	return nil
}

// guardSysctls keeps kubelet from changing settings of the machine's kernel: it finds files there that
// say what it wants to hear.
//
// A namespace whose /proc has something mounted on it may not mount another /proc in a user namespace, so
// there is one more that has nothing on it, where nobody looks.
func (s *nodeSpec) guardSysctls() error {
	if err := os.MkdirAll("/run/proc", 0o755); err != nil {
		return err
	}
	if err := mountOne("proc", "/run/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		file := filepath.Join("/run/sysctl", strings.ReplaceAll(name, "/", "."))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := mountOne(file, filepath.Join("/proc/sys", name), "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

// supervise starts the daemons and starts them again when they end. It returns only an error.
func supervise(daemons []*daemon) error {
	running := map[int]*daemon{}
	for _, d := range daemons {
		pid, err := d.start()
		if err != nil {
			return err
		}
		running[pid] = d
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait for processes: %w", err)
		}
		d, ok := running[pid]
		if !ok {
			continue // somebody's orphan
		}
		delete(running, pid)
		how := fmt.Sprintf("status %d", status.ExitStatus())
		if status.Signaled() {
			how = status.Signal().String()
		}
		fmt.Fprintf(os.Stderr, "%s has ended (%s): starting it again\n", d.name, how)
		time.Sleep(restartDelay)
		if pid, err = d.start(); err != nil {
			return err
		}
		running[pid] = d
	}
}

// start starts the daemon once.
func (d *daemon) start() (int, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	pid, err := syscall.ForkExec(d.argv[0], d.argv, &syscall.ProcAttr{
		Dir:   "/",
		Env:   nodeEnvironment(),
		Files: []uintptr{null.Fd(), d.log.Fd(), d.log.Fd()},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", d.name, err)
	}
	return pid, nil
}

// nodeEnvironment is what programs in a node find.
func nodeEnvironment() []string {
	return []string{
		"PATH=" + strings.Join([]string{kubeDir, programsDir, "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}, ":"),
		"HOME=/root", "LANG=C.UTF-8", "TMPDIR=/tmp",
	}
}

// runInNode is this program where it was called to run another one in a node: it joins the node's cgroup, which nsenter
// does not do, and becomes nsenter. It is in the lab, from which the node's cgroup and its own are both seen.
func runInNode() error {
	if len(os.Args) < 2 {
		return errors.New("no program to run")
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return fmt.Errorf("find nsenter, which the package util-linux has: %w", err)
	}
	if err := insideCgroup(os.Getenv(nodeEnv)).joinOwn(); err != nil {
		return err
	}
	for _, variable := range nodeEnvironment() {
		name, value, _ := strings.Cut(variable, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	for _, name := range []string{stageEnv, nodeEnv} {
		if err := os.Unsetenv(name); err != nil {
			return err
		}
	}
	return fmt.Errorf("run nsenter: %w", syscall.Exec(nsenter, append([]string{nsenter}, os.Args[1:]...), os.Environ()))
}

// enterArgs are the arguments of nsenter for a program in the node whose first process is pid.
func enterArgs(pid int, argv []string) []string {
	return append([]string{
		"--target", strconv.Itoa(pid), "--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup", "--wdns=/", "--",
	}, argv...)
}

// readFiles reads the files of a directory.
func readFiles(dir string) (map[string][]byte, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for _, e := range entries {
		if files[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			return nil, err
		}
	}
	return files, nil
}
