package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
)

const (
	sourceDir    = "../.."
	testVersion  = "9.8.7-test"
	testRevision = "0123456789abcdef0123456789abcdef01234567"
	testName     = "registry.example.com/csi-puzzlefs:" + testVersion
	testEpoch    = 1_700_000_000
)

// tempDir lives as long as all tests do.
var tempDir string

func TestMain(m *testing.M) {
	var err error
	if tempDir, err = os.MkdirTemp("", "csi-puzzlefs-image-test-*"); err == nil {
		err = os.Setenv("SOURCE_DATE_EPOCH", fmt.Sprint(testEpoch))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(tempDir)
	os.Exit(code)
}

// buildOnce builds the archive that most tests look at, and unpacks it.
var buildOnce = sync.OnceValue(func() error {
	if err := build(sourceDir, filepath.Join(tempDir, "out", "image.tar")); err != nil {
		return err
	}
	return unpack(filepath.Join(tempDir, "out", "image.tar"), filepath.Join(tempDir, "layout"))
})

// build runs the program for a source tree, with what the tests expect of it.
func build(source, out string, flags ...string) error {
	var stdout, stderr bytes.Buffer
	args := append([]string{"-source", source, "-o", out, "-version", testVersion, "-revision", testRevision}, flags...)
	if err := run(context.Background(), args, &stdout, &stderr); err != nil {
		return fmt.Errorf("%w; stderr: %s", err, stderr.String())
	}
	return nil
}

// unpack unpacks the regular files of an archive.
func unpack(archive, dir string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		name := filepath.Join(dir, h.Name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			return err
		}
		if err := os.WriteFile(name, b, 0o644); err != nil {
			return err
		}
	}
}

// builtArchive returns the archive, and the directory that it is unpacked to.
func builtArchive(t *testing.T) (archive, layoutDir string) {
	t.Helper()
	if err := buildOnce(); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(tempDir, "out", "image.tar"), filepath.Join(tempDir, "layout")
}

// builtIndex returns the index of all platforms.
func builtIndex(t *testing.T) v1.ImageIndex {
	t.Helper()
	_, dir := builtArchive(t)
	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m := must(top.IndexManifest())(t)
	if len(m.Manifests) != 1 {
		t.Fatalf("index.json has %d entries, want 1", len(m.Manifests))
	}
	return must(top.ImageIndex(m.Manifests[0].Digest))(t)
}

// builtImage returns the image of one architecture and its descriptor.
func builtImage(t *testing.T, arch string) (v1.Image, v1.Descriptor) {
	t.Helper()
	index := builtIndex(t)
	for _, d := range must(index.IndexManifest())(t).Manifests {
		if d.Platform.Architecture == arch {
			return must(index.Image(d.Digest))(t), d
		}
	}
	t.Fatalf("no image for %s", arch)
	return nil, v1.Descriptor{}
}

// layerFiles returns the headers and contents of an image's one layer.
func layerFiles(t *testing.T, im v1.Image) ([]*tar.Header, map[string][]byte) {
	t.Helper()
	layers := must(im.Layers())(t)
	if len(layers) != 1 {
		t.Fatalf("%d layers, want 1", len(layers))
	}
	rc := must(layers[0].Uncompressed())(t)
	defer rc.Close()
	var headers []*tar.Header
	contents := make(map[string][]byte)
	for tr := tar.NewReader(rc); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return headers, contents
		}
		if err != nil {
			t.Fatal(err)
		}
		headers = append(headers, h)
		contents[h.Name] = must(io.ReadAll(tr))(t)
	}
}

// must returns a function that ends a test for an error, and returns the value otherwise.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestUsage(t *testing.T) {
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"argument", []string{"linux/amd64"}, "no arguments"},
		{"not a source tree", []string{"-source", t.TempDir()}, "-source must name the directory of the module"},
		{"platform of another system", []string{"-source", sourceDir, "-platform", "windows/amd64"}, "want linux/ARCH"},
		{"platform with a variant", []string{"-source", sourceDir, "-platform", "linux/arm/v7"}, "want linux/ARCH"},
		{"platform that there is not", []string{"-source", sourceDir, "-platform", "linux/abacus"}, "linux/abacus"},
		{"bad name", []string{"-source", sourceDir, "-name", "UPPER/case:1"}, "-name"},
		{"version that is no tag", []string{"-source", sourceDir, "-version", "1+1"}, "-name"},
		{"bad target", []string{"-source", sourceDir, "-push", "UPPER/case:1"}, "-push"},
		{"name twice", []string{"-source", sourceDir, "-name", "registry.example.com/a:1,registry.example.com/a:1"}, "given twice"},
		{"entrypoint without a tree", []string{"-source", sourceDir, "-entrypoint", "/x"}, "-entrypoint is for -tree"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "dist", "x.tar")
			err := run(t.Context(), append([]string{"-o", out}, tt.args...), io.Discard, io.Discard)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one about %q", err, tt.want)
			}
			if _, err := os.Stat(filepath.Dir(out)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("left behind: %v", err)
			}
		})
	}
	t.Run("bad time", func(t *testing.T) {
		t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
		err := run(t.Context(), []string{"-source", sourceDir, "-revision", "x"}, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), "want seconds since 1970") {
			t.Errorf("error %v", err)
		}
	})
}

// Without flags the version is that of the source tree, and so is the time.
func TestSource(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "")
	dir := t.TempDir()
	write := func(name, content string) {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(versionFile, "1.2.3\n")
	open := func() source {
		t.Helper()
		s := must(openSource(t.Context(), dir, "", ""))(t)
		return *s
	}
	check := func(what string, want source) {
		t.Helper()
		want.dir = dir
		if diff := cmp.Diff(want, open(), cmp.AllowUnexported(source{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	check("no checkout", source{version: "1.2.3", created: time.Unix(0, 0).UTC()})

	s := source{dir: dir}
	t.Setenv("GIT_COMMITTER_DATE", "2024-05-06T07:08:09Z")
	for _, args := range [][]string{
		{"init", "-q"},
		{"add", "."},
		{"-c", "user.name=x", "-c", "user.email=x@example.com", "commit", "-q", "-m", "x"},
	} {
		must(s.git(t.Context(), args...))(t)
	}
	commit := must(s.git(t.Context(), "rev-parse", "HEAD"))(t)
	created := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	check("checkout", source{version: "1.2.3", revision: commit, created: created})
	write("new", "")
	check("changed", source{version: "1.2.3", revision: commit + "-dirty", created: created})
}
