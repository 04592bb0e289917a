package vm_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/vm/internal/job"
)

// program is where hack/test-vm.sh puts the csi-puzzlefs that is tested.
const program = "/bin/csi-puzzlefs"

func TestMain(m *testing.M) {
	if os.Getenv(job.EnvRequire) != "1" {
		fmt.Fprintln(os.Stderr, "these tests run in a virtual machine that has fs-verity: make test-vm")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// plainDir returns a directory on a file system without fs-verity.
func plainDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(os.Getenv(job.EnvPlain), "")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// run runs a command of the program that is to succeed, and returns what it prints.
func run(t *testing.T, args ...string) string {
	t.Helper()
	stdout, stderr, err := try(t, args...)
	if err != nil {
		t.Fatalf("csi-puzzlefs %s: %v\n%s", strings.Join(args, " "), err, stderr)
	}
	return stdout
}

// refused runs a command that is to fail with exit code 1 and to say all of texts.
func refused(t *testing.T, args []string, texts ...string) {
	t.Helper()
	_, stderr, err := try(t, args...)
	expectRefused(t, strings.Join(args, " "), stderr, err, texts...)
}

func expectRefused(t *testing.T, what, stderr string, err error, texts ...string) {
	t.Helper()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("%s: %v, want exit code 1\n%s", what, err, stderr)
		return
	}
	for _, text := range texts {
		if !strings.Contains(stderr, text) {
			t.Errorf("%s does not say %q:\n%s", what, text, stderr)
		}
	}
}

// try runs a command of the program.
func try(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command(program, args...) // not with the context of t, which ends before its cleanups
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// sample is a directory tree and an image of it.
type sample struct {
	tree   string
	layout string
	ref    string        // LAYOUT:TAG
	digest verity.Digest // as build printed it
	oci    string        // hex
}

var printed = regexp.MustCompile(`^puzzlefs image manifest digest: ([0-9a-f]{64})\noci image manifest digest: sha256:([0-9a-f]{64})\n`)

// build makes a tree and builds it into a layout below dir.
func build(t *testing.T, dir string, flags ...string) *sample {
	t.Helper()
	s := &sample{tree: filepath.Join(dir, "tree"), layout: filepath.Join(dir, "layout")}
	s.ref = s.layout + ":v1"
	must(t, os.MkdirAll(filepath.Join(s.tree, "sub"), 0o755))
	random := rand.New(rand.NewPCG(1, 2))
	large := make([]byte, 1<<20)
	for i := range large {
		large[i] = byte(random.Uint32())
	}
	for name, content := range map[string][]byte{
		"empty": nil, "greeting": []byte("hello\n"), "large": large, "sub/text": bytes.Repeat([]byte("puzzle pieces\n"), 20_000),
	} {
		must(t, os.WriteFile(filepath.Join(s.tree, name), content, 0o644))
	}
	s.rebuild(t, flags...)
	return s
}

// rebuild builds the tree again and notes what build prints.
func (s *sample) rebuild(t *testing.T, flags ...string) {
	t.Helper()
	out := run(t, append([]string{"build", s.tree, s.ref}, flags...)...)
	m := printed.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("build prints %q", out)
	}
	var err error
	s.digest, err = verity.Parse(m[1])
	must(t, err)
	s.oci = m[2]
}

// enable seals the image.
func (s *sample) enable(t *testing.T) {
	t.Helper()
	run(t, "enable-fs-verity", s.ref, s.digest.String())
}

// blobs returns the paths of all blobs of the layout.
func (s *sample) blobs(t *testing.T) []string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(s.layout, "blobs", "sha256", "*"))
	must(t, err)
	if len(list) < 4 {
		t.Fatalf("%d blobs in %s", len(list), s.layout)
	}
	return list
}

// blobOf returns the path of a blob that a part of the file name is stored in, of an image that was
// built without compression.
func (s *sample) blobOf(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(s.tree, name))
	must(t, err)
	for _, path := range s.blobs(t) {
		b, err := os.ReadFile(path)
		must(t, err)
		if len(b) >= 16<<10 && bytes.Contains(content, b) {
			return path
		}
	}
	t.Fatalf("no blob holds a part of %s", name)
	return ""
}

// expectTree fails if the files below dir are not those of the sample's tree.
func (s *sample) expectTree(t *testing.T, dir string) {
	t.Helper()
	files := 0
	must(t, filepath.WalkDir(s.tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(s.tree, path)
		must(t, err)
		want, err := os.ReadFile(path)
		must(t, err)
		got, err := os.ReadFile(filepath.Join(dir, rel))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s in the image: %d bytes, %v; want %d bytes", rel, len(got), err, len(want))
		}
		files++
		return nil
	}))
	if files == 0 {
		t.Error("the tree has no files")
	}
}

// measure returns the kernel's fs-verity digest of a file.
func measure(t *testing.T, path string) (verity.Digest, error) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	return verity.Measure(f)
}
