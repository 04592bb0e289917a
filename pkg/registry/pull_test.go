package registry_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

func TestRoundTrip(t *testing.T) {
	hk, addr := serve(t, memory())
	im := newImage(t, 40)
	c := newClient(t, nil)
	ref := mustParse(t, addr+"/team/app:1")

	var last registry.Progress
	got, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{Progress: func(p registry.Progress) { last = p }})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(im.desc, got); diff != "" {
		t.Errorf("pushed descriptor (-want +got):\n%s", diff)
	}
	n := len(im.m.Blobs())
	if last.DoneBlobs != n || last.TotalBlobs != n || last.DoneBytes != last.TotalBytes || last.ReusedBlobs != 0 || last.MovedBytes != last.TotalBytes {
		t.Errorf("progress of the push: %+v, want all of %d blobs", last, n)
	}

	// Pushing again sends the manifest only.
	hk.set(nil)
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	if posts, puts := hk.count("POST "), hk.count("PUT "); posts != 0 || puts != 1 {
		t.Errorf("the second push made %d POST and %d PUT requests, want 0 and 1", posts, puts)
	}

	desc, b, err := c.Resolve(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if desc.Digest != im.desc.Digest || format.DigestOf(b) != im.desc.Digest {
		t.Errorf("resolved %s, want %s", desc.Digest, im.desc.Digest)
	}

	hk.set(nil)
	dst := newStore(t)
	got, err = c.Pull(t.Context(), ref, dst, registry.PullOptions{Progress: func(p registry.Progress) { last = p }})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(im.desc, got); diff != "" {
		t.Errorf("pulled descriptor (-want +got):\n%s", diff)
	}
	im.checkWhole(t, dst)
	if last.DoneBlobs != n || last.DoneBytes != last.TotalBytes || last.ReusedBlobs != 0 {
		t.Errorf("progress of the pull: %+v, want all of %d blobs", last, n)
	}
	// The configuration is in its descriptor; each other blob is fetched once.
	if gets := hk.count("GET ", "/blobs/"); gets != n-1 {
		t.Errorf("%d blobs were fetched, want %d", gets, n-1)
	}

	// Pulling again fetches the manifest only.
	hk.set(nil)
	if _, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{Progress: func(p registry.Progress) { last = p }}); err != nil {
		t.Fatal(err)
	}
	if gets := hk.count("GET ", "/blobs/"); gets != 0 {
		t.Errorf("the second pull fetched %d blobs", gets)
	}
	if last.ReusedBlobs != n || last.MovedBytes != 0 {
		t.Errorf("progress of the second pull: %+v, want everything reused", last)
	}
}

func TestPullRepairsDestination(t *testing.T) {
	hk, addr := serve(t, memory())
	im := newImage(t, 5)
	ref := mustPush(t, im, addr, "app")
	c := newClient(t, nil)
	dst := newStore(t)
	if _, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	layers := im.m.Layers
	for _, torn := range []format.Digest{layers[0].Digest, layers[2].Digest} {
		if err := os.Truncate(filepath.Join(dst.Dir(), "blobs/sha256", torn.Hex()), 100); err != nil {
			t.Fatal(err)
		}
	}
	hk.set(nil)
	if _, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	im.checkWhole(t, dst)
	if gets := hk.count("GET ", "/blobs/"); gets != 2 {
		t.Errorf("%d blobs were fetched, want the 2 torn ones", gets)
	}
}

// Crate 0.2.0 wrote the size before compression into descriptors.
func TestPullWrongDescriptorSizes(t *testing.T) {
	hk, addr := serve(t, memory())
	im := newImage(t, 5)
	for i := range im.m.Layers {
		im.m.Layers[i].Size = im.m.Layers[i].Size*2 + 100
	}
	im.seal(t)
	ref := mustPush(t, im, addr, "app")
	c := newClient(t, nil)
	dst := newStore(t)
	for range 2 {
		hk.set(nil)
		var last registry.Progress
		if _, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{Progress: func(p registry.Progress) { last = p }}); err != nil {
			t.Fatal(err)
		}
		im.checkWhole(t, dst)
		if last.DoneBytes != last.TotalBytes {
			t.Errorf("progress ends at %d of %d bytes", last.DoneBytes, last.TotalBytes)
		}
	}
	if gets := hk.count("GET ", "/blobs/"); gets != 0 {
		t.Errorf("the second pull fetched %d blobs", gets)
	}
}

