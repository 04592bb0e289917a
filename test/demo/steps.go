package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/node"
)

// build makes an image of the tree.
func (d *demo) build() error {
	begin := time.Now()
	out, err := d.puzzlefs("build", d.source, filepath.Join(d.dir, "layout")+":v1")
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch name {
		case "puzzlefs image manifest digest":
			d.verity = value
		case "oci image manifest digest":
			d.digest = value
		}
	}
	if d.verity == "" || d.digest == "" {
		return fmt.Errorf("build printed no digests:\n%s", out)
	}
	files, size, err := measure(d.source)
	if err != nil {
		return err
	}
	d.say(begin, "built an image of %s: %d paths, %s; %s", d.source, files, mb(size), short(d.digest))
	return nil
}

func (d *demo) push() error {
	begin := time.Now()
	if _, err := d.puzzlefs("push", filepath.Join(d.dir, "layout")+":v1", d.ref); err != nil {
		return err
	}
	d.say(begin, "pushed it to a registry as %s", d.ref)
	return nil
}

func (d *demo) startDriver() error {
	begin := time.Now()
	// A node keeps a part of its disk free. How full that of whoever looks at this is does not matter.
	n, err := node.Start(d.ctx, d.program, d.dir, "--store-reserve", "0")
	if err != nil {
		return err
	}
	d.node = n
	d.say(begin, "started the driver; it answers on %s as %s", n.Socket(), n.Name())
	return nil
}

// publishTwice publishes the volume for two pods: the first pulls, the second shares.
func (d *demo) publishTwice() error {
	for i, pod := range []string{"pod-a", "pod-b"} {
		begin := time.Now()
		digest := d.digest
		if i == 1 {
			digest = "verity:" + d.verity // the other name of the same image
		}
		if err := d.node.Publish(d.ctx, d.volume(pod, digest)); err != nil {
			return fmt.Errorf("publish for %s: %w", pod, err)
		}
		d.say(begin, "published the volume for %s: %s", pod, []string{"pulled, verified, mounted", "the same mount, nothing pulled"}[i])
	}
	mounts, err := d.mounts()
	if err != nil {
		return err
	}
	if shared := len(mounts) - 2; shared != 1 {
		return fmt.Errorf("%d mounts for two volumes of one image, want one and two binds: %v", len(mounts), mounts)
	}
	return nil
}

// compare compares every file, mode, owner, link and xattr of both volumes with the source.
func (d *demo) compare() error {
	want, err := testtree.FromDir(d.source)
	if err != nil {
		return err
	}
	for _, pod := range []string{"pod-a", "pod-b"} {
		begin := time.Now()
		got, err := testtree.FromDir(d.target(pod))
		if err != nil {
			return err
		}
		if diff := testtree.Diff(want, got); diff != "" {
			return fmt.Errorf("%s does not see the source:\n%s", pod, diff)
		}
		d.say(begin, "%s reads all %d paths: contents, modes, owners, links, xattrs as in the source", pod, len(got))
	}
	return nil
}

// readAsNobody reads a volume as a user who owns nothing.
func (d *demo) readAsNobody() error {
	begin := time.Now()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// The demo's own program may lie where others cannot reach it.
	reader := filepath.Join(d.dir, "reader")
	if err := copyFile(self, reader, 0o755); err != nil {
		return err
	}
	const nobody = 65534
	cmd := exec.CommandContext(d.ctx, reader)
	cmd.Env = []string{readerEnv + "=" + d.target("pod-b")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("read as user %d: %w\n%s", nobody, err, out)
	}
	d.say(begin, "user %d, who owns nothing, reads it too: %s", nobody, bytes.TrimSpace(out))
	return nil
}

