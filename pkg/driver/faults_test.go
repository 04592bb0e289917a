package driver_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

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
	n.cfg.ContentCache = 1 // what was read before is read from disk again
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	n.unpublish(req)
	blob := func(d format.Digest) string { return filepath.Join(n.dir, "state/store/blobs/sha256", d.Hex()) }
	flip := func(d format.Digest) error {
		b, err := os.ReadFile(blob(d))
		if err != nil {
			return err
		}
		b[len(b)/2] ^= 1
		return errors.Join(os.Chmod(blob(d), 0o644), os.WriteFile(blob(d), b, 0o644))
	}
	for name, damage := range map[string]func() error{
		"manifest":      func() error { return flip(im.digest) },
		"rootfs":        func() error { return flip(im.rootfs) },
		"lost manifest": func() error { return os.Remove(blob(im.digest)) },
		"lost rootfs":   func() error { return os.Remove(blob(im.rootfs)) },
		"lost chunk":    func() error { return os.Remove(blob(im.chunks[1])) },
		"short chunk":   func() error { return os.Truncate(blob(im.chunks[1]), 100) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		n.publish(req)
		n.shows(req.TargetPath, im)
		n.unpublish(req)
		if reg.requests(); t.Failed() {
			t.Fatalf("after: %s", name)
		}
	}
	// Nothing to fetch it from: the error, and nothing left.
	if err := flip(im.rootfs); err != nil {
		t.Fatal(err)
	}
	reg.set(func(r *testRegistry) { r.down = true })
	n.refused(req, codes.Unavailable)
	reg.set(func(r *testRegistry) { r.down = false })

	// What was read before is in the driver's cache of content, and right.
	n.stop()
	n.start()
	n.publish(req)
	if err := flip(im.chunks[1]); err != nil {
		t.Fatal(err)
	}
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
	var failing atomic.Pointer[string] // steps happen beside calls, too
	n.cfg.Fault = func(step string) error {
		if fail := failing.Load(); fail != nil && step == *fail {
			return errors.New("injected")
		}
		return nil
	}
	n.start()
	publish, unpublish := driver.Steps()
	for _, fail := range publish {
		t.Run(fail, func(t *testing.T) {
			failing.Store(&fail)
			// The image is not here, so that it is pulled.
			if _, err := n.state().Collect(t.Context(), driver.CollectOptions{All: true}); err != nil {
				t.Fatal(err)
			}
			req := n.request("a", ref, im.digest.String())
			n.refused(req, codes.Internal, "injected")
			n.nothingLeft()
		})
	}
	for _, fail := range unpublish {
		t.Run(fail, func(t *testing.T) {
			failing.Store(&fail)
			req := n.request("a", ref, im.digest.String())
			n.publish(req)
			if _, err := n.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: req.VolumeId, TargetPath: req.TargetPath}); err == nil {
				t.Error("unpublish succeeded")
			}
			failing.Store(nil)
			// Publishing what is half unpublished begins anew.
			n.publish(req)
			n.shows(req.TargetPath, im)
			n.unpublish(req)
			n.nothingLeft()
		})
	}
}

// TestPublishCannotUndo: where something has to be left behind, the code makes kubelet come
// back, and what is left is still known, also to the next driver.
func TestPublishCannotUndo(t *testing.T) {
	publish, _ := driver.Steps()
	bound := publish[len(publish)-2]
	for _, next := range []string{"unpublish", "publish", "restart"} {
		t.Run(next, func(t *testing.T) {
			reg, n := newRegistry(t), newNode(t)
			im := makeImage(t, "hello\n", 1)
			ref := reg.push(t, im, "app", "1")
			req := n.request("a", ref, im.digest.String())
			fail := true
			n.cfg.Fault = func(step string) error {
				if step != bound || !fail {
					return nil
				}
				// Somebody else's mount lies on ours: that is not for us to unmount.
				return errors.Join(errors.New("injected"), unix.Mount("tmpfs", req.TargetPath, "tmpfs", 0, ""))
			}
			n.start()
			_, err := n.NodePublishVolume(t.Context(), req)
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "injected") || !strings.Contains(err.Error(), "unmount that first") {
				t.Errorf("got %v, want Unavailable and both causes", err)
			}
			fail = false
			if next == "publish" {
				if _, err := n.NodePublishVolume(t.Context(), req); status.Code(err) != codes.Unavailable {
					t.Errorf("publish again: got %v, want Unavailable", err)
				}
			}
			if err := unix.Unmount(req.TargetPath, 0); err != nil {
				t.Fatal(err)
			}
			switch next {
			case "publish":
				n.publish(req)
				n.shows(req.TargetPath, im)
			case "restart":
				n.stop()
				n.start()
				n.nothingLeft()
			}
			n.unpublish(req)
			n.nothingLeft()
		})
	}
}

// TestPublishWhileSaving: noting that one image was pulled, which waits for the disk or for
// another process, does not hold up volumes of images that are here.
func TestPublishWhileSaving(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	here, comes := makeImage(t, "here\n", 1), makeImage(t, "comes\n", 1)
	hereRef, comesRef := reg.push(t, here, "app", "here"), reg.push(t, comes, "app", "comes")
	n.start()
	first := n.request("first", hereRef, here.digest.String())
	n.publish(first)

	lock, err := os.Open(filepath.Join(n.dir, "state/store/oci-layout"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	pulled := n.request("pulled", comesRef, comes.digest.String())
	result := make(chan error, 1)
	go func() {
		_, err := n.NodePublishVolume(t.Context(), pulled)
		result <- err
	}()
	// The manifest comes last.
	manifest := filepath.Join(n.dir, "state/store/blobs/sha256", comes.digest.Hex())
	for {
		if _, err := os.Stat(manifest); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	second := n.request("second", hereRef, here.digest.String())
	n.publish(second)
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	// It would have given up, had the other publish waited for it.
	if err := <-result; err != nil {
		t.Error(err)
	}
	n.shows(pulled.TargetPath, comes)
	for _, req := range []*csi.NodePublishVolumeRequest{first, second, pulled} {
		n.unpublish(req)
	}
	n.nothingLeft()
}

// TestStartWithBadImageRecord: what cannot be read costs a question to the registry, and never
// the other volumes.
func TestStartWithBadImageRecord(t *testing.T) {
	_, n, im, req := newPublished(t, 1)
	ref := req.VolumeContext["image"]
	n.stop()
	images := filepath.Join(n.dir, "state/images")
	for _, err := range []error{
		os.WriteFile(filepath.Join(images, im.digest.Hex()+".json"), []byte("{"), 0o600),
		os.MkdirAll(filepath.Join(images, "directory.json/full"), 0o700),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	n.start()
	n.shows(req.TargetPath, im)
	second := n.request("b", ref, im.digest.String())
	n.publish(second)
	n.unpublish(second)
	n.unpublish(req)
	n.nothingLeft()
}
