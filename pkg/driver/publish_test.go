package driver_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// TestPublishTwoPods is the ordinary life of two volumes of one image.
func TestPublishTwoPods(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 20)
	ref := reg.push(t, im, "team/app", "1.0")
	n.start()

	a := n.request("a", ref, im.digest.String())
	n.publish(a)
	n.shows(a.TargetPath, im)
	if to, err := os.Readlink(filepath.Join(a.TargetPath, "link")); err != nil || to != "dir" {
		t.Errorf("link leads to %q, %v", to, err)
	}
	if err := os.WriteFile(filepath.Join(a.TargetPath, "new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v, want EROFS", err)
	}
	first := reg.requests()
	if len(first) == 0 {
		t.Error("the image came from nowhere")
	}

	b := n.request("b", ref, im.digest.String())
	n.publish(b)
	n.shows(b.TargetPath, im)
	if second := reg.requests(); len(second) > 0 {
		t.Errorf("a second volume asked the registry: %v", second)
	}
	if shared, pods := n.mountsUnder("state"), n.mountsUnder("pods"); len(shared) != 1 || len(pods) != 2 {
		t.Errorf("mounts are %v and %v, want one shared by two", shared, pods)
	}
	stats, err := n.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: a.VolumeId, VolumePath: a.TargetPath})
	if err != nil {
		t.Fatal(err)
	}
	var bytes int64
	for _, content := range im.files {
		bytes += int64(len(content))
	}
	want := &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: bytes, Used: bytes},
		{Unit: csi.VolumeUsage_INODES, Total: 8, Used: 8},
	}}
	if !proto.Equal(stats, want) {
		t.Errorf("stats are %v, want %v", stats, want)
	}
	for _, req := range []*csi.NodeGetVolumeStatsRequest{
		{VolumeId: a.VolumeId, VolumePath: b.TargetPath}, {VolumeId: "csi-other", VolumePath: a.TargetPath},
	} {
		if _, err := n.NodeGetVolumeStats(t.Context(), req); status.Code(err) != codes.NotFound {
			t.Errorf("stats of %v: %v, want NotFound", req, err)
		}
	}

	n.unpublish(a)
	n.shows(b.TargetPath, im)
	n.unpublish(b)
	n.unpublish(b)
	n.nothingLeft()
}

// TestPublishWithTheRegistryDown: what is on the node needs no registry, except with Always.
func TestPublishWithTheRegistryDown(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, other := makeImage(t, "hello\n", 2), makeImage(t, "other\n", 2)
	ref, otherRef := reg.push(t, im, "app", "1"), reg.push(t, other, "other", "1")
	n.start()
	a := n.request("a", ref, im.digest.String())
	n.publish(a)
	n.unpublish(a)
	n.stop()

	reg.set(func(r *testRegistry) { r.down = true })
	n.start()
	for _, digest := range []string{im.digest.String(), "verity:" + im.verity.String()} {
		for _, policy := range []string{"", "IfNotPresent", "Never"} {
			req := n.request("b", ref, digest)
			setAttributes(req, map[string]string{"pullPolicy": policy})
			n.publish(req)
			n.shows(req.TargetPath, im)
			n.unpublish(req)
		}
	}
	always := n.request("c", ref, im.digest.String())
	setAttributes(always, map[string]string{"pullPolicy": "Always"})
	n.refused(always, codes.Unavailable, reg.host)
	n.refused(n.request("d", otherRef, other.digest.String()), codes.Unavailable, reg.host)
	never := n.request("e", otherRef, other.digest.String())
	setAttributes(never, map[string]string{"pullPolicy": "Never"})
	n.refused(never, codes.NotFound, "IfNotPresent")
	n.nothingLeft()
}

