// Package process runs programs that go on until they are killed, such as the parts of a cluster
// that a test needs, and keeps what they say.
package process

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// logLines is how much of the end of a log LogEnd returns.
const logLines = 15

// Process is a program that runs until it is killed, and writes to a log. Its methods may be called
// from several goroutines.
type Process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

// Run starts a program whose output goes to the file log, in the directory of that file. The kernel
// kills it when the thread that started it ends, which is kept for as long as the program runs: so
// that nothing is left of a test that was killed itself.
func Run(program, log string, args ...string) (*Process, error) {
	return Start(exec.Command(program, args...), log)
}

// Start is [Run] for a command that the caller has made, whose output and directory it sets.
func Start(cmd *exec.Cmd, log string) (*Process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	p := &Process{cmd: cmd, log: log, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = filepath.Dir(log)
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error)
	go func() {
		defer close(p.done)
		defer out.Close()
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // killed, or the log says why
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(cmd.Path), err)
	}
	return p, nil
}

// PID is the process's number.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Kill ends the program and waits for it. It may be called again, and after the program's end.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // fails where it has ended
	<-p.done
}

// LogEnd returns the last lines of the log, below a line with its name.
func (p *Process) LogEnd() string { return LogEnd(p.log) }

// LogEnd returns the last lines of a log, below a line with its name.
func LogEnd(log string) string {
	b, err := os.ReadFile(log)
	if err != nil {
		return err.Error() + "\n"
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	lines = lines[max(0, len(lines)-logLines):]
	return fmt.Sprintf("--- the end of %s\n%s\n", filepath.Base(log), strings.Join(lines, "\n"))
}
