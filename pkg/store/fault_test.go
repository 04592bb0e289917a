package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// stepCase says whether a build (see build) into an existing layout with a torn chunk
// passes a step with files without names, and with temporary names.
type stepCase struct {
	step           store.Step
	unnamed, named bool
}

// steps are all steps.
var steps = []stepCase{
	{store.StepLayoutMarked, false, false},
	{store.StepLayoutBlobs, true, true},
	{store.StepBlobTemp, true, false}, // with temporary names it says so
	{store.StepBlobWritten, true, true},
	{store.StepBlobNamed, true, true},
	{store.StepBlobLinked, true, true},
	{store.StepSynced, true, true},
	{store.StepIndexLocked, true, true},
	{store.StepIndexTempWritten, true, true},
	{store.StepIndexTempSynced, true, true},
	{store.StepIndexRenamed, true, true},
}

// oldLayout makes a layout with a good image, "old", and a torn chunk.
func oldLayout(t *testing.T) string {
	t.Helper()
	s := create(t, store.Config{})
	old := []byte("an older manifest")
	d := format.Descriptor{Digest: put(t, s, old), Size: int64(len(old))}
	must(t, s.Tag("old", d))
	writeFile(t, blobFile(s, format.DigestOf(chunkData)), chunkData[:100])
	return s.Dir()
}

// checkOutcome checks a layout in which a build was cut short: the old image is whole, the
// new one whole or not there.
func checkOutcome(t *testing.T, s *store.Store) {
	t.Helper()
	old, err := s.Resolve("old")
	must(t, err)
	must(t, s.Verify(t.Context(), old.Digest))
	switch d, err := s.Resolve("new"); {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		t.Error(err)
	default:
		must(t, s.Verify(t.Context(), d.Digest))
		must(t, s.Verify(t.Context(), format.DigestOf(chunkData)))
	}
}

// checkWorks builds again, and checks that nothing is left of what was cut short.
func checkWorks(t *testing.T, s *store.Store) {
	t.Helper()
	must(t, build(s))
	names := tagNames(t, s)
	if names[len(names)-1] != "new" {
		t.Errorf("tags %q, want new to be the last", names)
	}
	must(t, s.Verify(t.Context(), manifest().Digest))
	must(t, s.Verify(t.Context(), format.DigestOf(chunkData)))
	checkTree(t, s.Dir())
}

func TestFaultAtEachStep(t *testing.T) {
	failure := errors.New("failure")
	for _, test := range steps {
		for _, named := range []bool{false, true} {
			passed := test.unnamed && !named || test.named && named
			t.Run(fmt.Sprintf("%s, named %v", test.step, named), func(t *testing.T) {
				dir := oldLayout(t)
				reached := false
				fault := faults(named, func(step store.Step) error {
					if step == test.step {
						reached = true
						return failure
					}
					return nil
				})
				s, err := store.Open(store.Config{Dir: dir, Create: true, Fault: fault})
				if err == nil {
					defer s.Close()
					err = build(s)
				}
				if reached != passed {
					t.Fatalf("step reached: %v, want %v", reached, passed)
				}
				if passed && (!errors.Is(err, failure) || !strings.Contains(err.Error(), dir)) {
					t.Errorf("error %v, want the fault, wrapped with the layout's name", err)
				}
				checkTree(t, dir)
				again := open(t, store.Config{Dir: dir})
				checkOutcome(t, again)
				checkWorks(t, again)
			})
		}
	}
}

func TestFaultAtCreation(t *testing.T) {
	failure := errors.New("failure")
	for _, test := range steps {
		dir := filepath.Join(t.TempDir(), "layout")
		_, err := store.Open(store.Config{Dir: dir, Create: true, Fault: func(step store.Step) error {
			if step == test.step {
				return failure
			}
			return nil
		}})
		if err != nil && !errors.Is(err, failure) {
			t.Errorf("%s: error %v, want the fault", test.step, err)
		}
		s, err := store.Open(store.Config{Dir: dir, Create: true})
		if err != nil {
			t.Errorf("%s: opening it again: %v", test.step, err)
			continue
		}
		checkTree(t, dir)
		checkWorks(t, s)
		s.Close()
	}
}

// TestKilledAtEachStep kills another process that builds, into a layout that is there and
// into a new one.
func TestKilledAtEachStep(t *testing.T) {
	for _, test := range steps {
		for _, named := range []bool{false, true} {
			for _, fresh := range []bool{false, true} {
				passed := test.unnamed && !named || test.named && named
				if fresh {
					passed = test.step != store.StepBlobNamed && (test.step != store.StepBlobTemp || !named)
				}
				if !passed {
					continue
				}
				t.Run(fmt.Sprintf("%s, named %v, new %v", test.step, named, fresh), func(t *testing.T) {
					dir := filepath.Join(t.TempDir(), "layout")
					if !fresh {
						dir = oldLayout(t)
					}
					env := []string{stepEnv + "=" + string(test.step)}
					if named {
						env = append(env, namedEnv+"=1")
					}
					cmd := child(t, "build", dir, env...)
					err := cmd.Run()
					if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != unix.SIGKILL {
						t.Fatalf("the child was not killed: %v", err)
					}
					s := open(t, store.Config{Dir: dir, Create: true})
					if !fresh {
						checkOutcome(t, s)
					}
					checkWorks(t, s)
				})
			}
		}
	}
}

