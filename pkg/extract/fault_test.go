package extract_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/extract"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// faults is a hook that counts steps, and calls fn at one passing of one step. With named it
// pretends that the file system has no files without names.
type faults struct {
	named bool
	step  extract.Step
	nth   int
	fn    func() error

	mu     sync.Mutex // guards passed
	passed map[extract.Step]int
}

func (f *faults) at(step extract.Step) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.passed == nil {
		f.passed = make(map[extract.Step]int)
	}
	f.passed[step]++
	if step == f.step && f.passed[step] == f.nth {
		return f.fn()
	}
	if f.named && step == extract.StepFileTemp {
		return unix.EOPNOTSUPP
	}
	return nil
}

// starts are what extractions find.
func starts() map[string]func(t *testing.T, im *image.Image, dir string) {
	return map[string]func(t *testing.T, im *image.Image, dir string){
		"nothing": func(*testing.T, *image.Image, string) {},
		"a damaged tree": func(t *testing.T, im *image.Image, dir string) {
			_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir})
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, "suid"), []byte("mine"), 0o600))
			must(t, os.Chmod(filepath.Join(dir, "large"), 0o644))
			must(t, os.Remove(filepath.Join(dir, "ro", "fifo2")))
			must(t, os.Remove(filepath.Join(dir, "null")))
			must(t, os.Mkdir(filepath.Join(dir, "null"), 0o700))
			must(t, os.Remove(filepath.Join(dir, "link2")))
			must(t, os.Symlink("elsewhere", filepath.Join(dir, "link2")))
			must(t, os.RemoveAll(filepath.Join(dir, "d")))
			must(t, os.WriteFile(filepath.Join(dir, "d"), []byte("mine"), 0o600))
			must(t, os.Chown(filepath.Join(dir, "ro"), 1000, 1000))
			must(t, os.Chmod(filepath.Join(dir, "ro"), 0o777))
		},
	}
}

// checkWhole checks that every file that is there is as before or as it is to be.
func checkWhole(t *testing.T, dir string, before, want []testtree.Entry) {
	t.Helper()
	content := make(map[string][]string)
	for _, e := range append(append([]testtree.Entry{}, before...), want...) {
		content[e.Path] = append(content[e.Path], string(e.Type)+e.SHA256)
	}
	got, err := testtree.FromDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	must(t, err)
	there := make(map[string]bool)
	for _, e := range got {
		there[e.Path] = true
		if e.Type == testtree.File && !strings.HasPrefix(filepath.Base(e.Path), ".puzzlefs-extract-") &&
			!strings.Contains(strings.Join(content[e.Path], " "), string(e.Type)+e.SHA256) {
			t.Errorf("%s is neither what it was nor what it is to be", e.Path)
		}
	}
	for _, e := range before {
		// But for what is in the way of something of another type, nothing is ever missing.
		if !there[e.Path] && e.Path != "/d" && e.Path != "/null" {
			t.Errorf("%s is gone", e.Path)
		}
	}
}

// TestFaultAtEachStep fails extractions at every passing of every step, and completes them.
func TestFaultAtEachStep(t *testing.T) {
	needRoot(t)
	src := oddTree(t)
	im := build(t, src)
	want, err := testtree.FromDir(src)
	must(t, err)
	failure := errors.New("failure")
	tried := 0
	reached := make(map[extract.Step]bool)
	for name, start := range starts() {
		for _, named := range []bool{false, true} {
			counted := &faults{named: named}
			dir := filepath.Join(t.TempDir(), "dir")
			start(t, im, dir)
			_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir, Force: true, Workers: 1, Fault: counted.at})
			must(t, err)
			for step, passed := range counted.passed {
				reached[step] = true
				for nth := 1; nth <= passed; nth++ {
					tried++
					where := fmt.Sprintf("%s, named %v, %s %d", name, named, step, nth)
					dir := filepath.Join(t.TempDir(), "dir")
					start(t, im, dir)
					before, err := testtree.FromDir(dir)
					if err != nil && !errors.Is(err, os.ErrNotExist) {
						t.Fatal(err)
					}
					hook := &faults{named: named, step: step, nth: nth, fn: func() error { return failure }}
					if _, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir, Force: true, Workers: 1, Fault: hook.at}); !errors.Is(err, failure) {
						t.Fatalf("%s: error %v, want the fault", where, err)
					}
					checkWhole(t, dir, before, want)
					_, err = force(t, im, dir)
					must(t, err)
					got, err := testtree.FromDir(dir)
					must(t, err)
					if diff := testtree.Diff(want, got); diff != "" {
						t.Errorf("%s: %s", where, diff)
					}
				}
			}
		}
	}
	for _, step := range steps() {
		if !reached[step] {
			t.Errorf("no extraction passes %s", step)
		}
	}
	t.Logf("%d faults", tried)
}

