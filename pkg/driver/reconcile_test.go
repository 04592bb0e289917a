package driver_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
)

// TestKillAtEachStep kills the driver with SIGKILL at each step of a publish and an
// unpublish. The next driver finds everything as kubelet was told, or undoes it.
func TestKillAtEachStep(t *testing.T) {
	reg := newRegistry(t)
	im := makeImage(t, "hello\n", 2)
	ref := reg.push(t, im, "app", "1")
	publish, unpublish := driver.Steps()
	committed := publish[len(publish)-1]
	for _, step := range slices.Concat(publish, unpublish, []string{driver.StepUnpublishEnded}) {
		t.Run(step, func(t *testing.T) {
			n := newNode(t)
			n.startProcess(step)
			n.waitReady()
			req := n.request("a", ref, im.digest.String())
			if slices.Contains(publish, step) {
				if _, err := n.NodePublishVolume(t.Context(), req); err == nil {
					t.Fatal("publish succeeded though the driver was to be killed")
				}
			} else {
				n.publish(req)
				_, err := n.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: req.VolumeId, TargetPath: req.TargetPath})
				if err == nil && step != driver.StepUnpublishEnded {
					t.Fatal("unpublish succeeded though the driver was to be killed")
				}
			}
			n.wait()

			n.startProcess("")
			n.waitReady()
			if step == committed {
				n.shows(req.TargetPath, im)
			} else {
				n.nothingLeft()
				if _, err := os.Lstat(req.TargetPath); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("the target is left (%v)", err)
				}
			}
			// Whatever kubelet does next works.
			if slices.Contains(publish, step) {
				n.publish(req)
				n.shows(req.TargetPath, im)
				if all := n.mounts(); len(all) != 2 {
					t.Errorf("mounts are %v, want the shared one and the target", all)
				}
			}
			n.unpublish(req)
			n.nothingLeft()
		})
	}
}