// TestPublishOldDescriptors: PuzzleFS 0.2.0 wrote sizes before compression into its
// descriptors. Such an image is whole all the same, and needs the registry once.
func TestPublishOldDescriptors(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := loadImage(t, "../../testdata/images/v3-0.2.0", "small-zstd")
	ref := reg.push(t, im, "old", "1")
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	if entries, err := os.ReadDir(req.TargetPath); err != nil || len(entries) == 0 {
		t.Errorf("the volume has %d entries, %v", len(entries), err)
	}
	n.unpublish(req)
	reg.set(func(r *testRegistry) { r.down = true })
	n.publish(req)
	n.unpublish(req)
	n.nothingLeft()
}

func TestPublishDigests(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	old, now := makeImage(t, "old\n", 1), makeImage(t, "new\n", 1)
	reg.push(t, old, "app", "latest")
	ref := reg.push(t, now, "app", "latest")
	n.start()

	byDigest := n.request("a", ref, old.digest.String())
	n.publish(byDigest)
	n.shows(byDigest.TargetPath, old)
	byVerity := n.request("b", ref, "verity:"+now.verity.String())
	n.publish(byVerity)
	n.shows(byVerity.TargetPath, now)

	missing := format.DigestOf([]byte("missing")).String()
	n.refused(n.request("c", ref, missing), codes.NotFound, missing, now.digest.String())
	n.refused(n.request("d", ref, "verity:"+hexA), codes.DataLoss, hexA, now.verity.String())
	n.refused(n.request("e", ref, "verity:"+makeImage(t, "gone\n", 1).verity.String()), codes.DataLoss)
	n.refused(n.request("f", ref+"-no", "verity:"+hexA), codes.NotFound, "latest-no")
	n.refused(n.request("g", ref, now.digest.Hex()), codes.InvalidArgument, "sha256:", "verity:")
	bad := n.request("h", ref, now.digest.String())
	setAttributes(bad, map[string]string{"imagee": "x"})
	n.refused(bad, codes.InvalidArgument, "did you mean image?")

	n.unpublish(byDigest)
	n.unpublish(byVerity)
	n.nothingLeft()
}

// TestPublishTagWhereAllowed: without a digest the tag is asked for at each publish.
func TestPublishTagWhereAllowed(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	n.cfg.RequireDigest = false
	one, two := makeImage(t, "one\n", 1), makeImage(t, "two\n", 1)
	ref := reg.push(t, one, "app", "1")
	n.start()
	a, b := n.request("a", ref, ""), n.request("b", ref, "")
	n.publish(a)
	reg.push(t, two, "app", "1")
	n.publish(b)
	n.publish(a)
	n.shows(a.TargetPath, one)
	n.shows(b.TargetPath, two)
	n.unpublish(a)
	n.unpublish(b)
	n.nothingLeft()
}

func TestPublishIsIdempotent(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, other := makeImage(t, "hello\n", 2), makeImage(t, "other\n", 1)
	ref, otherRef := reg.push(t, im, "app", "1"), reg.push(t, other, "other", "1")
	n.start()
	req := n.request("a", ref, im.digest.String())
	for range 5 {
		n.publish(req)
	}
	if all := n.mounts(); len(all) != 2 {
		t.Errorf("mounts are %v, want the shared one and the target", all)
	}
	for name, change := range map[string]func(*csi.NodePublishVolumeRequest){
		"image":     func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["image"] = otherRef },
		"digest":    func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["digest"] = other.digest.String() },
		"subPath":   func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["subPath"] = "dir" },
		"volume id": func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "csi-other" },
		"flags":     func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = mountCapability("noexec") },
	} {
		changed := proto.CloneOf(req)
		change(changed)
		if _, err := n.NodePublishVolume(t.Context(), changed); status.Code(err) != codes.AlreadyExists {
			t.Errorf("other %s: got %v, want AlreadyExists", name, err)
		}
	}
	// What kubelet adds may change: it is not among the arguments.
	changed := proto.CloneOf(req)
	changed.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"] = "{}"
	n.publish(changed)
	n.shows(req.TargetPath, im)

	// Unpublishing another volume from this target leaves it alone.
	if _, err := n.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "csi-other", TargetPath: req.TargetPath}); err != nil {
		t.Error(err)
	}
	n.shows(req.TargetPath, im)
	n.unpublish(req)
	n.unpublish(req)
	n.nothingLeft()
}