func steps() []extract.Step {
	return []extract.Step{
		extract.StepSurveyed, extract.StepDirTaken, extract.StepDirMade, extract.StepCleared, extract.StepEntryMade, extract.StepFileTemp,
		extract.StepFileWritten, extract.StepTempNamed, extract.StepReplaced, extract.StepFileReused, extract.StepLinked, extract.StepDirFinished,
	}
}

// A failure without Force takes everything back, at each step.
func TestFaultWithoutForce(t *testing.T) {
	needRoot(t)
	im := build(t, oddTree(t))
	failure := errors.New("failure")
	counted := &faults{}
	_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: filepath.Join(t.TempDir(), "dir"), Fault: counted.at})
	must(t, err)
	for step, passed := range counted.passed {
		for nth := 1; nth <= passed; nth++ {
			dir := t.TempDir()
			must(t, os.Chown(dir, 1000, 1001))
			must(t, os.Chmod(dir, 0o777))
			before, err := testtree.FromDir(dir)
			must(t, err)
			hook := &faults{step: step, nth: nth, fn: func() error { return failure }}
			if _, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir, Fault: hook.at}); !errors.Is(err, failure) {
				t.Errorf("%s %d: error %v, want the fault", step, nth, err)
			}
			after, err := testtree.FromDir(dir)
			must(t, err)
			if diff := testtree.Diff(before, after); diff != "" {
				t.Errorf("%s %d: %s", step, nth, diff)
			}
		}
	}
}

// Environment of a child: the test binary itself, run again to be killed.
const (
	childDir   = "EXTRACT_TEST_DIR"
	childImage = "EXTRACT_TEST_LAYOUT"
	childForce = "EXTRACT_TEST_FORCE"
	childNamed = "EXTRACT_TEST_NAMED"
	childStep  = "EXTRACT_TEST_STEP"
	childNth   = "EXTRACT_TEST_NTH"
)

// TestKilledAtEachStep kills another process that extracts, with and without Force, and
// completes what it left.
func TestKilledAtEachStep(t *testing.T) {
	needRoot(t)
	if dir := os.Getenv(childDir); dir != "" {
		nth, err := strconv.Atoi(os.Getenv(childNth))
		must(t, err)
		hook := &faults{
			named: os.Getenv(childNamed) != "", step: extract.Step(os.Getenv(childStep)), nth: nth,
			fn: func() error { return unix.Kill(os.Getpid(), unix.SIGKILL) },
		}
		_, err = extract.Extract(t.Context(), extract.Config{
			Image: open(t, os.Getenv(childImage), "t"), Dir: dir, Force: os.Getenv(childForce) != "", Workers: 1, Fault: hook.at,
		})
		t.Fatalf("not killed: %v", err)
	}
	src := oddTree(t)
	im, layout := buildIn(t, src)
	want, err := testtree.FromDir(src)
	must(t, err)
	exe, err := os.Executable()
	must(t, err)
	killed := 0
	kill := func(name string, start func(t *testing.T, im *image.Image, dir string), env ...string) {
		named, force := strings.Contains(name, "named"), strings.Contains(name, "force")
		counted := &faults{named: named}
		dir := filepath.Join(t.TempDir(), "dir")
		start(t, im, dir)
		_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir, Force: force, Workers: 1, Fault: counted.at})
		must(t, err)
		for step, passed := range counted.passed {
			for _, nth := range []int{1, passed}[:min(passed, 2)] {
				killed++
				where := fmt.Sprintf("%s, %s %d", name, step, nth)
				dir := filepath.Join(t.TempDir(), "dir")
				start(t, im, dir)
				before, _ := testtree.FromDir(dir)
				cmd := exec.CommandContext(t.Context(), exe, "-test.run", "^"+t.Name()+"$")
				cmd.Env = append(os.Environ(), childDir+"="+dir, childImage+"="+layout, childStep+"="+string(step), childNth+"="+strconv.Itoa(nth))
				cmd.Env = append(cmd.Env, env...)
				out, err := cmd.CombinedOutput()
				if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != unix.SIGKILL {
					t.Fatalf("%s: the child was not killed: %v\n%s", where, err, out)
				}
				if force {
					checkWhole(t, dir, before, want)
				}
				_, err = extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir, Force: true})
				must(t, err)
				got, err := testtree.FromDir(dir)
				must(t, err)
				if diff := testtree.Diff(want, got); diff != "" {
					t.Errorf("%s: %s", where, diff)
				}
			}
		}
	}
	for name, start := range starts() {
		kill(name+" with force", start, childForce+"=1")
	}
	kill("a damaged tree with force, named", starts()["a damaged tree"], childForce+"=1", childNamed+"=1")
	kill("nothing", starts()["nothing"])
	t.Logf("%d processes were killed", killed)
}
