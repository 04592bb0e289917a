package driver_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

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
	_, n, im, req := newPublished(t, 1)
	f, err := os.Open(filepath.Join(req.TargetPath, "hello.txt"))
	if err != nil {
		t.Fatal(err)
	}
	n.unpublish(req)
	n.nothingMounted() // but the image is pinned: it is read
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	n.publish(req)
	n.shows(req.TargetPath, im)
	n.unpublish(req)
}
