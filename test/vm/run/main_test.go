package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/vm/internal/job"
)

// TestMain is the program in the machine, too, when it is asked to be.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "exit":
			fmt.Println("about to leave")
			os.Exit(7)
		case "killed":
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		case "hang":
			time.Sleep(time.Hour)
		case "reboot":
			_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
		case "look":
			os.Exit(look())
		}
	}
	os.Exit(m.Run())
}

// look says what is wrong with the machine.
func look() int {
	wrong := 0
	check := func(ok bool, what string) {
		if !ok {
			fmt.Println("wrong:", what)
			wrong = 1
		}
	}
	check(os.Getuid() == 0, "not root")
	check(os.TempDir() == job.Mount+"/tmp", "temporary files are in "+os.TempDir())
	check(os.Getenv(job.EnvRequire) == "1", "fs-verity is not demanded")
	b, err := os.ReadFile("/added/file")
	check(err == nil && string(b) == "content", fmt.Sprintf("added file: %q, %v", b, err))
	target, err := os.Readlink("/added/link")
	check(err == nil && target == "file", fmt.Sprintf("added link: %q, %v", target, err))
	var st unix.Statfs_t
	check(unix.Statfs(os.Getenv(job.EnvPlain), &st) == nil && st.Type == unix.TMPFS_MAGIC, "no tmpfs")
	check(unix.Statfs(os.TempDir(), &st) == nil && st.Type == unix.EXT4_SUPER_MAGIC, "no ext4")
	_, err = os.Stat(os.Getenv(job.EnvDisk))
	check(err == nil, fmt.Sprintf("disk: %v", err))
	return wrong
}

// start runs this program in a machine.
func start(t *testing.T, timeout time.Duration, add []string, args ...string) (code int, output string, m *machine, err error) {
	t.Helper()
	o := options{machine: os.Getenv("VM_MACHINE"), guest: os.Getenv("VM_GUEST"), add: add, timeout: timeout, memory: 512, disk: 64}
	if o.machine == "" || o.guest == "" {
		t.Fatal("there is no machine: run hack/test-vm.sh")
	}
	o.program = append([]string{os.Args[0]}, args...)
	var out bytes.Buffer
	m = &machine{options: o, dir: t.TempDir(), out: &skipWatcher{w: &out}}
	code, err = m.run(t.Context())
	return code, out.String(), m, err
}

func TestExitCode(t *testing.T) {
	code, output, _, err := start(t, time.Minute, nil, "exit")
	if err != nil || code != 7 || output != "about to leave\n" {
		t.Errorf("exit code %d, %v, output %q; want 7 and what it prints", code, err, output)
	}
	code, output, _, err = start(t, time.Minute, nil, "killed")
	if err != nil || code != 1 || !strings.Contains(output, "signal: killed") {
		t.Errorf("killed: exit code %d, %v, output %q", code, err, output)
	}
}

func TestMachine(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("file", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	code, output, _, err := start(t, time.Minute, []string{dir + ":/added"}, "look")
	if err != nil || code != 0 || output != "" {
		t.Errorf("exit code %d, %v\n%s", code, err, output)
	}
}

// TestTimeLimit: a machine that does not end is ended, and its console is there to be shown.
func TestTimeLimit(t *testing.T) {
	code, _, m, err := start(t, 20*time.Second, nil, "hang")
	if code != job.TimedOut || err == nil || !strings.Contains(err.Error(), "did not end within 20s") {
		t.Errorf("exit code %d, %v", code, err)
	}
	var shown bytes.Buffer
	m.showConsole(&shown)
	console, err := os.ReadFile(m.file("console"))
	if err != nil {
		t.Fatal(err)
	}
	if end := console[max(0, len(console)-consoleShown):]; len(end) == 0 || !strings.Contains(shown.String(), string(end)) {
		t.Errorf("of %d bytes from the console is shown: %q", len(console), shown.String())
	}
}

// TestNoResult: a machine that ends before the program does has no exit code.
func TestNoResult(t *testing.T) {
	code, _, _, err := start(t, time.Minute, nil, "reboot")
	if code != job.Broken || err == nil || !strings.Contains(err.Error(), "without a result") {
		t.Errorf("exit code %d, %v", code, err)
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m := &machine{options: options{program: []string{os.Args[0]}, guest: os.Args[0], disk: 64, timeout: time.Minute}, dir: t.TempDir(), out: &skipWatcher{}}
	if code, err := m.run(ctx); code == 0 || err == nil {
		t.Errorf("exit code %d, %v", code, err)
	}
}

func TestSkipWatcher(t *testing.T) {
	var out bytes.Buffer
	s := &skipWatcher{w: &out}
	const text = "=== RUN TestA\n--- SKIP: TestA (0.00s)\n    --- SKIP: TestB/part (1.00s)\n--- PASS: TestC\nno --- SKIP: here\n"
	for _, piece := range []string{text[:17], text[17:18], text[18:70], text[70:]} {
		if _, err := s.Write([]byte(piece)); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(s.skipped, " "); got != "TestA TestB/part" || out.String() != text {
		t.Errorf("skipped %q, passed on %q", got, out.String())
	}
}
