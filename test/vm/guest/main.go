// Command guest is the first process of the virtual machine of test/vm: it mounts what programs expect
// and the disk with fs-verity, runs the program of the [job.Job], hands its exit code to the
// host and turns the machine off. It is static, and the only program that the machine needs.
package main

import (
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/vm/internal/job"
)

// moduleIsCompressed is MODULE_INIT_COMPRESSED_FILE (linux/module.h): the kernel unpacks it.
const moduleIsCompressed = 4

// openFiles is the limit of open files.
const openFiles = 1 << 20

// deviceTimeout is how long the kernel may take to find a device.
const deviceTimeout = 30 * time.Second

func main() {
	if err := work(); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err) // on the console, which the host shows
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {} // the first process must not end
}

// work does the job and tells the host how it ended.
func work() error {
	if err := mountAll(); err != nil {
		return err
	}
	l, err := connect()
	if err != nil {
		return err
	}
	code, err := run(l)
	if err != nil {
		code = job.Broken
	}
	return errors.Join(err, l.end(code))
}

// link is the connection to the host.
type link struct {
	port *os.File
	enc  *gob.Encoder
}

// connect opens the port to the host.
func connect() (*link, error) {
	port, err := openPort(job.Port)
	if err != nil {
		return nil, err
	}
	return &link{port, gob.NewEncoder(port)}, nil
}

// Write sends output of the program.
func (l *link) Write(p []byte) (int, error) {
	if err := l.enc.Encode(job.Message{Output: p}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// end sends the exit code and waits until the host has got all there was before.
func (l *link) end(code int) error {
	if err := l.enc.Encode(job.Message{Ended: true, Code: code}); err != nil {
		return fmt.Errorf("send exit code: %w", err)
	}
	if _, err := l.port.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("wait for the host: %w", err)
	}
	return l.port.Close()
}

// run does the job and returns the program's exit code.
func run(l *link) (int, error) {
	var j job.Job
	b, err := os.ReadFile(job.Path)
	if err == nil {
		err = json.Unmarshal(b, &j)
	}
	if err != nil {
		return 0, err
	}
	for _, m := range j.Modules {
		if err := loadModule(m); err != nil {
			return 0, err
		}
	}
	if err := mountDisk(j.Disk); err != nil {
		return 0, err
	}
	if err := os.MkdirAll("/tmp", 0o777); err != nil {
		return 0, err
	}
	// What systems give their users; the first process has the kernel's 4096.
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: openFiles, Max: openFiles}); err != nil {
		return 0, fmt.Errorf("raise limit of open files: %w", err)
	}
	return runProgram(j, l)
}

// mountAll mounts what a program expects of a Linux system.
func mountAll() error {
	for _, m := range []struct{ kind, dir, options string }{
		{"devtmpfs", "/dev", ""},
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"tmpfs", job.Plain, ""}, // not /tmp: the tests may lie there
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = moduleIsCompressed
	}
	if err := unix.FinitModule(int(f.Fd()), "", flags); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", path, err)
	}
	return nil
}

func mountDisk(disk string) error {
	if err := waitFor("disk "+disk, func() bool { _, err := os.Stat(disk); return err == nil }); err != nil {
		return err
	}
	if err := os.MkdirAll(job.Mount, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(disk, job.Mount, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", disk, job.Mount, err)
	}
	return os.MkdirAll(filepath.Join(job.Mount, "tmp"), 0o777)
}

// waitFor waits for something that the kernel makes.
func waitFor(what string, there func() bool) error {
	for deadline := time.Now().Add(deviceTimeout); !there(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%s does not appear", what)
		}
	}
	return nil
}

// openPort opens a virtio port by its name, which udev would make a link of.
func openPort(name string) (*os.File, error) {
	device := ""
	err := waitFor("port "+name, func() bool {
		ports, _ := filepath.Glob("/sys/class/virtio-ports/*/name") // the pattern is right
		for _, port := range ports {
			if b, err := os.ReadFile(port); err == nil && strings.TrimSpace(string(b)) == name {
				device = "/dev/" + filepath.Base(filepath.Dir(port))
			}
		}
		return device != ""
	})
	if err != nil {
		return nil, err
	}
	return os.OpenFile(device, os.O_RDWR, 0)
}

// runProgram runs the program to its end and returns its exit code. What the program leaves
// behind is not waited for.
func runProgram(j job.Job, out io.Writer) (int, error) {
	if err := os.MkdirAll(j.Dir, 0o755); err != nil {
		return 0, err
	}
	cmd := exec.Command(j.Program[0], j.Program[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = j.Dir, out, out
	cmd.WaitDelay = time.Second
	cmd.Env = []string{
		"PATH=/bin", "HOME=/root", "TMPDIR=" + filepath.Join(job.Mount, "tmp"),
		job.EnvDisk + "=" + j.Disk, job.EnvPlain + "=" + job.Plain, job.EnvRequire + "=1",
	}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return 0, nil
	case !errors.As(err, &exit):
		return 0, err
	case exit.Exited():
		return exit.ExitCode(), nil
	}
	_, err = fmt.Fprintf(out, "guest: %v\n", exit) // a signal
	return 1, err
}
