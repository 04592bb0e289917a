package main

import (
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/vm/internal/job"
)

// programPath is where the program is in the machine, and disk the first virtio disk.
const (
	programPath = "/bin/program"
	disk        = "/dev/vda"
)

// consoleShown is how much of the console is shown, in bytes.
const consoleShown = 8 << 10

// machine is one virtual machine, from its making to its end.
type machine struct {
	options
	dir      string // for the files below
	out      *skipWatcher
	emulator strings.Builder // what the emulator says
}

func (m *machine) file(name string) string { return filepath.Join(m.dir, name) }

// run makes the machine, runs the program in it and returns its exit code.
func (m *machine) run(ctx context.Context) (int, error) {
	if err := m.makeInitramfs(); err != nil {
		return job.Broken, fmt.Errorf("make initramfs: %w", err)
	}
	if err := m.makeDisk(ctx); err != nil {
		return job.Broken, fmt.Errorf("make disk: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, m.timeout)
	defer cancel()
	result, err := m.boot(limited)
	switch {
	case ctx.Err() != nil:
		return job.TimedOut, errors.New("interrupted")
	case limited.Err() != nil:
		return job.TimedOut, fmt.Errorf("the machine did not end within %v", m.timeout)
	case err != nil:
		return job.Broken, fmt.Errorf("run emulator: %w", err)
	}
	switch {
	case !result.Ended:
		return job.Broken, errors.New("the machine ended without a result")
	case result.Code == job.Broken:
		return job.Broken, errors.New("the machine did not get as far as the program")
	}
	return result.Code, nil
}

// makeInitramfs writes the first file system of the machine.
func (m *machine) makeInitramfs() (err error) {
	f, err := os.Create(m.file("initramfs"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	a := newInitramfs(f)
	dir, err := os.Getwd() // go test runs tests in the directory of their package
	if err != nil {
		return err
	}
	j := job.Job{Program: append([]string{programPath}, m.program[1:]...), Dir: dir, Disk: disk}
	modules, err := filepath.Glob(filepath.Join(m.machine, "modules", "*"))
	if err != nil {
		return err
	}
	for _, from := range modules {
		to := path.Join("/modules", filepath.Base(from))
		j.Modules = append(j.Modules, to)
		if err := a.copy(from, to); err != nil {
			return err
		}
	}
	add := append([]string{m.guest + ":/init", m.program[0] + ":" + programPath}, m.add...)
	if testdata := filepath.Join(dir, "testdata"); exists(testdata) {
		add = append(add, testdata)
	}
	for _, s := range add {
		from, to, renamed := strings.Cut(s, ":")
		if !renamed {
			if to, err = filepath.Abs(from); err != nil {
				return err
			}
		}
		if err := a.copy(from, to); err != nil {
			return err
		}
	}
	b, err := json.Marshal(j)
	if err != nil {
		return err
	}
	if err := a.file(job.Path, 0o644, int64(len(b)), strings.NewReader(string(b))); err != nil {
		return err
	}
	return a.close()
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// makeDisk makes a disk with an ext4 that has fs-verity.
func (m *machine) makeDisk(ctx context.Context) error {
	f, err := os.Create(m.file("disk"))
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(int64(m.disk)<<20), f.Close()); err != nil {
		return err
	}
	mkfs, err := m.tool("mkfs.ext4", "/sbin", "/usr/sbin")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, mkfs, "-q", "-F", "-O", "verity", "-b", "4096", m.file("disk"))
	cmd.Env = m.toolEnv()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return nil
}

// tool finds a program that this machine has, or that hack/vm.sh fetched.
func (m *machine) tool(name string, dirs ...string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range dirs {
		for _, root := range []string{"", m.tools()} {
			if path := filepath.Join(root, dir, name); exists(path) {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("there is no %s here or in %s: remove that directory, and run hack/vm.sh again", name, m.machine)
}

func (m *machine) tools() string { return filepath.Join(m.machine, "tools") }

// toolEnv lets the programs that hack/vm.sh fetched find their libraries.
func (m *machine) toolEnv() []string {
	const arch = "x86_64-linux-gnu"
	libs := filepath.Join(m.tools(), "usr/lib", arch) + ":" + filepath.Join(m.tools(), "lib", arch)
	if old := os.Getenv("LD_LIBRARY_PATH"); old != "" {
		libs += ":" + old
	}
	return append(os.Environ(), "LD_LIBRARY_PATH="+libs, "QEMU_MODULE_DIR="+filepath.Join(m.tools(), "usr/lib", arch, "qemu"))
}

// accelerator is kvm where the processor has it. A /dev/kvm alone proves nothing: within another
// virtual machine it may be there and run no kernel.
func accelerator() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	flags := strings.Fields(string(info))
	if err != nil || !slices.Contains(flags, "vmx") && !slices.Contains(flags, "svm") {
		return "tcg"
	}
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg"
	}
	_ = kvm.Close()
	return "kvm"
}

// boot runs the machine to its end and returns the last message that came from it.
func (m *machine) boot(ctx context.Context) (last job.Message, err error) {
	qemu, err := m.tool("qemu-system-x86_64", "/usr/bin")
	if err != nil {
		return last, err
	}
	l, err := net.Listen("unix", m.file("port"))
	if err != nil {
		return last, err
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
		"-machine", "q35", "-cpu", "max", "-accel", accelerator(), "-smp", "2", "-m", strconv.Itoa(m.memory),
		"-kernel", filepath.Join(m.machine, "vmlinuz"), "-initrd", m.file("initramfs"),
		"-append", "console=ttyS0 panic=-1 oops=panic random.trust_cpu=1 mitigations=off",
		"-serial", "file:" + m.file("console"),
		"-drive", "file=" + m.file("disk") + ",if=none,id=disk,format=raw,cache=unsafe", "-device", "virtio-blk-pci,drive=disk",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=port,path=" + m.file("port"), "-device", "virtserialport,chardev=port,name=" + job.Port,
	}
	if root := m.tools(); strings.HasPrefix(qemu, root) {
		args = append(args, "-L", filepath.Join(root, "usr/share/qemu"), "-L", filepath.Join(root, "usr/share/seabios"))
	}
	cmd := exec.CommandContext(ctx, qemu, args...)
	cmd.Env = m.toolEnv()
	cmd.Stdout, cmd.Stderr = &m.emulator, &m.emulator
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return last, errors.Join(err, l.Close())
	}
	var listening sync.WaitGroup
	listening.Go(func() { last = m.listen(l) })
	err = cmd.Wait()
	_ = l.Close() // for an emulator that never connected; the connection has ended with it
	listening.Wait()
	return last, err
}

// listen takes what the machine sends and returns the last message.
func (m *machine) listen(l net.Listener) (last job.Message) {
	conn, err := l.Accept()
	if err != nil {
		return last
	}
	defer conn.Close()
	for dec := gob.NewDecoder(conn); !last.Ended; {
		var next job.Message
		if err := dec.Decode(&next); err != nil {
			return last // the console says more
		}
		last = next
		_, _ = m.out.Write(last.Output) // nobody reads it: the exit code counts
	}
	_, _ = conn.Write([]byte{1}) // the machine waits for it no longer than its time limit
	return last
}

// showConsole shows the end of what the kernel said, and what the emulator said.
func (m *machine) showConsole(w io.Writer) {
	b, err := os.ReadFile(m.file("console"))
	if err != nil {
		b = []byte(err.Error())
	}
	if more := len(b) - consoleShown; more > 0 && !m.console {
		b = b[more:]
	}
	fmt.Fprintf(w, "---- console of the machine\n%s\n---- emulator\n%s----\n", b, m.emulator.String())
}