// A chunk may be larger than its descriptor says within a bound; more is not read.
func TestPullMoreThanDescribed(t *testing.T) {
	_, addr := serve(t, memory())
	im := newImage(t, 2)
	im.m.Layers[3].Size = 1
	im.seal(t)
	c := newClient(t, nil)
	dst := newStore(t)
	if _, err := c.Pull(t.Context(), mustPush(t, im, addr, "small"), dst, registry.PullOptions{}); err != nil {
		t.Error(err)
	}
	im.m.Layers[2].Size = 1 // the large one
	im.seal(t)
	_, err := c.Pull(t.Context(), mustPush(t, im, addr, "large"), newStore(t), registry.PullOptions{})
	wantError(t, err, []error{format.ErrTooLarge, registry.ErrUnexpectedAnswer}, im.m.Layers[2].Digest.String(), "the manifest says 1")
}

func TestPullProgressIsSerialised(t *testing.T) {
	_, addr := serve(t, memory())
	im := newImage(t, 60)
	ref := mustPush(t, im, addr, "app")
	var mu sync.Mutex
	calls, before := 0, registry.Progress{}
	_, err := newClient(t, nil).Pull(t.Context(), ref, newStore(t), registry.PullOptions{Progress: func(p registry.Progress) {
		if !mu.TryLock() {
			t.Error("two calls at a time")
			return
		}
		defer mu.Unlock()
		calls++
		if p.DoneBlobs < before.DoneBlobs || p.DoneBytes < before.DoneBytes {
			t.Errorf("progress went back from %+v to %+v", before, p)
		}
		before = p
	}})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(im.m.Blobs()); calls < n+1 {
		t.Errorf("%d calls, want at least one for each of %d blobs and the first", calls, n)
	}
}

func TestRefusesOtherKinds(t *testing.T) {
	hex := strings.Repeat("1", 64)
	tests := []struct {
		name, mediaType, body string
		kind                  error
		words                 []string
	}{
		{
			"index", format.MediaTypeIndex, `{"schemaVersion":2,"mediaType":"` + format.MediaTypeIndex + `","manifests":[]}`,
			format.ErrNotPuzzleFS,
			[]string{"an image index"},
		}, {
			"docker list", "application/vnd.docker.distribution.manifest.list.v2+json", `{"schemaVersion":2,"manifests":[]}`,
			format.ErrNotPuzzleFS,
			[]string{"an image index"},
		}, {
			"docker image", "application/vnd.docker.distribution.manifest.v2+json",
			`{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{},"layers":[{"digest":"sha256:` + hex + `"}]}`,
			format.ErrNotPuzzleFS,
			[]string{"a Docker container image", "csi-puzzlefs build"},
		}, {
			"OCI image", format.MediaTypeManifest,
			`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json"},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:` + hex + `"}]}`,
			format.ErrNotPuzzleFS,
			[]string{"an OCI container image"},
		}, {
			"Helm chart", format.MediaTypeManifest,
			`{"schemaVersion":2,"config":{"mediaType":"application/vnd.cncf.helm.config.v1+json"},"layers":[{"mediaType":"application/vnd.cncf.helm.chart.content.v1.tar+gzip"}]}`,
			format.ErrNotPuzzleFS,
			[]string{"application/vnd.cncf.helm.config.v1+json"},
		}, {
			"artifact", format.MediaTypeManifest,
			`{"schemaVersion":2,"artifactType":"application/x\u001b[31mred","config":{"mediaType":"` + format.MediaTypeEmpty + `"},"layers":[{"mediaType":"a/b"}]}`,
			format.ErrNotPuzzleFS,
			[]string{"an OCI artifact of type"},
		}, {
			"broken", format.MediaTypeManifest, `{"schemaVersion":2,"layers":`, format.ErrCorrupt, nil,
		}, {
			"rootfs with SHA-512", format.MediaTypeManifest,
			`{"schemaVersion":2,"config":{"mediaType":"` + format.MediaTypeEmpty + `","digest":"sha512:00","size":2},"layers":[{"mediaType":"` + format.MediaTypeRootfs + `","digest":"sha512:00","size":2}]}`,
			format.ErrCorrupt, nil,
		}, {
			"text", "text/plain", `hello`, registry.ErrUnexpectedAnswer, []string{"no manifest"},
		}, {
			"nothing", "", ``, registry.ErrUnexpectedAnswer, []string{"no manifest"},
		}, {
			"web page", "text/html; charset=utf-8", `<html>log in</html>`, registry.ErrUnexpectedAnswer, []string{"web page", "login page"},
		}, {
			"web page that says it is JSON", "application/json", "\n<!DOCTYPE html><html>", registry.ErrUnexpectedAnswer, []string{"web page"},
		}, {
			"huge rootfs", format.MediaTypeManifest,
			`{"schemaVersion":2,"config":{"mediaType":"` + format.MediaTypeEmpty + `","digest":"sha256:` + hex + `","size":2},"layers":[{"mediaType":"` + format.MediaTypeRootfs + `","digest":"sha256:` + hex + `","size":99999999999}]}`,
			format.ErrTooLarge,
			[]string{"99999999999"},
		},
	}
	hk, addr := serve(t, memory())
	c := newClient(t, nil)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			hk.set(func(w http.ResponseWriter, _ *http.Request) bool {
				w.Header()["Content-Type"] = []string{tt.mediaType}
				fmt.Fprint(w, tt.body)
				return true
			})
			dst := newStore(t)
			_, err := c.Pull(t.Context(), mustParse(t, addr+"/app:1"), dst, registry.PullOptions{})
			wantError(t, err, []error{tt.kind}, append(tt.words, "pull "+addr+"/app:1: ")...)
			for d, err := range dst.Blobs() {
				t.Errorf("blob %s was stored, %v", d, err)
			}
		})
	}
}

