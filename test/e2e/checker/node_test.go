package main

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	dir := filepath.Join(t.TempDir(), "with a space")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("the source", dir, "tmpfs", unix.MS_NOSUID, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	list := func(flags ...string) []mountLine {
		t.Helper()
		out, err := checker(t, append([]string{"mounts", "--pid", strconv.Itoa(os.Getpid())}, flags...)...)
		if err != nil {
			t.Fatal(err)
		}
		var got []mountLine
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatal(err)
		}
		return got
	}
	for _, under := range []string{dir, filepath.Dir(dir), filepath.Dir(dir) + "/"} {
		got := list("--under", under, "--type", "tmpfs")
		if len(got) != 1 {
			t.Fatalf("under %s: %+v, want one mount", under, got)
		}
		m := got[0]
		if m.Point != dir || m.Type != "tmpfs" || m.Source != "the source" || m.Root != "/" || m.ID == 0 || m.Parent == 0 ||
			!strings.Contains(m.Device, ":") || !strings.Contains(m.Options, "nosuid") {
			t.Errorf("under %s: %+v", under, m)
		}
	}
	for _, flags := range [][]string{{"--under", dir, "--type", "proc"}, {"--under", dir + "x"}, {"--under", strings.TrimSuffix(dir, " a space")}} {
		if got := list(flags...); len(got) != 0 || got == nil {
			t.Errorf("%q: %+v, want an empty list", flags, got)
		}
	}
	if all := list(); len(all) < 2 {
		t.Errorf("without flags: %+v", all)
	}
}

func TestKill(t *testing.T) {
	name := filepath.Join(t.TempDir(), "checker-test-sleeper")
	path, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path, name); err != nil {
		t.Fatal(err)
	}
	start := func(seconds string) *exec.Cmd {
		t.Helper()
		cmd := exec.Command(name, seconds)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if cmd.ProcessState == nil {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}
		})
		return cmd
	}
	one, other := start("1001"), start("1002")
	for _, line := range []string{"checker-test-sleeper 1", "checker-test-sleepe 1001", "sleep 1001", name + " 1001"} {
		if out, err := checker(t, "kill", "--cmdline", line); err == nil {
			t.Errorf("%q: found %s", line, out)
		}
	}
	out, err := checker(t, "kill", "--cmdline", "checker-test-sleeper", "--signal", "0")
	if pids := strings.Fields(out); err != nil || len(pids) != 2 {
		t.Errorf("printed %q, error %v; want both", out, err)
	}
	out, err = checker(t, "kill", "--cmdline", "checker-test-sleeper 1001", "--signal", "TERM")
	if err != nil || out != strconv.Itoa(one.Process.Pid)+"\n" {
		t.Errorf("printed %q, error %v; want %d", out, err, one.Process.Pid)
	}
	var exit *exec.ExitError
	if err := one.Wait(); !errors.As(err, &exit) || !strings.Contains(exit.Error(), "terminated") {
		t.Errorf("it ended with %v", err)
	}
	if _, err := checker(t, "kill", "--cmdline", "checker-test-sleeper"); err != nil {
		t.Error(err)
	}
	if err := other.Wait(); !errors.As(err, &exit) || !strings.Contains(exit.Error(), "killed") {
		t.Errorf("it ended with %v", err)
	}
}