// TestPublishAgainRepairs: a mount that vanished from under a volume is made again.
func TestPublishAgainRepairs(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 2)
	ref := reg.push(t, im, "app", "1")
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	reg.set(func(r *testRegistry) { r.down = true })
	shared := n.mountsUnder("state")[0]
	for name, damage := range map[string][]string{
		"target": {req.TargetPath}, "image": {shared}, "both": {req.TargetPath, shared}, "both, image first": {shared, req.TargetPath},
	} {
		for _, path := range damage {
			if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
		}
		n.publish(req)
		n.shows(req.TargetPath, im)
		if all := n.mounts(); len(all) != 2 {
			t.Errorf("%s: mounts are %v, want two", name, all)
		}
	}
	n.unpublish(req)
	n.nothingLeft()
}

func TestPublishSubPath(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.start()
	with := func(pod, subPath string) *csi.NodePublishVolumeRequest {
		req := n.request(pod, ref, im.digest.String())
		req.VolumeContext["subPath"] = subPath
		return req
	}
	good := with("a", "dir/sub")
	n.publish(good)
	if b, err := os.ReadFile(filepath.Join(good.TargetPath, "deep")); err != nil || string(b) != im.files["dir/sub/deep"] {
		t.Errorf("read dir/sub/deep: %q, %v", b, err)
	}
	n.publish(good)
	for subPath, code := range map[string]codes.Code{
		"missing": codes.NotFound, "dir/missing": codes.NotFound, "hello.txt": codes.InvalidArgument, "hello.txt/x": codes.InvalidArgument,
		"link": codes.InvalidArgument, "link/sub": codes.InvalidArgument, "dir/up": codes.InvalidArgument, "dir/up/dir": codes.InvalidArgument,
		"..": codes.InvalidArgument, "dir/../..": codes.InvalidArgument, "/etc": codes.InvalidArgument,
	} {
		n.refused(with("b", subPath), code, subPath)
	}
	n.unpublish(good)
	n.nothingLeft()
}

