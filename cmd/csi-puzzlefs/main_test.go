package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"csi-puzzlefs": main, "print-trust": printTrust})
}

// TestScripts runs the scripts in testdata/script. Besides testscript's own commands they have
//
//	unpack TREE DIR    unpacks a golden tree
//	samedir A B        compares two directories as trees
//	waitmounted LOG    waits until the mount command that logs to LOG is done mounting
//	waitsocket FILE    waits until a driver listens on a socket
//	nomounts           fails if something is mounted below the work directory
//	noservers          waits until no mount server of the script is running any longer
//	termservers [SIG]  sends a signal, SIGTERM, to the mount servers of the script
//	waitunmounted DIR  waits until nothing is mounted in and below a directory
//	waitfile FILE      waits until a file exists
//	shows DIR REGEXP   looks at the line of the table of mounts for a directory
//	corrupt FILE       flips a bit in the middle of a file
//	term               sends SIGTERM to what runs in the background
//
// and $REGISTRY, the address of a registry of their own, and $TESTDATA.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
			env.Defer(srv.Close)
			env.Setenv("REGISTRY", strings.TrimPrefix(srv.URL, "http://"))
			env.Setenv("TESTDATA", filepath.Dir(testtree.Golden(t, "images")))
			env.Setenv("HOME", env.WorkDir)
			env.Defer(func() { unmountBelow(t, env.WorkDir) })
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"unpack":        unpack,
			"samedir":       sameDir,
			"waitmounted":   waitMounted,
			"waitsocket":    waitSocket,
			"nomounts":      noMounts,
			"noservers":     noServers,
			"termservers":   termServers,
			"waitunmounted": waitUnmounted,
			"waitfile":      waitFile,
			"shows":         shows,
			"corrupt":       corrupt,
			"term":          terminate,
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

func unpack(ts *testscript.TestScript, _ bool, args []string) {
	f, err := os.Open(filepath.Join(ts.Getenv("TESTDATA"), args[0]+".tar"))
	ts.Check(err)
	defer f.Close()
	dir := ts.MkAbs(args[1])
	ts.Check(os.MkdirAll(dir, 0o755))
	ts.Check(testtree.Unpack(dir, f))
}

func sameDir(ts *testscript.TestScript, neg bool, args []string) {
	// A program that another script starts meanwhile has what is open here until it runs, and
	// keeps a mount busy.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	var trees [2][]testtree.Entry
	for i, dir := range args {
		var err error
		trees[i], err = testtree.FromDir(ts.MkAbs(dir))
		ts.Check(err)
	}
	diff := testtree.Diff(trees[0], trees[1])
	if neg && diff == "" {
		ts.Fatalf("%s and %s are the same", args[0], args[1])
	}
	if !neg && diff != "" {
		ts.Fatalf("%s and %s differ:\n%s", args[0], args[1], diff)
	}
}

// mountsBelow returns the mount points in and below dir.
func mountsBelow(dir string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			points = append(points, f[4])
		}
	}
	return points, nil
}

// waitMounted waits until a mount command has said that it is done. Until then it still
// looks at its mount, and unmounting would disturb it.
func waitMounted(ts *testscript.TestScript, _ bool, args []string) {
	name := ts.MkAbs(args[0])
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		// The shell makes the file before it starts the command.
		if b, err := os.ReadFile(name); err == nil && strings.Contains(string(b), "msg=mounted") {
			return
		}
	}
	ts.Fatalf("%s does not say after 10 s that the image is mounted", args[0])
}

// waitSocket waits until somebody takes connections on a unix socket.
func waitSocket(ts *testscript.TestScript, _ bool, args []string) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if conn, err := net.Dial("unix", ts.MkAbs(args[0])); err == nil {
			ts.Check(conn.Close())
			return
		}
	}
	ts.Fatalf("nobody listens on %s after 10 s", args[0])
}

func noMounts(ts *testscript.TestScript, _ bool, _ []string) {
	points, err := mountsBelow(ts.Getenv("WORK"))
	ts.Check(err)
	if len(points) > 0 {
		ts.Fatalf("mounts are left: %v", points)
	}
}

// noServers waits until the servers of a script have ended. They have its $WORK, and are not
// its children.
func noServers(ts *testscript.TestScript, _ bool, _ []string) {
	var left []int
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		var err error
		left, err = serversOf(ts.Getenv("WORK"))
		ts.Check(err)
		if len(left) == 0 {
			return
		}
	}
	ts.Fatalf("running after 10 s: %v", left)
}

func termServers(ts *testscript.TestScript, _ bool, args []string) {
	sig := unix.SIGTERM
	if len(args) > 0 {
		sig = unix.SignalNum("SIG" + args[0])
	}
	pids, err := serversOf(ts.Getenv("WORK"))
	ts.Check(err)
	if len(pids) == 0 {
		ts.Fatalf("there is no server")
	}
	for _, pid := range pids {
		ts.Check(unix.Kill(pid, sig))
	}
}

func waitUnmounted(ts *testscript.TestScript, _ bool, args []string) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		points, err := mountsBelow(ts.MkAbs(args[0]))
		ts.Check(err)
		if len(points) == 0 {
			return
		}
	}
	ts.Fatalf("still mounted after 10 s: %s", args[0])
}

func waitFile(ts *testscript.TestScript, _ bool, args []string) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
			return
		}
	}
	ts.Fatalf("%s does not exist after 10 s", args[0])
}

