package driver_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// waitFor waits until ok is true.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 30 s for %s", what)
		}
	}
}

// insist publishes again and again, as kubelet does, while the answer is not final.
func (n *testNode) insist(req *csi.NodePublishVolumeRequest) error {
	for {
		_, err := n.NodePublishVolume(context.Background(), req)
		switch status.Code(err) {
		case codes.Aborted, codes.ResourceExhausted, codes.Unavailable:
			time.Sleep(5 * time.Millisecond)
		default:
			return err
		}
	}
}

// state opens the node's state directory as the store commands do.
func (n *testNode) state() *driver.State {
	n.t.Helper()
	s, err := driver.OpenState(n.cfg.StateDir)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { s.Close() })
	return s
}

// stored returns the images in the store, least recently used first, and how many bytes there are.
func (n *testNode) stored() (images []format.Digest, bytes int64) {
	n.t.Helper()
	v, list, err := n.state().Survey(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	for _, im := range list {
		images = append(images, im.Image)
	}
	return images, v.Bytes
}

// pinned returns the digests of pinned images, each as often as it is.
func (n *testNode) pinned() []format.Digest {
	n.t.Helper()
	pins, err := store.OpenPins(store.PinsConfig{Dir: filepath.Join(n.cfg.StateDir, "pins")})
	if err != nil {
		n.t.Fatal(err)
	}
	list, err := pins.List()
	if err != nil {
		n.t.Fatal(err)
	}
	var images []format.Digest
	for _, p := range list {
		images = append(images, p.Image)
	}
	return images
}

// TestQuota: what is mounted stays, and a pull that does not fit says why; what was unpublished
// makes room, least recently used first.
func TestQuota(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	images := map[string]*testImage{}
	refs := map[string]string{}
	for _, name := range []string{"a", "b", "c"} { // of about 700 KiB
		images[name] = makeImage(t, name, 10)
		refs[name] = reg.push(t, images[name], "team/"+name, "1")
	}
	n.cfg.StoreQuota = 1600 << 10 // two of them
	n.start()
	req := func(name string) *csi.NodePublishVolumeRequest {
		return n.request(name, refs[name], images[name].digest.String())
	}
	a, b, c := req("a"), req("b"), req("c")
	n.publish(a)
	n.publish(b)
	n.refused(c, codes.ResourceExhausted, "team/c", "quota of 1.6 MiB", "in use", "mounted and pinned", "raise --store-quota", "store ls")
	if got := reg.requests(); slices.ContainsFunc(got, func(r string) bool { return strings.Contains(r, "team/c/blobs/") }) {
		t.Errorf("fetched what does not fit: %v", got)
	}
	n.unpublish(b)
	if err := n.insist(c); err != nil {
		t.Fatal(err)
	}
	if list, bytes := n.stored(); !slices.Equal(list, []format.Digest{images["a"].digest, images["c"].digest}) || bytes > n.cfg.StoreQuota {
		t.Errorf("the store has %v in %d bytes, want a and c in less than the quota", list, bytes)
	}
	n.shows(a.TargetPath, images["a"]) // for the first time
	n.shows(c.TargetPath, images["c"])
	if _, err := os.Stat(filepath.Join(n.cfg.StateDir, "images", images["b"].digest.Hex()+".json")); !os.IsNotExist(err) {
		t.Errorf("the record of the evicted image: %v, want it gone", err)
	}
	n.unpublish(c)
	n.unpublish(a)
	// c was unpublished before a.
	if err := n.insist(b); err != nil {
		t.Fatal(err)
	}
	if list, _ := n.stored(); !slices.Equal(list, []format.Digest{images["a"].digest, images["b"].digest}) {
		t.Errorf("the store has %v, want a and b", list)
	}
	n.shows(b.TargetPath, images["b"])
	n.unpublish(b)
	n.nothingLeft()
}

// TestQuotaSmallerThanImage: nothing is evicted for what cannot fit.
func TestQuotaSmallerThanImage(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	small, large := makeImage(t, "small", 2), makeImage(t, "large", 30)
	smallRef, largeRef := reg.push(t, small, "small", "1"), reg.push(t, large, "large", "1")
	n.cfg.StoreQuota = 1 << 20
	n.start()
	req := n.request("a", smallRef, small.digest.String())
	n.publish(req)
	n.unpublish(req)
	n.refused(n.request("b", largeRef, large.digest.String()), codes.ResourceExhausted, "up to 1.9 MiB", "--store-quota")
	if list, _ := n.stored(); !slices.Equal(list, []format.Digest{small.digest}) {
		t.Errorf("the store has %v, want the small image", list)
	}
	n.nothingLeft()
}

func TestReserve(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 2)
	ref := reg.push(t, im, "app", "1")
	n.cfg.StoreReserve = driver.Reserve{Percent: 100}
	n.start()
	n.refused(n.request("a", ref, im.digest.String()), codes.ResourceExhausted, "free", "lower --store-reserve")
	n.stop()
	n.cfg.StoreReserve = driver.Reserve{}
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	n.unpublish(req)
	n.stop()
	// Others have filled the disk.
	n.cfg.StoreReserve = driver.Reserve{Percent: 100}
	n.start()
	waitFor(t, "the image to go", func() bool { list, _ := n.stored(); return len(list) == 0 })
}

