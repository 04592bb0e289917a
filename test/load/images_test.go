package load_test

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/registrytest"
)

// The shape of each image: directories of files of random content, some of it in all images.
const (
	dirsPerImage = 20
	filesPerDir  = 20
	maxFile      = 64 << 10 // bytes
)

// image is an image in the registry.
type image struct {
	ref    string
	digest format.Digest
	bytes  int64 // of content
	files  []file
}

// file is what is known about a file of an image.
type file struct {
	path string
	sum  [sha256.Size]byte
}

// makeImages builds n images and pushes them to a registry that lives as long as the test.
func makeImages(t *testing.T, n int) []*image {
	t.Helper()
	addr, stop, err := registrytest.Start(registrytest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	client, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	layout, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "layout"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	images := make([]*image, n)
	for i := range images {
		im := &image{ref: fmt.Sprintf("%s/load/image-%d:v1", addr, i)}
		dir := t.TempDir()
		im.fill(t, dir, uint64(i))
		built, err := builder.Build(t.Context(), builder.Config{Dir: dir, Store: layout, Tag: fmt.Sprint(i)})
		if err != nil {
			t.Fatal(err)
		}
		ref, err := registry.ParseReference(im.ref)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.Push(t.Context(), layout, built.Manifest, ref, registry.PushOptions{}); err != nil {
			t.Fatal(err)
		}
		im.digest = built.Manifest.Digest
		images[i] = im
	}
	if err := layout.Close(); err != nil {
		t.Fatal(err)
	}
	client.CloseIdleConnections()
	return images
}

// fill makes the image's tree in dir. A quarter of the directories is in every image.
func (im *image) fill(t *testing.T, dir string, seed uint64) {
	t.Helper()
	for d := range dirsPerImage {
		rng := rand.New(rand.NewPCG(uint64(d), seed+1))
		if d%4 == 0 {
			rng = rand.New(rand.NewPCG(uint64(d), 0))
		}
		sub := fmt.Sprintf("dir-%02d", d)
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
		for f := range filesPerDir {
			content := make([]byte, rng.IntN(maxFile))
			for i := range content {
				content[i] = byte(rng.Uint32())
			}
			path := filepath.Join(sub, fmt.Sprintf("file-%02d", f))
			if err := os.WriteFile(filepath.Join(dir, path), content, 0o644); err != nil {
				t.Fatal(err)
			}
			im.files = append(im.files, file{path: path, sum: sha256.Sum256(content)})
			im.bytes += int64(len(content))
		}
	}
}

// compare reads some files of a volume and compares them with what the image was made of.
func (im *image) compare(dir string, rng *rand.Rand) error {
	for range filesRead {
		f := im.files[rng.IntN(len(im.files))]
		content, err := os.ReadFile(filepath.Join(dir, f.path))
		if err != nil {
			return err
		}
		if sha256.Sum256(content) != f.sum {
			return fmt.Errorf("%s has wrong content", filepath.Join(dir, f.path))
		}
	}
	return nil
}

// buildDriver builds the program.
func buildDriver(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "csi-puzzlefs")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./cmd/csi-puzzlefs")
	cmd.Dir = filepath.Join("..", "..") // the module that the program is in
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("build the driver: %v\n%s", err, out)
	}
	return program
}

// freeAddress returns an address of this machine where nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