func TestPullFullDestination(t *testing.T) {
	_, addr := serve(t, memory())
	im := newImage(t, 20)
	ref := mustPush(t, im, addr, "app")
	full := fmt.Errorf("no space left on device")
	dst, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "l"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	_, err = newClient(t, nil).Pull(t.Context(), ref, failing{dst, full}, registry.PullOptions{})
	wantError(t, err, []error{full}, "pull "+ref.String(), "no space left")
	checkTidy(t, dst)

	// Only what does not fit into memory fails.
	_, err = newClient(t, nil).Pull(t.Context(), ref, failingLarge{dst, full}, registry.PullOptions{})
	wantError(t, err, []error{full}, "pull "+ref.String(), "no space left")
	checkTidy(t, dst)
}

// failingLarge has room for small blobs only.
type failingLarge struct {
	*store.Store
	err error
}

func (f failingLarge) PutReader(context.Context, format.Digest, int64, io.Reader) error { return f.err }

// failing is a destination whose disk is full.
type failing struct {
	*store.Store
	err error
}

func (f failing) Put([]byte, format.Digest) error { return f.err }

// A large blob is checked while it is stored: one flipped byte, and it is fetched again.
func TestPullLargeBlobOfWrongBytes(t *testing.T) {
	im := newImage(t, 1)
	big := im.m.Layers[2].Digest
	for name, times := range map[string]int32{"once": 1, "always": 1000} {
		t.Run(name, func(t *testing.T) {
			hk, addr := serve(t, memory())
			ref := mustPush(t, im, addr, "app")
			var n atomic.Int32
			hk.set(func(w http.ResponseWriter, r *http.Request) bool {
				if !isBlobGet(r) || digestOf(t, r) != big || n.Add(1) > times {
					return false
				}
				b := im.blob(t, big)
				b[len(b)/2] ^= 1
				w.Header().Set("Content-Length", fmt.Sprint(len(b)))
				_, _ = w.Write(b)
				return true
			})
			dst := newStore(t)
			_, err := newClient(t, nil).Pull(t.Context(), ref, dst, registry.PullOptions{})
			if name == "always" {
				wantError(t, err, []error{registry.ErrDigestMismatch}, big.String(), "with another digest", "after 4 attempts")
				checkTidy(t, dst)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			im.checkWhole(t, dst)
		})
	}
}

// The metadata of an image is its manifest and its rootfs, and nothing else is asked for.
func TestPullMetadata(t *testing.T) {
	hk, addr := serve(t, memory())
	im := newImage(t, 5)
	ref := mustPush(t, im, addr, "app:v1")
	hk.set(nil)
	dst := newStore(t)
	c := newClient(t, nil)
	desc, err := c.PullMetadata(t.Context(), ref, dst)
	if err != nil {
		t.Fatal(err)
	}
	rootfs, err := im.m.Rootfs()
	if err != nil {
		t.Fatal(err)
	}
	if desc.Digest != im.desc.Digest {
		t.Errorf("%s, want %s", desc.Digest, im.desc.Digest)
	}
	n := 0
	for d, err := range dst.Blobs() {
		if n++; err != nil || d != im.desc.Digest && d != rootfs.Digest {
			t.Errorf("blob %s: %v", d, err)
		}
	}
	if gets := hk.count("GET", "/blobs/"); n != 2 || gets != 1 {
		t.Errorf("%d blobs, %d were asked for; want 2 and 1", n, gets)
	}
	if _, err := c.PullMetadata(t.Context(), ref, dst); err != nil || hk.count("GET", "/blobs/") != 1 {
		t.Errorf("again: %v, %d blobs asked for", err, hk.count("GET", "/blobs/"))
	}
	hk.set(answer(isBlobGet, 200, nil, "something else"))
	_, err = c.PullMetadata(t.Context(), ref, newStore(t))
	wantError(t, err, []error{registry.ErrDigestMismatch}, "pull metadata of "+ref.String(), rootfs.Digest.String())
	_, err = c.PullMetadata(t.Context(), mustParse(t, addr+"/app:none"), newStore(t))
	wantError(t, err, []error{registry.ErrNotFound})
}
