package store_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// Environment of a child: the test binary itself, run again as another process.
const (
	childEnv = "STORE_TEST_CHILD" // what to do, a key of children
	dirEnv   = "STORE_TEST_DIR"   // the layout
	stepEnv  = "STORE_TEST_STEP"  // where to be killed
	namedEnv = "STORE_TEST_NAMED" // whether to pretend that O_TMPFILE is not supported
	nameEnv  = "STORE_TEST_NAME"  // begins the tags to write
	timesEnv = "STORE_TEST_TIMES" // at which passing of the step to be killed, or "loop"
)

func TestMain(m *testing.M) {
	what := os.Getenv(childEnv)
	if what == "" {
		os.Exit(m.Run())
	}
	children := map[string]func(dir string) error{
		"build": childBuild,
		"tag":   childTag,
		"hold":  childHold,

		"pin":     childPin,
		"collect": childCollect,
	}
	if err := children[what](os.Getenv(dirEnv)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// child returns the command that runs this binary as a child.
func child(t *testing.T, what, dir string, env ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), childEnv+"="+what, dirEnv+"="+dir)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stderr = os.Stderr
	return cmd
}

// childBuild does what a build does, and kills itself at a step.
func childBuild(dir string) error {
	fault := faults(os.Getenv(namedEnv) != "", func(step store.Step) error {
		if string(step) == os.Getenv(stepEnv) {
			return unix.Kill(os.Getpid(), unix.SIGKILL)
		}
		return nil
	})
	s, err := store.Open(store.Config{Dir: dir, Create: true, Fault: fault})
	if err != nil {
		return err
	}
	return build(s)
}

// childTag writes many tags.
func childTag(dir string) error {
	s, err := store.Open(store.Config{Dir: dir})
	if err != nil {
		return err
	}
	d := manifest()
	for i := range tagsPerChild {
		if err := s.Tag(fmt.Sprint(os.Getenv(nameEnv), i), d); err != nil {
			return err
		}
	}
	return nil
}

// childHold holds the lock until its standard input ends.
func childHold(dir string) error {
	s, err := store.Open(store.Config{Dir: dir, Fault: func(step store.Step) error {
		if step == store.StepIndexLocked {
			fmt.Println("locked")
			_, err := io.Copy(io.Discard, os.Stdin)
			return err
		}
		return nil
	}})
	if err != nil {
		return err
	}
	return s.Tag("held", manifest())
}

// childPin pins and holds all images, and waits to be killed.
func childPin(dir string) error {
	s, err := store.Open(store.Config{Dir: dir})
	if err != nil {
		return err
	}
	pins, err := store.OpenPins(store.PinsConfig{Dir: pinsDir(dir)})
	if err != nil {
		return err
	}
	tags, err := s.Tags()
	if err != nil {
		return err
	}
	for _, d := range tags {
		if _, err := pins.Hold(d.Digest); err != nil {
			return err
		}
		if err := pins.Pin(d.Digest, "user", "by a child"); err != nil {
			return err
		}
	}
	fmt.Println("pinned")
	select {}
}

// childCollect collects everything that is not pinned, once or until it is told to end, and
// kills itself at a step.
func childCollect(dir string) error {
	passed := 0
	s, err := store.Open(store.Config{Dir: dir, Fault: func(step store.Step) error {
		if string(step) == os.Getenv(stepEnv) {
			if passed++; fmt.Sprint(passed) == os.Getenv(timesEnv) {
				return unix.Kill(os.Getpid(), unix.SIGKILL)
			}
		}
		return nil
	}})
	if err != nil {
		return err
	}
	pins, err := store.OpenPins(store.PinsConfig{Dir: pinsDir(dir)})
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	for {
		_, err := s.Collect(context.Background(), pins, store.CollectOptions{Want: store.All})
		if err != nil || os.Getenv(timesEnv) != "loop" || ctx.Err() != nil {
			return err
		}
	}
}

// faults returns a Config.Fault that calls at, and with named says that the file system
// has no files without a name.
func faults(named bool, at func(store.Step) error) func(store.Step) error {
	return func(step store.Step) error {
		if step == store.StepBlobTemp && named {
			return unix.EOPNOTSUPP
		}
		return at(step)
	}
}

var (
	manifestData = []byte(`{"this":"stands for an image manifest"}`)
	chunkData    = storetest.Data(99, 50_000)
)

// manifest is the descriptor of manifestData.
func manifest() format.Descriptor {
	return format.Descriptor{
		MediaType: format.MediaTypeManifest,
		Digest:    format.DigestOf(manifestData),
		Size:      int64(len(manifestData)),
	}
}

// build puts a chunk and a manifest and tags it "new".
func build(s *store.Store) error {
	for _, data := range [][]byte{chunkData, manifestData} {
		if err := s.Put(data, format.Digest{}); err != nil {
			return err
		}
	}
	return s.Tag("new", manifest())
}

// create opens a new layout in a new directory.
func create(t *testing.T, cfg store.Config) *store.Store {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = filepath.Join(t.TempDir(), "layout")
	}
	cfg.Create = true
	return open(t, cfg)
}

func open(t *testing.T, cfg store.Config) *store.Store {
	t.Helper()
	s, err := store.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// put stores data and returns its digest.
func put(t *testing.T, s *store.Store, data []byte) format.Digest {
	t.Helper()
	d := format.DigestOf(data)
	if err := s.Put(data, d); err != nil {
		t.Fatal(err)
	}
	return d
}

// blobFile returns the path of a blob.
func blobFile(s *store.Store, d format.Digest) string {
	return filepath.Join(s.Dir(), "blobs", "sha256", d.Hex())
}

// tagNames returns the tags of a layout in order.
func tagNames(t *testing.T, s *store.Store) []string {
	t.Helper()
	tags, err := s.Tags()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range tags {
		names = append(names, d.Annotations[format.AnnotationRefName])
	}
	return names
}

// checkTree fails the test if the layout holds other files than it should, such as
// temporary ones.
func checkTree(t *testing.T, dir string) {
	t.Helper()
	var strange []string
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		switch {
		case rel == "." || rel == "oci-layout" || rel == "index.json" || rel == "blobs" || rel == "blobs/sha256":
		case strings.HasPrefix(rel, "blobs/sha256/") && len(e.Name()) == 64:
		default:
			strange = append(strange, rel)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string(nil), strange); diff != "" {
		t.Errorf("%s has files that do not belong there (+):\n%s", dir, diff)
	}
}

// copyLayout copies the layout and index of a reference image, without blobs.
func copyLayout(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", "layouts", name))); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}
