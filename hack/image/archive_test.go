package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"log"
	"maps"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"golang.org/x/sys/unix"
)

var architectures = []string{"amd64", "arm64"}

// The archive is in order, says nothing about who made it, and holds what its index names.
func TestArchive(t *testing.T) {
	archive, dir := builtArchive(t)
	f := must(os.Open(archive))(t)
	defer f.Close()
	var names []string
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Gname != "" || h.ModTime.Unix() != testEpoch {
			t.Errorf("%s: owner %d (%s), group %d (%s), time %s", h.Name, h.Uid, h.Uname, h.Gid, h.Gname, h.ModTime)
		}
		if digest, ok := strings.CutPrefix(h.Name, "blobs/sha256/"); ok && digest != "" {
			if sum, _, err := v1.SHA256(tr); err != nil || sum.Hex != digest {
				t.Errorf("%s: its digest is %s, error %v", h.Name, sum, err)
			}
		}
	}
	if !slices.IsSorted(names) {
		t.Errorf("not sorted: %q", names)
	}
	for _, want := range []string{"oci-layout", "index.json", "manifest.json"} {
		if !slices.Contains(names, want) {
			t.Errorf("no %s in %q", want, names)
		}
	}
	// Index; manifest, config and layer of two images; manifest and document of two bills of
	// materials, and the empty config of both.
	if blobs := must(os.ReadDir(filepath.Join(dir, "blobs", "sha256")))(t); len(blobs) != 12 {
		t.Errorf("%d blobs, want 12", len(blobs))
	}
	top := must(layout.ImageIndexFromPath(dir))(t)
	want := map[string]string{"io.containerd.image.name": testName, "org.opencontainers.image.ref.name": testVersion}
	if diff := cmp.Diff(want, must(top.IndexManifest())(t).Manifests[0].Annotations); diff != "" {
		t.Errorf("name (-want +got):\n%s", diff)
	}
	if got := must(os.Stat(archive))(t).Mode(); got != 0o644 {
		t.Errorf("mode of the archive %s", got)
	}
	left := must(filepath.Glob(filepath.Join(filepath.Dir(archive), ".*")))(t)
	if len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestIndex(t *testing.T) {
	m := must(builtIndex(t).IndexManifest())(t)
	if m.MediaType != types.OCIImageIndex {
		t.Errorf("media type %s", m.MediaType)
	}
	if diff := cmp.Diff(wantLabels(), m.Annotations); diff != "" {
		t.Errorf("annotations (-want +got):\n%s", diff)
	}
	var got []string
	for _, d := range m.Manifests {
		got = append(got, d.Platform.String()+" "+d.ArtifactType)
	}
	want := []string{"linux/amd64 ", "linux/arm64 ", "unknown/unknown " + sbomType, "unknown/unknown " + sbomType}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("manifests (-want +got):\n%s", diff)
	}
}

func wantLabels() map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":         "csi-puzzlefs",
		"org.opencontainers.image.description":   "PuzzleFS images for Kubernetes: CSI node driver, builder and command-line tool",
		"org.opencontainers.image.source":        "https://github.com/csi-puzzlefs/csi-puzzlefs",
		"org.opencontainers.image.documentation": "https://github.com/csi-puzzlefs/csi-puzzlefs/tree/main/docs",
		"org.opencontainers.image.version":       testVersion,
		"org.opencontainers.image.revision":      testRevision,
		"org.opencontainers.image.licenses":      "Apache-2.0",
		"org.opencontainers.image.created":       "2023-11-14T22:13:20Z",
	}
}