// TestPublishManyAtOnce: any number of pods of one image share one pull and one mount.
func TestPublishManyAtOnce(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	images := []*testImage{makeImage(t, "one\n", 30), makeImage(t, "two\n", 30)}
	refs := []string{reg.push(t, images[0], "one", "1"), reg.push(t, images[1], "two", "1")}
	n.start()
	const pods = 20
	reqs := make([]*csi.NodePublishVolumeRequest, pods)
	for i := range reqs {
		reqs[i] = n.request(fmt.Sprintf("pod%d", i), refs[i%2], images[i%2].digest.String())
	}
	var wg sync.WaitGroup
	for i := range pods {
		wg.Go(func() {
			if _, err := n.NodePublishVolume(t.Context(), reqs[i]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if shared, bound := n.mountsUnder("state"), n.mountsUnder("pods"); len(shared) != 2 || len(bound) != pods {
		t.Errorf("%d shared mounts, %d targets; want 2 and %d", len(shared), len(bound), pods)
	}
	seen := map[string]int{}
	for _, path := range reg.requests() {
		if seen[path]++; strings.Contains(path, "/blobs/") && seen[path] > 1 {
			t.Errorf("fetched %d times: %s", seen[path], path)
		}
	}
	// Half go while the other half comes again.
	for i := range pods {
		wg.Go(func() {
			var err error
			if i%2 == 0 {
				_, err = n.NodePublishVolume(t.Context(), reqs[i])
			} else {
				_, err = n.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: reqs[i].VolumeId, TargetPath: reqs[i].TargetPath})
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if shared, bound := n.mountsUnder("state"), n.mountsUnder("pods"); len(shared) != 1 || len(bound) != pods/2 {
		t.Errorf("%d shared mounts, %d targets; want 1 and %d", len(shared), len(bound), pods/2)
	}
	for i := 0; i < pods; i += 2 {
		n.shows(reqs[i].TargetPath, images[0])
		n.unpublish(reqs[i])
	}
	n.nothingLeft()
}

// TestPublishComesAndGoes: the last volume of an image leaving and a new one coming at the
// same time never leaves a volume without its mount.
func TestPublishComesAndGoes(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.start()
	var wg sync.WaitGroup
	for i := range 4 {
		req := n.request(fmt.Sprintf("pod%d", i), ref, im.digest.String())
		wg.Go(func() {
			for range 15 {
				if _, err := n.NodePublishVolume(t.Context(), req); err != nil {
					t.Error(err)
					return
				}
				if b, err := os.ReadFile(filepath.Join(req.TargetPath, "hello.txt")); err != nil || string(b) != "hello\n" {
					t.Errorf("read: %q, %v", b, err)
				}
				if _, err := n.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: req.VolumeId, TargetPath: req.TargetPath}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	n.nothingLeft()
}

// TestPublishWhilePulling: a call gives up before its deadline with the progress, others are
// told that one is at work, and the pull goes on without any of them.
func TestPublishWhilePulling(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 10)
	ref := reg.push(t, im, "team/app", "1")
	release := make(chan struct{})
	reg.set(func(r *testRegistry) {
		r.stalled = release
		r.hold = map[format.Digest]bool{im.chunks[0]: true}
	})
	n.start()
	req := n.request("a", ref, im.digest.String())
	short := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 600*time.Millisecond)
		defer cancel()
		_, err := n.NodePublishVolume(ctx, req)
		return err
	}
	// The first answer may come before all other chunks have; the progress rises.
	err := short()
	for status.Code(err) == codes.Aborted && !strings.Contains(err.Error(), "(13 of 14 blobs)") {
		err = short()
	}
	want := fmt.Sprintf("pulling %s/team/app@%v: 90%% of ", reg.host, im.digest)
	if status.Code(err) != codes.Aborted || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want Aborted and %q", err, want)
	}
	if all := n.mounts(); len(all) > 0 {
		t.Errorf("mounted meanwhile: %v", all)
	}
	// Long enough to wait for the end of the pull, which holds the volume's lock.
	result := make(chan error)
	go func() {
		_, err := n.NodePublishVolume(t.Context(), req)
		for err != nil && strings.Contains(err.Error(), "another call works on it") {
			_, err = n.NodePublishVolume(t.Context(), req)
		}
		result <- err
	}()
	for {
		time.Sleep(time.Millisecond)
		_, err := n.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: req.VolumeId, TargetPath: req.TargetPath})
		if status.Code(err) == codes.Aborted {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	close(release)
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	n.shows(req.TargetPath, im)
	seen := map[string]int{}
	for _, path := range reg.requests() {
		if seen[path]++; strings.Contains(path, "/blobs/") && seen[path] > 1 {
			t.Errorf("fetched %d times: %s", seen[path], path)
		}
	}
	n.unpublish(req)
	n.nothingLeft()
}

// TestPullGoesOnWhereItFailed: chunks that arrived before a failure are not fetched again.
func TestPullGoesOnWhereItFailed(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 5)
	ref := reg.push(t, im, "app", "1")
	release := make(chan struct{})
	defer close(release)
	reg.set(func(r *testRegistry) {
		r.stalled = release
		r.hold = map[format.Digest]bool{im.chunks[0]: true}
	})
	n.cfg.Registry.IdleTimeout = time.Second
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.refused(req, codes.Unavailable, reg.host)
	reg.requests()
	reg.set(func(r *testRegistry) { r.stalled = nil })
	n.publish(req)
	n.shows(req.TargetPath, im)
	for _, path := range reg.requests() {
		if _, hex, ok := strings.Cut(path, "/blobs/"); ok && hex != im.chunks[0].String() {
			t.Errorf("fetched again: %s", path)
		}
	}
	n.unpublish(req)
	n.nothingLeft()
}

// TestPublishCorruptStore: metadata that went bad on the node is fetched again, a bad chunk
// gives an error and never wrong bytes, until the next publish fetches it again.
func TestPublishCorruptStore(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 3)
	ref := reg.push(t, im, "app", "1")
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	n.unpublish(req)
	blob := func(d format.Digest) string { return filepath.Join(n.dir, "state/store/blobs/sha256", d.Hex()) }
	flip := func(d format.Digest) {
		b, err := os.ReadFile(blob(d))
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		if err := errors.Join(os.Chmod(blob(d), 0o644), os.WriteFile(blob(d), b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for name, damage := range map[string]func(){
		"manifest":      func() { flip(im.digest) },
		"rootfs":        func() { flip(im.rootfs) },
		"lost manifest": func() { os.Remove(blob(im.digest)) },
		"lost rootfs":   func() { os.Remove(blob(im.rootfs)) },
		"lost chunk":    func() { os.Remove(blob(im.chunks[1])) },
		"short chunk":   func() { os.Truncate(blob(im.chunks[1]), 100) },
	} {
		damage()
		n.publish(req)
		n.shows(req.TargetPath, im)
		n.unpublish(req)
		if reg.requests(); t.Failed() {
			t.Fatalf("after: %s", name)
		}
	}
	// Nothing to fetch it from: the error, and nothing left.
	flip(im.rootfs)
	reg.set(func(r *testRegistry) { r.down = true })
	n.refused(req, codes.Unavailable)
	reg.set(func(r *testRegistry) { r.down = false })

	n.publish(req)
	flip(im.chunks[1])
	if b, err := os.ReadFile(filepath.Join(req.TargetPath, "big")); !errors.Is(err, unix.EIO) {
		t.Errorf("read of a corrupt chunk: %d bytes, %v; want EIO", len(b), err)
	}
	n.unpublish(req)
	n.publish(req)
	n.shows(req.TargetPath, im)
	n.unpublish(req)
	n.nothingLeft()
}

// TestPublishUndo: a failure at any step leaves nothing, and the next attempt succeeds.
func TestPublishUndo(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	var fail string
	n.cfg.Fault = func(step string) error {
		if step == fail {
			return errors.New("injected")
		}
		return nil
	}
	n.start()
	publish, unpublish := driver.Steps()
	for _, fail = range publish {
		t.Run(fail, func(t *testing.T) {
			req := n.request("a", ref, im.digest.String())
			n.refused(req, codes.Internal, "injected")
			n.nothingLeft()
		})
	}
	for _, fail = range unpublish {
		t.Run(fail, func(t *testing.T) {
			req := n.request("a", ref, im.digest.String())
			n.publish(req)
			if _, err := n.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: req.VolumeId, TargetPath: req.TargetPath}); err == nil {
				t.Error("unpublish succeeded")
			}
			fail = ""
			// Publishing what is half unpublished begins anew.
			n.publish(req)
			n.shows(req.TargetPath, im)
			n.unpublish(req)
			n.nothingLeft()
		})
	}
}

// TestTargets: odd target paths are neither followed nor emptied.
func TestTargets(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.start()
	unpublish := func(path string) error {
		_, err := n.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "csi-x", TargetPath: path})
		return err
	}
	at := func(path string) *csi.NodePublishVolumeRequest {
		req := n.request("a", ref, im.digest.String())
		req.TargetPath = path
		return req
	}
	t.Run("existing directory", func(t *testing.T) {
		path := n.target("existing")
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
		n.publish(at(path))
		n.shows(path, im)
		n.unpublish(at(path))
	})
	t.Run("spaces and backslashes", func(t *testing.T) {
		path := n.target(`a b\c	d`)
		n.publish(at(path))
		n.publish(at(path))
		n.shows(path, im)
		n.unpublish(at(path))
		n.nothingLeft()
	})
	t.Run("long and odd volume ids", func(t *testing.T) {
		for _, id := range []string{strings.Repeat("x", 256), "../../etc/passwd", "a/b c\nd", ".json", strings.Repeat("ü", 100)} {
			req := at(n.target("odd"))
			req.VolumeId = id
			n.publish(req)
			n.publish(req)
			n.unpublish(req)
		}
		n.nothingLeft()
	})
	t.Run("one volume at two targets", func(t *testing.T) {
		one, two := at(n.target("one")), at(n.target("two"))
		n.publish(one)
		n.publish(two)
		n.unpublish(one)
		n.shows(two.TargetPath, im)
		n.unpublish(two)
		n.nothingLeft()
	})
	t.Run("kubelet's directory is a symlink", func(t *testing.T) {
		link := filepath.Join(n.dir, "link-to-pods")
		if err := os.Symlink("pods", link); err != nil {
			t.Fatal(err)
		}
		n.target("linked")
		req := at(filepath.Join(link, "linked/mount"))
		n.publish(req)
		n.publish(req)
		n.shows(req.TargetPath, im)
		if _, err := n.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: req.VolumeId, VolumePath: req.TargetPath}); err != nil {
			t.Error(err)
		}
		n.unpublish(req)
		n.nothingLeft()
	})
	t.Run("target is a symlink", func(t *testing.T) {
		path := n.target("symlink")
		if err := os.Symlink(t.TempDir(), path); err != nil {
			t.Fatal(err)
		}
		if _, err := n.NodePublishVolume(t.Context(), at(path)); status.Code(err) != codes.InvalidArgument {
			t.Errorf("got %v, want InvalidArgument", err)
		}
		if err := unpublish(path); err != nil {
			t.Errorf("unpublish of an unknown volume: %v", err)
		}
		n.nothingLeft()
	})
	t.Run("parent is missing", func(t *testing.T) {
		n.refused(at(filepath.Join(n.dir, "nowhere/mount")), codes.InvalidArgument, "parent directory")
		if err := unpublish(filepath.Join(n.dir, "nowhere/mount")); err != nil {
			t.Error(err)
		}
	})
	t.Run("target is a file", func(t *testing.T) {
		path := n.target("file")
		if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := unpublish(path); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the file is left (%v)", err)
		}
	})
	t.Run("target is not empty", func(t *testing.T) {
		path := n.target("full")
		if err := os.MkdirAll(filepath.Join(path, "precious"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unpublish(path); err != nil {
			t.Errorf("unpublish of an unknown volume: %v", err)
		}
		if _, err := os.Stat(filepath.Join(path, "precious")); err != nil {
			t.Error(err)
		}
	})
	t.Run("another file system is there", func(t *testing.T) {
		path := n.target("tmpfs")
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", path, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		if _, err := n.NodePublishVolume(t.Context(), at(path)); status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "unmount it") {
			t.Errorf("got %v, want Internal", err)
		}
		if err := unpublish(path); err != nil {
			t.Errorf("unpublish of an unknown volume: %v", err)
		}
		if err := unix.Unmount(path, 0); err != nil {
			t.Errorf("the other file system is gone: %v", err)
		}
		n.nothingLeft()
	})
	t.Run("bad paths", func(t *testing.T) {
		for _, path := range []string{"", "relative", "/a/../b"} {
			if err := unpublish(path); status.Code(err) != codes.InvalidArgument {
				t.Errorf("unpublish %q: %v, want InvalidArgument", path, err)
			}
		}
	})
}

// TestUnpublishBusy: files that are still open do not keep a volume from going.
func TestUnpublishBusy(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	f, err := os.Open(filepath.Join(req.TargetPath, "hello.txt"))
	if err != nil {
		t.Fatal(err)
	}
	n.unpublish(req)
	n.nothingLeft()
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	n.publish(req)
	n.shows(req.TargetPath, im)
	n.unpublish(req)
}