func (d *demo) wrongDigest() error {
	begin := time.Now()
	wrong := format.DigestOf([]byte("another image")).String()
	err := d.node.Publish(d.ctx, d.volume("pod-c", wrong))
	if err == nil {
		return errors.New("a volume with a wrong digest was published")
	}
	switch _, err := os.Lstat(d.target("pod-c")); {
	case err == nil:
		return errors.New("the refused volume left something at its target")
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	d.say(begin, "a wrong digest is refused: %s", oneLine(err))
	return nil
}

// unpublish takes both volumes away, and with the last the mount.
func (d *demo) unpublish() error {
	begin := time.Now()
	for _, pod := range []string{"pod-a", "pod-b"} {
		if err := d.node.Unpublish(d.ctx, d.volume(pod, d.digest)); err != nil {
			return fmt.Errorf("unpublish for %s: %w", pod, err)
		}
	}
	mounts, err := d.mounts()
	if err != nil {
		return err
	}
	if len(mounts) != 0 {
		return fmt.Errorf("mounts are left: %v", mounts)
	}
	d.say(begin, "unpublished both volumes; no mount is left")
	return nil
}

// flippedByte spoils one blob on the node's disk. Whoever reads it gets an error; the next
// volume of the image gets the blob from the registry again.
func (d *demo) flippedByte() error {
	begin := time.Now()
	blob, err := largestChunk(filepath.Join(node.StateDir(d.dir), "store"))
	if err != nil {
		return err
	}
	spoiled := mb(size(blob))
	if err := flip(blob); err != nil {
		return err
	}
	failed, wrong, err := d.publishAndRead("pod-d")
	if err != nil {
		return err
	}
	if failed == 0 || wrong != 0 {
		return fmt.Errorf("with a flipped byte %d files give EIO and %d wrong content, want at least one and none", failed, wrong)
	}
	d.say(begin, "a byte of a chunk of %s is flipped on the node's disk: %d files give EIO, none wrong content", spoiled, failed)
	begin = time.Now()
	if failed, wrong, err = d.publishAndRead("pod-e"); err != nil {
		return err
	}
	if failed+wrong != 0 {
		return fmt.Errorf("with the chunk fetched again %d files fail and %d are wrong", failed, wrong)
	}
	d.say(begin, "the next volume of the image fetched the chunk again: all files read right")
	return nil
}

// publishAndRead publishes the image for a pod, reads all of it, and unpublishes it.
func (d *demo) publishAndRead(pod string) (failed, wrong int, err error) {
	if err := d.node.Publish(d.ctx, d.volume(pod, d.digest)); err != nil {
		return 0, 0, err
	}
	failed, wrong, err = d.readWithErrors(pod)
	return failed, wrong, errors.Join(err, d.node.Unpublish(d.ctx, d.volume(pod, d.digest)))
}

// readWithErrors compares the files of a pod's volume with the source one by one.
func (d *demo) readWithErrors(pod string) (failed, wrong int, err error) {
	err = filepath.WalkDir(d.source, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(d.source, path)
		if err != nil {
			return err
		}
		want, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		got, err := os.ReadFile(filepath.Join(d.target(pod), rel))
		switch {
		case errors.Is(err, syscall.EIO):
			failed++
		case err != nil:
			return err
		case !bytes.Equal(want, got):
			wrong++
		}
		return nil
	})
	return failed, wrong, err
}

func (d *demo) stopDriver() error {
	begin := time.Now()
	if err := d.node.Stop(); err != nil {
		return err
	}
	d.node = nil
	mounts, err := d.mounts()
	if err != nil {
		return err
	}
	if len(mounts) != 0 {
		return fmt.Errorf("mounts are left: %v", mounts)
	}
	d.say(begin, "stopped the driver; no mount, socket or process is left")
	return nil
}

// cleanUp ends what a failed demo left running.
func (d *demo) cleanUp() error {
	var err error
	if d.node != nil {
		for _, pod := range []string{"pod-a", "pod-b", "pod-c", "pod-d", "pod-e"} {
			err = errors.Join(err, d.node.Unpublish(d.ctx, d.volume(pod, d.digest)))
		}
		err = errors.Join(err, d.node.Stop())
	}
	return err
}

// oneLine is an RPC's error as kubelet would show it.
func oneLine(err error) string {
	s := status.Convert(err)
	return fmt.Sprintf("%s: %s", s.Code(), s.Message())
}