func TestImage(t *testing.T) {
	for _, arch := range architectures {
		t.Run(arch, func(t *testing.T) {
			im, _ := builtImage(t, arch)
			if err := validate.Image(im); err != nil {
				t.Error(err)
			}
			config := must(im.ConfigFile())(t)
			if config.OS != "linux" || config.Architecture != arch || config.Created.Unix() != testEpoch {
				t.Errorf("%s/%s of %s", config.OS, config.Architecture, config.Created)
			}
			want := v1.Config{
				Entrypoint: []string{"/csi-puzzlefs"}, Env: []string{"PATH=/"}, WorkingDir: "/", User: "0:0",
				StopSignal: "SIGTERM", Labels: wantLabels(),
			}
			if diff := cmp.Diff(want, config.Config); diff != "" {
				t.Errorf("config (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(wantLabels(), must(im.Manifest())(t).Annotations); diff != "" {
				t.Errorf("annotations (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLayer(t *testing.T) {
	for _, arch := range architectures {
		t.Run(arch, func(t *testing.T) {
			im, _ := builtImage(t, arch)
			headers, contents := layerFiles(t, im)
			got := make(map[string]string)
			for _, h := range headers {
				if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || !h.ModTime.Equal(time.Unix(testEpoch, 0)) {
					t.Errorf("%s: owner %d:%d %s, time %s", h.Name, h.Uid, h.Gid, h.Uname, h.ModTime)
				}
				if !strings.HasPrefix(h.Name, "licenses/") {
					got[h.Name] = h.FileInfo().Mode().String()
				}
			}
			want := map[string]string{
				"csi-puzzlefs": "-rwxr-xr-x",
				"etc/":         "drwxr-xr-x", "etc/group": "-rw-r--r--", "etc/passwd": "-rw-r--r--",
				"etc/csi-puzzlefs/": "drwxr-xr-x", "etc/csi-puzzlefs/certs.d/": "drwxr-xr-x", "etc/csi-puzzlefs/keys/": "drwxr-xr-x",
				"tmp/": "dtrwxrwxrwx",
				"var/": "drwxr-xr-x", "var/lib/": "drwxr-xr-x", "var/lib/csi-puzzlefs/": "drwxr-xr-x",
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
			for name, text := range map[string]string{
				"licenses/go/LICENSE": "The Go Authors",
				"licenses/github.com/csi-puzzlefs/csi-puzzlefs/LICENSE": "Apache License",
				"licenses/google.golang.org/grpc/LICENSE":               "Apache License",
				"licenses/google.golang.org/grpc/NOTICE.txt":            "gRPC authors",
				"licenses/github.com/hanwen/go-fuse/v2/LICENSE":         "Redistribution and use",
			} {
				if !strings.Contains(string(contents[name]), text) {
					t.Errorf("%s does not say %q", name, text)
				}
			}
		})
	}
}

// The bill of materials names exactly what go list says is linked, in the versions of go.mod. It is
// carried by the index, refers to its image, and lies beside the archive.
func TestBillOfMaterials(t *testing.T) {
	archive, _ := builtArchive(t)
	index := builtIndex(t)
	for _, arch := range architectures {
		t.Run(arch, func(t *testing.T) {
			document := must(os.ReadFile(filepath.Join(filepath.Dir(archive), "csi-puzzlefs-sbom-"+arch+".json")))(t)
			var bom cdx.BOM
			if err := cdx.NewBOMDecoder(bytes.NewReader(document), cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
				t.Fatal(err)
			}
			if self := bom.Metadata.Component; bom.SpecVersion != cdx.SpecVersion1_6 || self.Version != "v"+testVersion {
				t.Errorf("specification %s, program's version %s", bom.SpecVersion, self.Version)
			}
			got := make(map[string]bool)
			for _, c := range *bom.Components {
				got[c.Name+" "+c.Version] = true
				if !strings.HasPrefix(c.PackageURL, "pkg:golang/") || !strings.HasSuffix(c.PackageURL, "@"+c.Version) {
					t.Errorf("%s %s: package URL %s", c.Name, c.Version, c.PackageURL)
				}
			}
			want := linkedModules(t, arch)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("components (-want +got):\n%s", diff)
			}
			im, desc := builtImage(t, arch)
			_, files := layerFiles(t, im)
			if sum, _, _ := v1.SHA256(bytes.NewReader(files["csi-puzzlefs"])); (*bom.Metadata.Component.Hashes)[0].Value != sum.Hex {
				t.Errorf("it is about another program")
			}
			carried := 0
			for _, d := range must(index.IndexManifest())(t).Manifests {
				if d.ArtifactType != sbomType {
					continue
				}
				artifact := must(index.Image(d.Digest))(t)
				m := must(artifact.Manifest())(t)
				if m.Subject == nil || m.Subject.Digest != desc.Digest {
					continue
				}
				carried++
				if m.ArtifactType != sbomType || m.Config.MediaType != emptyType || m.Subject.Size != desc.Size {
					t.Errorf("manifest %+v", m)
				}
				rc := must(must(artifact.Layers())(t)[0].Compressed())(t)
				if got := must(io.ReadAll(rc))(t); !bytes.Equal(got, document) {
					t.Error("the index carries another document than the one beside the archive")
				}
			}
			if carried != 1 {
				t.Errorf("%d manifests of the index refer to the image, want 1", carried)
			}
		})
	}
}

// linkedModules asks the Go tool what is linked into the program.
func linkedModules(t *testing.T, arch string) map[string]bool {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}{{end}}{{end}}", mainPackage)
	cmd.Dir = sourceDir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	modules := make(map[string]bool)
	for line := range strings.Lines(string(must(cmd.Output())(t))) {
		if line = strings.TrimSpace(line); line != "" {
			modules[line] = true
		}
	}
	cmd = exec.Command("go", "env", "GOVERSION")
	cmd.Dir = sourceDir
	modules["stdlib "+strings.TrimPrefix(strings.TrimSpace(string(must(cmd.Output())(t))), "go")] = true
	for _, path := range []string{"google.golang.org/grpc", "golang.org/x/crypto/x509roots/fallback"} {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(modules)), func(m string) bool { return strings.HasPrefix(m, path+" ") }) {
			t.Fatalf("go list does not name %s", path)
		}
	}
	return modules
}

// docker load reads manifest.json.
func TestDockerArchive(t *testing.T) {
	archive, _ := builtArchive(t)
	tag := must(name.NewTag(testName))(t)
	im, err := tarball.ImageFromPath(archive, &tag)
	if err != nil {
		t.Fatal(err)
	}
	want, _ := builtImage(t, "amd64")
	if got, want := must(im.ConfigName())(t), must(want.ConfigName())(t); got != want {
		t.Errorf("image %s, want %s", got, want)
	}
	if err := validate.Image(im); err != nil {
		t.Error(err)
	}
}

// The same source gives the same bytes whatever the directory, the user's settings and the time,
// and what is pushed is what is in the archive.
func TestReproducible(t *testing.T) {
	archive, _ := builtArchive(t)
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	for _, part := range []string{"go.mod", "go.sum", "LICENSE", "cmd", "internal", "pkg"} {
		copyTree(t, filepath.Join(sourceDir, part), filepath.Join(elsewhere, part))
	}
	srv := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	target := strings.TrimPrefix(srv.URL, "http://") + "/team/csi-puzzlefs:1"
	t.Setenv("TZ", "Asia/Tokyo")
	t.Setenv("GOFLAGS", "-mod=mod -buildvcs=true")
	t.Setenv("GOAMD64", "v3")
	t.Setenv("LC_ALL", "tr_TR.UTF-8")
	defer unix.Umask(unix.Umask(0o077))
	again := filepath.Join(t.TempDir(), "again.tar")
	if err := build(elsewhere, again, "-push", target); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(must(os.ReadFile(archive))(t), must(os.ReadFile(again))(t)) {
		t.Error("the archives differ")
	}
	for _, arch := range architectures {
		sbom := "csi-puzzlefs-sbom-" + arch + ".json"
		a, b := filepath.Join(filepath.Dir(archive), sbom), filepath.Join(filepath.Dir(again), sbom)
		if !bytes.Equal(must(os.ReadFile(a))(t), must(os.ReadFile(b))(t)) {
			t.Errorf("%s differs", sbom)
		}
	}

	ref := must(name.ParseReference(target))(t)
	pushed := must(remote.Index(ref))(t)
	if got, want := must(pushed.Digest())(t), must(builtIndex(t).Digest())(t); got != want {
		t.Errorf("pushed %s, want %s", got, want)
	}
	// The bills of materials, as the registry sees them: in the order of the images in the index.
	manifests := must(pushed.IndexManifest())(t).Manifests
	for i, im := range manifests[:len(architectures)] {
		referrers := must(remote.Referrers(ref.Context().Digest(im.Digest.String())))(t)
		m := must(referrers.IndexManifest())(t)
		if len(m.Manifests) != 1 || m.Manifests[0].Digest != manifests[len(architectures)+i].Digest {
			t.Errorf("the registry lists as referrers of the image for %s: %+v", im.Platform, m.Manifests)
		}
	}
}

// What the environment says of how to compile counts for no architecture.
func TestEnvironment(t *testing.T) {
	for name, value := range map[string]string{
		"GOFIPS140": "latest", "GOAMD64": "v3", "GOARM64": "v9.0", "GOARM": "5", "GORISCV64": "rva23u64", "GOPPC64": "power10",
		"GO386": "softfloat", "GOMIPS": "softfloat", "GOMIPS64": "softfloat", "GOEXPERIMENT": "jsonv2", "GOFLAGS": "-race", "CGO_ENABLED": "1",
	} {
		t.Setenv(name, value)
		s := &source{dir: sourceDir}
		got := must(s.goTool(t.Context(), v1.Platform{OS: "linux", Architecture: "riscv64"}, "env", name))(t)
		if strings.TrimSpace(string(got)) == value {
			t.Errorf("%s=%s has an effect", name, value)
		}
	}
}

func copyTree(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(name string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		if d.IsDir() {
			return os.MkdirAll(target, 0o755)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		return os.WriteFile(target, b, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// What the Containerfile copies is what the layer has, and it says the same about it.
func TestContainerfile(t *testing.T) {
	im, _ := builtImage(t, "amd64")
	headers, contents := layerFiles(t, im)
	dir := filepath.Join(t.TempDir(), "rootfs")
	if err := build(sourceDir, "", "-rootfs", dir, "-platform", "linux/amd64"); err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		file := filepath.Join(dir, h.Name)
		if got, want := must(os.Lstat(file))(t).Mode(), h.FileInfo().Mode(); got != want {
			t.Errorf("%s: mode %s, want %s", h.Name, got, want)
		}
		if h.Typeflag == tar.TypeReg && !bytes.Equal(must(os.ReadFile(file))(t), contents[h.Name]) {
			t.Errorf("%s differs", h.Name)
		}
	}
	containerfile := string(must(os.ReadFile(filepath.Join(sourceDir, "Containerfile")))(t))
	version := strings.TrimSpace(string(must(os.ReadFile(filepath.Join(sourceDir, versionFile)))(t)))
	wants := []string{
		"ARG VERSION=" + version + "\n", "ENV PATH=/\n", "WORKDIR /\n", "USER 0:0\n", "STOPSIGNAL SIGTERM\n",
		"ENTRYPOINT [\"/csi-puzzlefs\"]\n", `image.version="$VERSION"`, `image.revision="$REVISION"`,
	}
	for key, value := range wantLabels() {
		if value != testVersion && value != testRevision && key != annotationCreated {
			wants = append(wants, key+`="`+value+`"`)
		}
	}
	for _, want := range wants {
		if !strings.Contains(containerfile, want) {
			t.Errorf("the Containerfile does not say %q", want)
		}
	}
}
