package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"golang.org/x/sys/unix"
)

const treeName = "registry.example.com/tools:1"

// sampleTree makes a tree with all that an image of one can have.
func sampleTree(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	for name, mode := range map[string]os.FileMode{"bin": 0o755, "tmp": 0o777 | os.ModeSticky, "empty": 0o700, "a-b": 0o755, "a": 0o755} {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(name, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range map[string]os.FileMode{"bin/tool": 0o755, "bin/su": 0o755 | os.ModeSetuid, "a/file": 0o640, "a-b/ключ": 0o644} {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte("content of "+filepath.Base(name)), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{"bin/sh": "tool", "sbin": "bin", "dangling": "/not/there"} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "a/file"), filepath.Join(dir, "a/same")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// buildTree makes an archive of a tree.
func buildTree(t *testing.T, dir, out string, flags ...string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if err := run(t.Context(), append([]string{"-tree", dir, "-o", out}, flags...), &stdout, &stderr); err != nil {
		t.Fatalf("%v; stderr: %s", err, stderr.String())
	}
	return stdout.String()
}

// treeFromArchive returns the image in the archive of a tree, as the first name leads to it.
func treeFromArchive(t *testing.T, archive string) v1.Image {
	t.Helper()
	dir := t.TempDir()
	if err := unpack(archive, dir); err != nil {
		t.Fatal(err)
	}
	top := must(layout.ImageIndexFromPath(dir))(t)
	return must(top.Image(must(top.IndexManifest())(t).Manifests[0].Digest))(t)
}

func TestTree(t *testing.T) {
	archive := filepath.Join(t.TempDir(), "dist", "tools.tar")
	said := buildTree(t, sampleTree(t), archive, "-name", "tools,"+treeName, "-entrypoint", "/bin/tool,-v", "-cmd", "a,b",
		"-user", "65532:65532", "-env", "A=1,B=x=y")
	im := treeFromArchive(t, archive)
	if err := validate.Image(im); err != nil {
		t.Error(err)
	}
	digest := must(im.Digest())(t)
	want := fmt.Sprintf("%[1]s: docker.io/library/tools:latest@%[2]s\n%[1]s: %[3]s@%[2]s\n", archive, digest, treeName)
	if diff := cmp.Diff(want, said); diff != "" {
		t.Errorf("printed (-want +got):\n%s", diff)
	}
	config := must(im.ConfigFile())(t)
	if config.OS != "linux" || config.Architecture != runtime.GOARCH || config.Created.Unix() != testEpoch {
		t.Errorf("%s/%s of %s", config.OS, config.Architecture, config.Created)
	}
	wantConfig := v1.Config{
		Entrypoint: []string{"/bin/tool", "-v"}, Cmd: []string{"a", "b"}, User: "65532:65532", WorkingDir: "/",
		Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "A=1", "B=x=y"},
	}
	if diff := cmp.Diff(wantConfig, config.Config); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}

	headers, contents := layerFiles(t, im)
	var got []string
	for _, h := range headers {
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Gname != "" || !h.ModTime.Equal(time.Unix(testEpoch, 0)) {
			t.Errorf("%s: owner %d:%d %s, time %s", h.Name, h.Uid, h.Gid, h.Uname, h.ModTime)
		}
		got = append(got, fmt.Sprintf("%c %04o %s %s%s", h.Typeflag, h.Mode, h.Name, h.Linkname, contents[h.Name]))
	}
	wantFiles := []string{
		"5 0755 a/ ",
		"5 0755 a-b/ ",
		"0 0644 a-b/ключ content of ключ",
		"0 0640 a/file content of file",
		"0 0640 a/same content of file",
		"5 0755 bin/ ",
		"2 0777 bin/sh tool",
		"0 4755 bin/su content of su",
		"0 0755 bin/tool content of tool",
		"2 0777 dangling /not/there",
		"5 0700 empty/ ",
		"2 0777 sbin bin",
		"5 1777 tmp/ ",
	}
	if diff := cmp.Diff(wantFiles, got); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

// Readers of both forms find the image under each of its names.
func TestTreeNames(t *testing.T) {
	archive := filepath.Join(t.TempDir(), "tools.tar")
	buildTree(t, sampleTree(t), archive, "-name", "busybox:9,"+treeName)
	dir := t.TempDir()
	if err := unpack(archive, dir); err != nil {
		t.Fatal(err)
	}
	top := must(layout.ImageIndexFromPath(dir))(t)
	digest := must(treeFromArchive(t, archive).Digest())(t)
	var got []map[string]string
	for _, d := range must(top.IndexManifest())(t).Manifests {
		if d.Digest != digest || !d.Platform.Equals(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}) || d.ArtifactType != "" {
			t.Errorf("entry %+v", d)
		}
		got = append(got, d.Annotations)
	}
	want := []map[string]string{
		{"io.containerd.image.name": "docker.io/library/busybox:9", "org.opencontainers.image.ref.name": "9"},
		{"io.containerd.image.name": treeName, "org.opencontainers.image.ref.name": "1"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	for _, n := range []string{"docker.io/library/busybox:9", treeName} {
		tag := must(name.NewTag(n))(t)
		im := must(tarball.ImageFromPath(archive, &tag))(t)
		if got, want := must(im.ConfigName())(t), must(treeFromArchive(t, archive).ConfigName())(t); got != want {
			t.Errorf("%s: image %s, want %s", n, got, want)
		}
	}
}

// Equal trees give equal bytes, whatever their place, their times, the umask, and the order in which
// they were made.
func TestTreeReproducible(t *testing.T) {
	a, b := sampleTree(t), sampleTree(t)
	past := time.Unix(1_000_000, 0)
	if err := os.Chtimes(filepath.Join(b, "bin/tool"), past, past); err != nil {
		t.Fatal(err)
	}
	first, second := filepath.Join(t.TempDir(), "a.tar"), filepath.Join(t.TempDir(), "b.tar")
	buildTree(t, a, first, "-name", treeName)
	defer unix.Umask(unix.Umask(0o077))
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(b, link); err != nil {
		t.Fatal(err)
	}
	buildTree(t, link, second, "-name", treeName)
	if !bytes.Equal(must(os.ReadFile(first))(t), must(os.ReadFile(second))(t)) {
		t.Error("the archives differ")
	}
}

// Owners other than who makes the image stay.
func TestTreeOwners(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("giving files to others takes root")
	}
	dir := sampleTree(t)
	for _, n := range []string{"a/file", "empty", "dangling"} {
		if err := os.Lchown(filepath.Join(dir, n), 65532, 0); err != nil {
			t.Fatal(err)
		}
	}
	archive := filepath.Join(t.TempDir(), "x.tar")
	buildTree(t, dir, archive, "-name", treeName)
	headers, _ := layerFiles(t, treeFromArchive(t, archive))
	got := make(map[string]int)
	for _, h := range headers {
		if h.Gid != 0 {
			t.Errorf("%s: group %d", h.Name, h.Gid)
		}
		if h.Uid != 0 {
			got[h.Name] = h.Uid
		}
	}
	want := map[string]int{"a/file": 65532, "a/same": 65532, "empty/": 65532, "dangling": 65532}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("owners (-want +got):\n%s", diff)
	}
}

func TestTreeUsage(t *testing.T) {
	tree := sampleTree(t)
	odd := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(odd, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(tree, "a", "file")
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"no name", []string{"-tree", tree, "-o", "OUT"}, "-tree needs a -name"},
		{"no archive", []string{"-tree", tree, "-name", treeName}, "-tree needs -o"},
		{"empty", []string{"-tree", "", "-name", treeName, "-o", "OUT"}, "-tree is empty"},
		{"source", []string{"-tree", tree, "-name", treeName, "-o", "OUT", "-source", sourceDir}, "-source is for the image of csi-puzzlefs"},
		{"push", []string{"-tree", tree, "-name", treeName, "-o", "OUT", "-push", treeName}, "-push is for the image of csi-puzzlefs"},
		{"platforms", []string{"-tree", tree, "-name", treeName, "-o", "OUT", "-platform", "linux/amd64,linux/arm64"}, "for one platform"},
		{"bad name", []string{"-tree", tree, "-name", treeName + ",UPPER", "-o", "OUT"}, "-name"},
		{"digest as name", []string{"-tree", tree, "-name", "tools@sha256:" + strings.Repeat("0", 64), "-o", "OUT"}, "-name"},
		{"same name", []string{"-tree", tree, "-name", "tools,tools:latest", "-o", "OUT"}, "given twice"},
		{"bad variable", []string{"-tree", tree, "-name", treeName, "-o", "OUT", "-env", "A"}, "want NAME=VALUE"},
		{"no tree", []string{"-tree", filepath.Join(tree, "x"), "-name", treeName, "-o", "OUT"}, "no such file"},
		{"file", []string{"-tree", file, "-name", treeName, "-o", "OUT"}, "not a directory"},
		{"nothing in it", []string{"-tree", t.TempDir(), "-name", treeName, "-o", "OUT"}, "it is empty"},
		{"pipe", []string{"-tree", odd, "-name", treeName, "-o", "OUT"}, "fifo is a named pipe"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "dist", "x.tar")
			args := make([]string, len(tt.args))
			for i, a := range tt.args {
				args[i] = strings.ReplaceAll(a, "OUT", out)
			}
			err := run(t.Context(), args, io.Discard, io.Discard)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one about %q", err, tt.want)
			}
			if _, err := os.Stat(filepath.Dir(out)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("left behind: %v", err)
			}
		})
	}
}

// A file that the tar format gives a long record is the same after it.
func TestTreeLongNames(t *testing.T) {
	dir := t.TempDir()
	long := strings.Repeat("n", 200) + "/" + strings.Repeat("é", 120)
	if err := os.Mkdir(filepath.Join(dir, filepath.Dir(long)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(strings.Repeat("t", 300), filepath.Join(dir, long)); err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "x.tar")
	buildTree(t, dir, archive, "-name", treeName)
	headers, _ := layerFiles(t, treeFromArchive(t, archive))
	if h := headers[len(headers)-1]; h.Typeflag != tar.TypeSymlink || h.Name != long || h.Linkname != strings.Repeat("t", 300) {
		t.Errorf("last entry: %+v", h)
	}
}