func shows(ts *testscript.TestScript, neg bool, args []string) {
	want, err := regexp.Compile(args[1])
	ts.Check(err)
	b, err := os.ReadFile("/proc/self/mountinfo")
	ts.Check(err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == ts.MkAbs(args[0]) {
			if want.MatchString(line) == neg {
				ts.Fatalf("the table of mounts has %s", line)
			}
			return
		}
	}
	ts.Fatalf("nothing is mounted on %s", args[0])
}

// serversOf returns the processes named csi-puzzlefs that have a variable WORK of this value.
func serversOf(work string) (pids []int, err error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		// A process that ended meanwhile, or has and is waited for, has no variables.
		env, _ := os.ReadFile(filepath.Join(dir, "environ"))
		comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
		if slices.Contains(strings.Split(string(env), "\x00"), "WORK="+work) && string(comm) == "csi-puzzlefs\n" {
			pid, err := strconv.Atoi(filepath.Base(dir))
			if err != nil {
				return nil, err
			}
			pids = append(pids, pid)
		}
	}
	return pids, err
}

func unmountBelow(t *testing.T, dir string) {
	points, err := mountsBelow(dir)
	if err != nil {
		t.Error(err)
	}
	for _, p := range slices.Backward(points) { // an overlay hides what it was made of
		// A server may be unmounting, too.
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Error(err)
		}
	}
}

func corrupt(ts *testscript.TestScript, _ bool, args []string) {
	name := ts.MkAbs(args[0])
	b, err := os.ReadFile(name)
	ts.Check(err)
	b[len(b)/2] ^= 1
	ts.Check(os.WriteFile(name, b, 0o600))
}

func terminate(ts *testscript.TestScript, _ bool, _ []string) {
	for _, cmd := range ts.BackgroundCmds() {
		ts.Check(cmd.Process.Signal(unix.SIGTERM))
	}
}

// Ctrl-C ends the work; the message says what it was.
func TestInterrupt(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		// run listens for signals as long as it works.
		if err := unix.Kill(os.Getpid(), unix.SIGINT); err != nil {
			t.Error(err)
		}
		<-r.Context().Done()
	}))
	defer srv.Close()
	ref := strings.TrimPrefix(srv.URL, "http://") + "/x:t"
	layout := filepath.Join(t.TempDir(), "layout")
	var stderr strings.Builder
	if code := run([]string{"pull", ref, layout + ":t"}, io.Discard, &stderr); code != exitError {
		t.Errorf("exit code %d, want %d", code, exitError)
	}
	if got := stderr.String(); !strings.HasPrefix(got, "csi-puzzlefs: interrupted: ") || !strings.Contains(got, ref) {
		t.Errorf("message %q", got)
	}
	if _, err := os.Stat(layout); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

// The examples of all commands work as they stand in the help, but for the places: files
// go to a directory of the test's own, images to a registry of its own.
func TestExamples(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the examples of mount and driver need root here")
	}
	dir := t.TempDir()
	defer unmountBelow(t, dir)
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	ready := httptest.NewServer(answer(0))
	defer ready.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "csi-puzzlefs")
	// testscript.Main gives the test binary the command's behaviour under the command's name.
	if err := os.Symlink(self, program); err != nil {
		t.Fatal(err)
	}
	places := strings.NewReplacer("/tmp/", dir+"/", "/run/", dir+"/run/", "/var/lib/", dir+"/var/",
		"localhost:5000", strings.TrimPrefix(srv.URL, "http://"), "localhost:9809", strings.TrimPrefix(ready.URL, "http://"), "/usr/share/doc", testtree.Golden(t, "images"))
	run := func(name, script string) {
		t.Helper()
		cmd := exec.Command("sh", "-ec", script)
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "HOME="+dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s\n%s", name, err, script, out)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "var"), 0o755); err != nil {
		t.Fatal(err)
	}
	commands := make(map[string]*cobra.Command)
	for _, c := range newRootCommand().Commands() {
		if c.Example == "" && c.Name() != "help" && c.Name() != "completion" {
			t.Errorf("%s has no example", c.Name())
		}
		commands[c.Name()] = c
	}
	// Each runs twice, the second time on top of what the first left, but for extract,
	// which wants an empty directory.
	for _, name := range []string{"build", "build", "extract", "verify", "inspect", "push", "push", "pull", "pull", "probe"} {
		run(name, places.Replace(commands[name].Example))
	}
	// It works, or says that the file system has no fs-verity; test/vm has one that has.
	run("enable-fs-verity", "out=$(exec 2>&1; set -e\n"+places.Replace(commands["enable-fs-verity"].Example)+") || case $out in *'no fs-verity here'*) ;; *) echo \"$out\"; exit 1;; esac")
	const stop = "\npid=$!; i=0; until %s; do i=$((i+1)); test $i -lt 500; sleep 0.02; done\n"
	run("mount and umount", places.Replace(commands["mount"].Example+"\ntest -e /tmp/mnt/greeting\n"+commands["umount"].Example))
	run("commit", places.Replace(commands["commit"].Example+"\n"+commands["umount"].Example))
	listening := fmt.Sprintf(stop, "test -S "+dir+"/run/csi-puzzlefs/csi.sock")
	run("driver", places.Replace(commands["driver"].Example)+" &"+listening+"kill $pid\nwait $pid")
	run("store", places.Replace(commands["store"].Example)) // on what the driver left
}
