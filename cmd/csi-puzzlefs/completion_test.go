package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// The arguments that are completed are those that the commands say they take.
func TestFormOf(t *testing.T) {
	for use, want := range map[string]string{
		"verify LAYOUT:TAG":                          "LAYOUT:TAG",
		"mount -f LAYOUT:TAG DIR":                    "LAYOUT:TAG DIR",
		"mount [-f] [-i PIPE] [-d X] LAYOUT:TAG DIR": "LAYOUT:TAG DIR",
		"build SOURCE [LAYOUT:TAG] [--push REF]":     "SOURCE LAYOUT:TAG",
		"store":                                      "",
		"gc [--all | --quota QUANTITY]":              "",
	} {
		if diff := cmp.Diff(want, strings.Join(formOf(use), " ")); diff != "" {
			t.Errorf("%s: %s", use, diff)
		}
	}
	var check func(cmd *cobra.Command)
	check = func(cmd *cobra.Command) {
		for _, arg := range formOf(cmd.Use) {
			if arg != strings.ToUpper(arg) && cmd.Name() != "driver" {
				t.Errorf("%s: argument %q is not in capitals", cmd.CommandPath(), arg)
			}
		}
		for _, sub := range cmd.Commands() {
			check(sub)
		}
	}
	check(newRootCommand())
}

// terminal runs bash at a terminal, as a person does.
type terminal struct {
	t      *testing.T
	master *os.File
	got    chan []byte
	seen   strings.Builder
}

// newTerminal starts an interactive bash in a directory with csi-puzzlefs in its path.
func newTerminal(t *testing.T, dir string, env ...string) *terminal {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	term := &terminal{t: t, master: os.NewFile(uintptr(fd), "terminal"), got: make(chan []byte, 100)}
	cmd := exec.Command("bash", "--norc", "--noprofile", "-i")
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = dir, slave, slave, slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	cmd.Env = append([]string{"PATH=" + dir + ":" + os.Getenv("PATH"), "HOME=" + dir, "TERM=dumb", "PS1=ready> ", "INPUTRC=" + filepath.Join(dir, "inputrc")}, env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			b := make([]byte, 4096)
			n, err := term.master.Read(b)
			if n > 0 {
				term.got <- b[:n]
			}
			if err != nil { // EIO when bash is gone
				close(term.got)
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		go func() {
			for range term.got {
			}
		}()
		<-done
		_ = term.master.Close()
	})
	return term
}

// send types keys and waits until the terminal shows want after what it showed before.
func (term *terminal) send(keys, want string) {
	term.t.Helper()
	term.seen.Reset()
	if _, err := io.WriteString(term.master, keys); err != nil {
		term.t.Fatal(err)
	}
	timeout := time.After(30 * time.Second)
	for !strings.Contains(term.seen.String(), want) {
		select {
		case b, ok := <-term.got:
			if !ok {
				term.t.Fatalf("bash ended; after %q it showed %q", keys, term.seen.String())
			}
			term.seen.Write(b)
		case <-timeout:
			term.t.Fatalf("after %q the terminal shows %q, want %q", keys, term.seen.String(), want)
		}
	}
}

// A person types a layout and presses the tabulator key: bash, for which the colon ends a word,
// completes the layout and then its tag, with the package bash-completion and without.
func TestBashCompletion(t *testing.T) {
	const packaged = "/usr/share/bash-completion/bash_completion"
	for _, with := range []bool{false, true} {
		t.Run(fmt.Sprintf("package=%v", with), func(t *testing.T) {
			dir := t.TempDir()
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(self, filepath.Join(dir, "csi-puzzlefs")); err != nil {
				t.Fatal(err)
			}
			inputrc := "set bell-style none\nset enable-bracketed-paste off\n"
			if err := os.WriteFile(filepath.Join(dir, "inputrc"), []byte(inputrc), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.Mkdir(filepath.Join(dir, "tree"), 0o755), os.Mkdir(filepath.Join(dir, "target"), 0o755)); err != nil {
				t.Fatal(err)
			}
			term := newTerminal(t, dir)
			if with {
				if _, err := os.Stat(packaged); err != nil {
					t.Fatalf("%v: hack/install-deps.sh installs it", err)
				}
				term.send("source "+packaged+"\n", "ready> ")
			}
			term.send("csi-puzzlefs build tree images:release-1\n", "oci image manifest digest")
			term.send("source <(csi-puzzlefs completion bash); echo sour''ced\n", "sourced")
			term.send("csi-puzzlefs verify im\t", "verify images:")
			term.send("\t", "release-1 ")
			term.send("\n", "verified images:release-1")
			// The same by two arguments, and a flag with a value after an equal sign.
			term.send("csi-puzzlefs verify images \t", "images release-1 ")
			term.send("--log-level=wa\t", "--log-level=warn ")
			term.send("\n", "verified images:release-1")
			// And what comes after.
			term.send("csi-puzzlefs extract images:rel\t", "images:release-1 ")
			term.send("tar\t", "target/")
			term.send("\n", "extracted images:release-1 to target/")
		})
	}
}