// TestKillWhileReconciling kills the driver that undoes what a killed one left.
func TestKillWhileReconciling(t *testing.T) {
	reg := newRegistry(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	publish, unpublish := driver.Steps()
	bound := publish[len(publish)-2]
	for _, step := range unpublish {
		t.Run(step, func(t *testing.T) {
			n := newNode(t)
			n.startProcess(bound)
			n.waitReady()
			req := n.request("a", ref, im.digest.String())
			if _, err := n.NodePublishVolume(t.Context(), req); err == nil {
				t.Fatal("publish succeeded though the driver was to be killed")
			}
			n.wait()
			n.startProcess(step)
			n.wait()
			n.startProcess("")
			n.waitReady()
			n.nothingLeft()
			n.publish(req)
			n.shows(req.TargetPath, im)
			n.unpublish(req)
			n.nothingLeft()
		})
	}
}

// TestKillAndRestart: volumes of a killed driver give errors, and work again when the next
// one is there, without the registry.
func TestKillAndRestart(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, other := makeImage(t, "hello\n", 2), makeImage(t, "other\n", 2)
	ref, otherRef := reg.push(t, im, "app", "1"), reg.push(t, other, "other", "1")
	n.cfg.KubeletRootDir = filepath.Join(n.dir, "kubelet")
	n.startProcess("")
	n.waitReady()
	a, b, c := n.request("a", ref, im.digest.String()), n.request("b", ref, im.digest.String()), n.request("c", otherRef, other.digest.String())
	b.VolumeContext["subPath"] = "dir/sub"
	gone := n.request("gone", ref, im.digest.String())
	for _, req := range []*csi.NodePublishVolumeRequest{a, b, c, gone} {
		n.publish(req)
	}
	// What kubelet makes of a volumeMounts.subPath: a bind that no record knows.
	stray := filepath.Join(n.dir, "kubelet/pods/uid/volume-subpaths/v/c/0")
	if err := os.MkdirAll(stray, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(filepath.Join(a.TargetPath, "dir"), stray, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	n.kill()
	if _, err := os.ReadDir(a.TargetPath); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("without a driver: %v, want ENOTCONN", err)
	}
	// One pod's directory goes while nobody looks.
	if err := unix.Unmount(gone.TargetPath, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Dir(gone.TargetPath)); err != nil {
		t.Fatal(err)
	}
	// A record that is garbage takes nobody else down.
	if err := os.WriteFile(filepath.Join(n.dir, "state/volumes/garbage.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	reg.set(func(r *testRegistry) { r.down = true })
	for range 2 {
		n.startProcess("")
		n.waitReady()
		n.shows(a.TargetPath, im)
		n.shows(c.TargetPath, other)
		if got, err := os.ReadFile(filepath.Join(b.TargetPath, "deep")); err != nil || string(got) != im.files["dir/sub/deep"] {
			t.Errorf("read dir/sub/deep: %q, %v", got, err)
		}
		if shared, pods := n.mountsUnder("state"), n.mountsUnder("pods"); len(shared) != 2 || len(pods) != 3 {
			t.Errorf("mounts are %v and %v, want 2 shared by 3", shared, pods)
		}
		if left := n.mountsUnder("kubelet"); len(left) > 0 {
			t.Errorf("dead and not detached: %v", left)
		}
		n.publish(a)
		n.kill()
	}
	n.startProcess("")
	n.waitReady()
	for _, req := range []*csi.NodePublishVolumeRequest{a, b, c, gone} {
		n.unpublish(req)
	}
	if err := os.Remove(filepath.Join(n.dir, "state/volumes/garbage.json.corrupt")); err != nil {
		t.Errorf("the garbage was not set aside: %v", err)
	}
	n.nothingLeft()
}

// TestStopLeavesVolumes: SIGTERM ends the driver and unmounts nothing.
func TestStopLeavesVolumes(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.startProcess("")
	n.waitReady()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	if err := n.process.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := n.process.Wait(); err != nil {
		t.Errorf("driver: %v", err)
	}
	if _, err := os.ReadFile(filepath.Join(req.TargetPath, "hello.txt")); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("after the driver's end: %v, want ENOTCONN", err)
	}
	if _, err := os.Lstat(filepath.Join(n.dir, "csi.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left (%v)", err)
	}
	n.startProcess("")
	n.waitReady()
	n.shows(req.TargetPath, im)
	n.unpublish(req)
	n.nothingLeft()
}

// TestRestartWithLostImage: a volume that cannot be mounted again stays a loud error, does
// not keep the others from working, and comes back with the next publish.
func TestRestartWithLostImage(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, other := makeImage(t, "hello\n", 1), makeImage(t, "other\n", 1)
	ref, otherRef := reg.push(t, im, "app", "1"), reg.push(t, other, "other", "1")
	n.startProcess("")
	n.waitReady()
	a, b := n.request("a", ref, im.digest.String()), n.request("b", otherRef, other.digest.String())
	n.publish(a)
	n.publish(b)
	n.kill()
	if err := os.Remove(filepath.Join(n.dir, "state/store/blobs/sha256", im.rootfs.Hex())); err != nil {
		t.Fatal(err)
	}
	n.startProcess("")
	n.waitReady()
	n.shows(b.TargetPath, other)
	if _, err := os.ReadDir(a.TargetPath); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("read of the lost volume: %v, want ENOTCONN", err)
	}
	reg.set(func(r *testRegistry) { r.down = true })
	if _, err := n.NodePublishVolume(t.Context(), a); status.Code(err) != codes.Unavailable {
		t.Errorf("publish without a registry: %v, want Unavailable", err)
	}
	reg.set(func(r *testRegistry) { r.down = false })
	n.publish(a)
	n.shows(a.TargetPath, im)
	n.unpublish(a)
	n.unpublish(b)
	n.nothingLeft()
}

// TestRestartKeepsDeadMount: a dead mount goes only when the new one is ready, whether mounting
// it again fails or the driver is killed just then.
func TestRestartKeepsDeadMount(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.startProcess("")
	n.waitReady()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	n.kill()
	dead := func() {
		t.Helper()
		if _, err := os.ReadDir(req.TargetPath); !errors.Is(err, unix.ENOTCONN) {
			t.Errorf("read of the target: %v, want ENOTCONN", err)
		}
	}
	n.startProcess(driver.StepRestore)
	n.wait()
	dead()
	fail := true
	n.cfg.Fault = func(step string) error {
		if step == driver.StepRestore && fail {
			return errors.New("injected")
		}
		return nil
	}
	n.start()
	dead()
	if _, err := n.NodePublishVolume(t.Context(), req); status.Code(err) != codes.Unavailable {
		t.Errorf("publish again: got %v, want Unavailable", err)
	}
	dead()
	fail = false
	n.publish(req)
	n.shows(req.TargetPath, im)
	n.unpublish(req)
	n.nothingLeft()
}

// TestRestartUnmounted: volumes that nothing is mounted for, as after a reboot, are mounted.
func TestRestartUnmounted(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.startProcess("")
	n.waitReady()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	n.kill()
	for _, path := range n.mounts() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}
	n.startProcess("")
	n.waitReady()
	n.shows(req.TargetPath, im)
	n.unpublish(req)
	n.nothingLeft()
}

// TestOneDriverPerStateDirectory: a second driver is refused and touches nothing.
func TestOneDriverPerStateDirectory(t *testing.T) {
	_, n, im, req := newPublished(t, 1)
	cfg := n.cfg
	cfg.Endpoint += "2"
	d, err := driver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another driver") {
		t.Errorf("got %v, want an error that says so", err)
	}
	n.shows(req.TargetPath, im)
	n.unpublish(req)
	n.nothingLeft()
}