// TestSizesThatLie: an image that is larger than its manifest says does not exceed the quota.
func TestSizesThatLie(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 30)
	m, err := format.ParseManifest(im.manifest)
	if err != nil {
		t.Fatal(err)
	}
	for i := range m.Layers {
		if m.Layers[i].MediaType == format.MediaTypeChunk {
			m.Layers[i].Size = 1
		}
	}
	if im.manifest, err = m.Encode(); err != nil {
		t.Fatal(err)
	}
	im.digest = format.DigestOf(im.manifest)
	ref := reg.push(t, im, "app", "1")
	n.cfg.StoreQuota = 1 << 20
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.refused(req, codes.ResourceExhausted, "larger than its manifest says", "--store-quota")
	if _, bytes := n.stored(); bytes > n.cfg.StoreQuota {
		t.Errorf("the store has %d bytes, the quota is %d", bytes, n.cfg.StoreQuota)
	}
	n.stop()
	n.cfg.StoreQuota = 4 << 20
	n.start()
	n.publish(req)
	n.shows(req.TargetPath, im)
	n.unpublish(req)
	n.nothingLeft()
}

// TestDiskFull: a disk that somebody else fills during a pull costs images that nobody uses, and
// the pull ends well.
func TestDiskFull(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	old, im := makeImage(t, "old", 20), makeImage(t, "new", 10)
	oldRef, ref := reg.push(t, old, "old", "1"), reg.push(t, im, "new", "1")
	if err := os.Mkdir(n.cfg.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", n.cfg.StateDir, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		n.stop()
		if err := unix.Unmount(n.cfg.StateDir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	n.start()
	req := n.request("a", oldRef, old.digest.String())
	n.publish(req)
	n.unpublish(req)
	n.nothingPinned()

	release := make(chan struct{})
	reg.set(func(r *testRegistry) {
		r.stalled = release
		r.hold = map[format.Digest]bool{im.chunks[0]: true}
	})
	req = n.request("b", ref, im.digest.String())
	result := make(chan error)
	go func() {
		_, err := n.NodePublishVolume(context.Background(), req)
		result <- err
	}()
	// All but one are there: if a chunk came while the disk is being filled, what is filling it would take the
	// room that is made.
	waitFor(t, "the pull to wait", func() bool {
		return !slices.ContainsFunc(im.chunks[1:], func(d format.Digest) bool {
			_, err := os.Stat(filepath.Join(n.cfg.StateDir, "store/blobs/sha256", d.Hex()))
			return err != nil
		})
	})
	filler := make([]byte, 16<<20)
	if err := os.WriteFile(filepath.Join(n.cfg.StateDir, "filler"), filler, 0o600); err == nil {
		t.Fatal("the disk is not full")
	}
	close(release)
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	n.shows(req.TargetPath, im)
	if list, _ := n.stored(); !slices.Equal(list, []format.Digest{im.digest}) {
		t.Errorf("the store has %v, want the new image", list)
	}
	n.unpublish(req)
}

// TestPinsFollowMounts: an image is pinned while it is mounted, over a restart and a kill, and
// no longer.
func TestPinsFollowMounts(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 2)
	ref := reg.push(t, im, "app", "1")
	only := []format.Digest{im.digest}
	n.startProcess("")
	n.waitReady()
	a, b := n.request("a", ref, im.digest.String()), n.request("b", ref, im.digest.String())
	n.publish(a)
	n.publish(b)
	if got := n.pinned(); !slices.Equal(got, only) {
		t.Errorf("pinned are %v, want the image once", got)
	}
	n.kill()
	if got := n.pinned(); !slices.Equal(got, only) {
		t.Errorf("after a kill pinned are %v, want the image once", got)
	}
	if c, err := n.state().Collect(t.Context(), driver.CollectOptions{All: true}); err != nil || c.Blobs > 0 {
		t.Errorf("collected %+v, %v; want nothing gone", c, err)
	}
	reg.set(func(r *testRegistry) { r.down = true })
	n.start()
	if got := n.pinned(); !slices.Equal(got, only) {
		t.Errorf("after a restart pinned are %v, want the image once", got)
	}
	n.shows(a.TargetPath, im)
	n.unpublish(a)
	n.shows(b.TargetPath, im)
	// A process that has a file open reads on after the volume is gone.
	f, err := os.Open(filepath.Join(b.TargetPath, "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n.unpublish(b)
	if c, err := n.state().Collect(t.Context(), driver.CollectOptions{All: true}); err != nil || c.Blobs > 0 {
		t.Errorf("with an open file collected %+v, %v; want nothing gone", c, err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	n.nothingPinned()
	if c, err := n.state().Collect(t.Context(), driver.CollectOptions{All: true}); err != nil || len(c.Evicted) != 1 || c.Left != 0 {
		t.Errorf("collected %+v, %v; want everything gone", c, err)
	}
	n.nothingLeft()
}

// TestEvictedByCommand: a running driver notices what a command evicted, and forgets with it who
// could see the image.
func TestEvictedByCommand(t *testing.T) {
	reg, n, im, req := newPublished(t, 2)
	ref := req.VolumeContext["image"]
	n.unpublish(req)
	n.nothingPinned()
	s := n.state()
	c, err := s.Collect(t.Context(), driver.CollectOptions{All: true})
	if err != nil || len(c.Evicted) != 1 {
		t.Fatalf("collected %+v, %v", c, err)
	}
	// Meanwhile the image has become private.
	reg.set(func(r *testRegistry) { r.password = "secret" })
	n.refused(req, codes.Unauthenticated)
	withSecret := n.request("b", ref, im.digest.String())
	withSecret.Secrets = map[string]string{".dockerconfigjson": fmt.Sprintf(`{"auths":{%q:{"username":"user","password":"secret"}}}`, reg.host)}
	n.publish(withSecret)
	n.shows(withSecret.TargetPath, im)
	n.refused(req, codes.Unauthenticated)
	_, images, err := s.Survey(t.Context())
	if err != nil || len(images) != 1 || !images[0].Recorded || len(images[0].Repositories) != 0 {
		t.Errorf("survey: %+v, %v; want the image, private", images, err)
	}
	n.unpublish(withSecret)
	n.nothingLeft()
}

// TestStoreUnderPressure: many pods of more images than the quota has room for come and go, while
// another process collects without end. A mounted image shows its content, always.
func TestStoreUnderPressure(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	const images, workers, rounds = 5, 6, 12
	var ims []*testImage
	var refs []string
	for i := range images {
		im := makeImage(t, fmt.Sprint("image ", i), 3+i)
		ims, refs = append(ims, im), append(refs, reg.push(t, im, fmt.Sprint("app", i), "1"))
	}
	n.cfg.StoreQuota = 1200 << 10 // three of them, or so
	n.start()
	collector := n.startCollector()
	var published atomic.Int32
	var wg sync.WaitGroup
	for w := range workers {
		random := rand.New(rand.NewPCG(uint64(w), 0))
		wg.Go(func() {
			for round := range rounds {
				i := random.IntN(images)
				req := n.request(fmt.Sprintf("w%d-%d", w, round), refs[i], ims[i].digest.String())
				if err := n.insist(req); err != nil {
					t.Errorf("publish: %v", err)
					return
				}
				n.shows(req.TargetPath, ims[i])
				n.unpublish(req)
				published.Add(1)
			}
		})
	}
	wg.Wait()
	if published.Load() != workers*rounds {
		t.Errorf("%d volumes were published, want %d", published.Load(), workers*rounds)
	}
	if err := collector.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := collector.Wait(); err != nil {
		t.Errorf("the other process: %v", err)
	}
	if _, bytes := n.stored(); bytes > n.cfg.StoreQuota {
		t.Errorf("the store has %d bytes, the quota is %d", bytes, n.cfg.StoreQuota)
	}
	n.nothingLeft()
}

// startCollector starts a process that collects all it can, until it gets SIGTERM.
func (n *testNode) startCollector() *exec.Cmd {
	n.t.Helper()
	text, err := json.Marshal(childConfig{StateDir: n.cfg.StateDir, Collect: true})
	if err != nil {
		n.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.CommandContext(n.t.Context(), self, "-test.run=^$")
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	return cmd
}

// runCollector is the main function of that process.
func runCollector(ctx context.Context, dir string) error {
	s, err := driver.OpenState(dir)
	if err != nil {
		return err
	}
	defer s.Close()
	for ctx.Err() == nil {
		if _, err := s.Collect(context.Background(), driver.CollectOptions{All: true}); err != nil {
			return err
		}
	}
	return nil
}

func TestParseReserve(t *testing.T) {
	tests := []struct {
		text string
		want driver.Reserve
		bad  bool
	}{
		{"5Gi", driver.Reserve{Bytes: 5 << 30}, false},
		{"500M", driver.Reserve{Bytes: 500_000_000}, false},
		{"0", driver.Reserve{}, false},
		{"10%", driver.Reserve{Percent: 10}, false},
		{"2.5%", driver.Reserve{Percent: 2.5}, false},
		{"", driver.Reserve{}, true},
		{"%", driver.Reserve{}, true},
		{"-1", driver.Reserve{}, true},
		{"-1%", driver.Reserve{}, true},
		{"101%", driver.Reserve{}, true},
		{"NaN%", driver.Reserve{}, true},
		{"10 GB", driver.Reserve{}, true},
	}
	for _, test := range tests {
		got, err := driver.ParseReserve(test.text)
		if got != test.want || (err != nil) != test.bad {
			t.Errorf("ParseReserve(%q) = %+v, %v; want %+v", test.text, got, err, test.want)
		}
	}
}

// TestPullBesideRemoval: a collection that is removing blobs when a pull puts its manifest did not
// know that the pull needs some of them; the pull does not rely on those.
func TestPullBesideRemoval(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 5)
	ref := reg.push(t, im, "app", "1")
	removing, obtained := make(chan struct{}), make(chan struct{})
	collected := make(chan error, 1)
	collect := func() {
		var first sync.Once
		layout, err := store.Open(store.Config{Dir: filepath.Join(n.cfg.StateDir, "store"), Fault: func(step store.Step) error {
			if step == store.StepCollectRemoved {
				first.Do(func() {
					close(removing)
					select {
					case <-obtained:
					case <-time.After(time.Second): // the pull waits for us
					}
				})
			}
			return nil
		}})
		if err != nil {
			collected <- err
			return
		}
		defer layout.Close()
		pins, err := store.OpenPins(store.PinsConfig{Dir: filepath.Join(n.cfg.StateDir, "pins")})
		if err == nil {
			_, err = layout.Collect(context.Background(), pins, store.CollectOptions{Want: store.All})
		}
		collected <- err
	}
	n.cfg.Fault = func(step string) error {
		switch step {
		case driver.StepPullHeld:
			go collect()
			<-removing
		case driver.StepPullStored:
			close(obtained)
			if err := <-collected; err != nil {
				t.Error(err)
			}
		}
		return nil
	}
	n.start()
	// What a pull left that failed.
	layout, err := store.Open(store.Config{Dir: filepath.Join(n.cfg.StateDir, "store")})
	if err != nil {
		t.Fatal(err)
	}
	defer layout.Close()
	for _, d := range im.chunks {
		if err := layout.Put(im.blobs[d], d); err != nil {
			t.Fatal(err)
		}
	}
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	n.shows(req.TargetPath, im)
	n.unpublish(req)
	n.nothingLeft()
}

// TestLostManifestOnFullDisk: the manifest of a mounted image comes back though the disk has no
// room for anything; without it nothing could ever be evicted.
func TestLostManifestOnFullDisk(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, other := makeImage(t, "hello\n", 5), makeImage(t, "other\n", 5)
	ref, otherRef := reg.push(t, im, "app", "1"), reg.push(t, other, "other", "1")
	n.start()
	a := n.request("a", ref, im.digest.String())
	n.publish(a)
	n.stop()
	n.cfg.StoreReserve = driver.Reserve{Bytes: 1 << 50}
	n.start()
	if err := os.Remove(filepath.Join(n.dir, "state/store/blobs/sha256", im.digest.Hex())); err != nil {
		t.Fatal(err)
	}
	n.refused(n.request("b", otherRef, other.digest.String()), codes.ResourceExhausted, im.digest.String(), "publish a volume of the image")
	c := n.request("c", ref, im.digest.String())
	n.publish(c)
	n.shows(c.TargetPath, im)
	n.refused(n.request("b", otherRef, other.digest.String()), codes.ResourceExhausted, "--store-reserve")
	n.unpublish(c)
	n.unpublish(a)
	n.nothingLeft()
}
