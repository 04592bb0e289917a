package apiserver

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// process is a program that runs until it is killed, and writes to a log.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
}

// run starts a program. The kernel kills it when the thread that started it ends, which is kept
// for as long as the program runs: so that nothing is left of a test that was killed itself.
func run(program, log string, args ...string) (*process, error) {
	out, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(program, args...), log: log, done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Dir = filepath.Dir(log)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		defer close(p.done)
		defer out.Close()
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // killed, or the log says why
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(program), err)
	}
	return p, nil
}

// kill ends the program and waits for it. It may be called again, and after the program's end.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // fails where it has ended
	<-p.done
}

// logEnd returns the last lines of the log.
func (p *process) logEnd() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error() + "\n"
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	lines = lines[max(0, len(lines)-logLines):]
	return fmt.Sprintf("--- the end of %s\n%s\n", filepath.Base(p.log), strings.Join(lines, "\n"))
}
