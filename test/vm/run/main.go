// Command run runs a static program, usually the tests of a package, as root in a virtual machine
// whose kernel and disk have fs-verity, and exits with the program's exit code. hack/test-vm.sh
// calls it through go test:
//
//	go test -exec "run -machine DIR -guest PROGRAM [-add FILE[:PATH]]..." ./pkg/verity
//
// The machine is made for each program and thrown away: a kernel, a file system in memory that
// holds [guest], the program, the testdata directory beside it and what -add names, and
// a fresh disk. DIR is what hack/vm.sh prints.
//
// A machine that does not end is ended after -timeout, with exit code 124 and its console shown; one that
// ends without a result gives 125. A test that is skipped in the machine fails: it was started so that
// nothing need be skipped.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/vm/internal/job"
)

// options is the command line.
type options struct {
	machine string // directory with the kernel
	guest   string
	add     []string
	timeout time.Duration
	memory  int // MiB
	disk    int // MiB
	console bool
	program []string
}

func main() {
	// The kernel ends the emulator with the thread that started it.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	code, err := mainError(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
	}
	os.Exit(code)
}

func mainError(ctx context.Context) (int, error) {
	var o options
	flag.StringVar(&o.machine, "machine", "", "`directory` that hack/vm.sh printed")
	flag.StringVar(&o.guest, "guest", "", "static `program` that is the first process of the machine")
	flag.Func("add", "`FILE[:PATH]` of a file or directory to put into the machine", func(s string) error {
		o.add = append(o.add, s)
		return nil
	})
	flag.DurationVar(&o.timeout, "timeout", 10*time.Minute, "how long the machine may run")
	flag.IntVar(&o.memory, "memory", 1024, "memory of the machine in MiB")
	flag.IntVar(&o.disk, "disk", 256, "size of the disk in MiB")
	flag.BoolVar(&o.console, "console", false, "show the kernel's messages")
	flag.Parse()
	o.program = flag.Args()
	if o.machine == "" || o.guest == "" || len(o.program) == 0 {
		flag.Usage()
		return job.Broken, errors.New("-machine, -guest and a program are needed")
	}
	if isTest(o.program) {
		// Only then does it say what it skips.
		o.program = append(o.program, "-test.v=true")
	}

	dir, err := os.MkdirTemp("", "puzzlefs-vm-")
	if err != nil {
		return job.Broken, err
	}
	defer os.RemoveAll(dir)
	m := &machine{options: o, dir: dir, out: &skipWatcher{w: os.Stdout}}
	code, err := m.run(ctx)
	if err != nil || o.console {
		m.showConsole(os.Stderr)
	}
	if err == nil && code == 0 && len(m.out.skipped) > 0 {
		return 1, fmt.Errorf("skipped in the machine, where nothing may be: %s", strings.Join(m.out.skipped, ", "))
	}
	return code, err
}

// isTest says whether a program is a test binary that go test runs.
func isTest(program []string) bool {
	for _, arg := range program[1:] {
		if strings.HasPrefix(arg, "-test.") {
			return true
		}
	}
	return false
}
