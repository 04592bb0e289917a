package driver_test

import (
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
	n.cfg.Policy.RequireDigest = false
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

// TestPublishNoticesLostBlobs: that an image was found whole does not outlive the loss of a blob,
// whoever removed it.
func TestPublishNoticesLostBlobs(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 2)
	ref := reg.push(t, im, "app", "1")
	n.start()
	req := n.request("a", ref, im.digest.String())
	blobs := filepath.Join(n.dir, "state", "store", "blobs", "sha256")
	for range 2 {
		n.publish(req)
		n.unpublish(req)
		// Long ago enough for the driver to rely on it the next time.
		past := time.Now().Add(-time.Hour)
		if err := os.Chtimes(blobs, past, past); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(blobs, im.chunks[0].Hex())); err != nil {
		t.Fatal(err)
	}
	n.publish(req)
	n.shows(req.TargetPath, im)
	if _, err := os.Stat(filepath.Join(blobs, im.chunks[0].Hex())); err != nil {
		t.Error(err)
	}
	n.unpublish(req)
}

// TestPublishAgainRepairs: a mount that vanished from under a volume is made again.
func TestPublishAgainRepairs(t *testing.T) {
	reg, n, im, req := newPublished(t, 2)
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