// TestCleanSparesLiving checks that a file that another goroutine or process is writing is
// not taken for one that was left.
func TestCleanSparesLiving(t *testing.T) {
	s := create(t, store.Config{Fault: faults(true, func(store.Step) error { return nil })})
	put(t, s, manifestData)
	left := filepath.Join(s.Dir(), store.TempPrefix+"left")
	writeFile(t, left, []byte("by a killed process"))
	data := storetest.Data(1, 300_000)
	d := format.DigestOf(data)
	r := &hookReader{Reader: bytes.NewReader(data), hook: func() { must(t, s.Tag("x", manifest())) }}
	must(t, s.PutReader(t.Context(), d, -1, r))
	if !r.called {
		t.Fatal("nothing was tagged meanwhile")
	}
	must(t, s.Verify(t.Context(), d))
	checkTree(t, s.Dir())
}

// hookReader calls hook before its second read.
type hookReader struct {
	*bytes.Reader
	hook   func()
	reads  int
	called bool
}

func (r *hookReader) Read(p []byte) (int, error) {
	if r.reads++; r.reads == 2 {
		r.hook()
		r.called = true
	}
	return r.Reader.Read(p)
}

// TestFullDisk fills a file system of 1 MiB.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	for _, named := range []bool{false, true} {
		t.Run(fmt.Sprintf("named %v", named), func(t *testing.T) {
			mnt := t.TempDir()
			must(t, unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=1m"))
			t.Cleanup(func() {
				if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			})
			cfg := store.Config{
				Dir: filepath.Join(mnt, "layout"), Create: true,
				Fault: faults(named, func(store.Step) error { return nil }),
			}
			s, err := store.Open(cfg)
			must(t, err)
			defer s.Close() // before the file system is unmounted
			put(t, s, manifestData)
			must(t, s.Tag("old", manifest()))
			full := func(op string, err error) {
				t.Helper()
				if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "free space") || !strings.Contains(err.Error(), s.Dir()) {
					t.Errorf("%s: error %v, want ENOSPC with the layout and the cure", op, err)
				}
				checkTree(t, s.Dir())
			}

			big := storetest.Data(1, 2<<20)
			full("Put", s.Put(big, format.Digest{}))
			full("PutReader", s.PutReader(t.Context(), format.DigestOf(big), -1, bytes.NewReader(big)))

			filler := filepath.Join(mnt, "filler")
			f, err := os.Create(filler)
			must(t, err)
			defer f.Close()
			for {
				if _, err := f.Write(make([]byte, 4096)); errors.Is(err, unix.ENOSPC) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
			}
			before := readFile(t, filepath.Join(s.Dir(), "index.json"))
			full("small Put", s.Put([]byte("x"), format.Digest{}))
			full("Tag", s.Tag("new", manifest()))
			if diff := cmp.Diff(string(before), string(readFile(t, filepath.Join(s.Dir(), "index.json")))); diff != "" {
				t.Errorf("index.json (-want +got):\n%s", diff)
			}
			other := cfg
			other.Dir = filepath.Join(mnt, "other")
			if _, err := store.Open(other); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("Open: error %v, want ENOSPC", err)
			}

			must(t, os.Remove(filler))
			must(t, f.Close())
			must(t, build(s))
			if diff := cmp.Diff([]string{"old", "new"}, tagNames(t, s)); diff != "" {
				t.Errorf("tags (-want +got):\n%s", diff)
			}
			again, err := store.Open(other)
			must(t, err)
			defer again.Close()
			checkWorks(t, again)
		})
	}
}

// TestStepsAreTested notices a step that is not in the tables above.
func TestStepsAreTested(t *testing.T) {
	var seen []store.Step
	record := func(step store.Step) error {
		if !slices.Contains(seen, step) {
			seen = append(seen, step)
		}
		return nil
	}
	s := create(t, store.Config{Fault: record})
	writeFile(t, blobFile(s, format.DigestOf(chunkData)), nil)
	must(t, build(s))
	for _, step := range seen {
		if !slices.ContainsFunc(steps, func(e stepCase) bool { return e.step == step }) {
			t.Errorf("step %s is not tested", step)
		}
	}
	if len(seen) != len(steps) {
		t.Errorf("%d steps passed, %d are known", len(seen), len(steps))
	}
}
