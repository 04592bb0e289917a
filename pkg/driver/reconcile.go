package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

// reconcileWorkers is how many volumes are mounted again at a time. Volumes of one image
// wait for each other, and decoding an image uses one core.
const reconcileWorkers = 4

// reconcile puts the node right after an earlier driver stopped, was killed at any step, or
// the node was restarted. We hold the lock of the state directory, so every mount of ours
// that is there now has no server any more. Without asking any registry,
//
//   - half published and half unpublished volumes are undone;
//   - records whose target is gone are dropped;
//   - published volumes are mounted again, and their dead mounts detached;
//   - mounts of ours that no record explains are detached.
//
// A volume that cannot be mounted again keeps its record and its dead mount, whose readers
// get errors and not emptiness, and is logged; kubelet's next publish tries again. Only what
// concerns all volumes is returned as an error.
func (d *Driver) reconcile(ctx context.Context) error {
	table, err := readMounts()
	if err != nil {
		return err
	}
	var keep []record
	for _, vol := range d.volumes.all() {
		log := d.log.With("volume", vol.Args.VolumeID, "target", vol.Args.TargetPath)
		switch {
		case vol.pending:
			log.Info("undoing a volume that is half published or half unpublished")
			if err := d.takeDown(vol.record); err != nil {
				log.Error("cannot undo a volume; unpublishing it tries again", "error", err)
			}
		case d.targetGone(table, vol.record):
			log.Info("dropping the record of a volume whose target is gone")
			if err := d.volumes.drop(vol.record); err != nil {
				log.Error("cannot drop a volume record", "error", err)
			}
		default:
			keep = append(keep, vol.record)
		}
	}
	if err := d.detachStrays(table, keep); err != nil {
		return err
	}
	d.restoreAll(ctx, keep)
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("mount volumes again: %w", err)
	}
	return d.removeLeftovers()
}

// targetGone reports whether r's target exists no more. One with a mount of ours exists,
// and must not be looked at.
func (d *Driver) targetGone(table mountinfo.Table, r record) bool {
	if len(table.At(r.Real)) > 0 {
		return false
	}
	_, err := os.Lstat(r.Real)
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

// detachStrays detaches the mounts of ours that neither keep nor the directory of shared
// mounts explains: binds of our dead mounts, wherever they are, and everything of our type
// in kubelet's pods.
func (d *Driver) detachStrays(table mountinfo.Table, keep []record) error {
	explained := map[string]bool{}
	for _, r := range keep {
		explained[r.Real] = true
	}
	dead := map[mountinfo.Device]bool{}
	for _, e := range table {
		if isOurs(e) && filepath.Dir(e.Point) == d.mounts.dir {
			dead[e.Device] = true
		}
	}
	pods := ""
	if d.cfg.KubeletRootDir != "" {
		root, err := filepath.EvalSymlinks(d.cfg.KubeletRootDir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("resolve kubelet root directory: %w", err)
		}
		if err == nil {
			pods = filepath.Join(root, "pods") + "/"
		}
	}
	for _, e := range table {
		inPod := pods != "" && strings.HasPrefix(e.Point, pods)
		known := explained[e.Point] || filepath.Dir(e.Point) == d.mounts.dir
		stray := isOurs(e) && !known && (dead[e.Device] || inPod)
		if !stray {
			continue
		}
		d.log.Info("detaching a mount that no record explains", "target", e.Point, "image", e.Source)
		if err := detachAll(e.Point); err != nil {
			d.log.Error("cannot detach a mount", "target", e.Point, "error", err)
		}
	}
	return nil
}

// restoreAll mounts volumes again, several at a time.
func (d *Driver) restoreAll(ctx context.Context, keep []record) {
	work := make(chan record)
	var wg sync.WaitGroup
	for range min(reconcileWorkers, len(keep)) {
		wg.Go(func() {
			for r := range work {
				log := d.log.With("volume", r.Args.VolumeID, "target", r.Args.TargetPath, "image", r.Manifest.String())
				if err := d.restore(ctx, r); err != nil {
					d.metrics.restores.WithLabelValues("failed").Inc()
					log.Error("cannot mount a volume again; its readers get errors until it is published again", "error", err)
					continue
				}
				d.metrics.restores.WithLabelValues("mounted").Inc()
				log.Info("mounted a volume again")
			}
		})
	}
	for _, r := range keep {
		if ctx.Err() != nil {
			break
		}
		work <- r
	}
	close(work)
	wg.Wait()
}

// removeLeftovers detaches and removes the shared mounts that no volume uses.
func (d *Driver) removeLeftovers() error {
	dir, err := os.Open(d.mounts.dir)
	if err != nil {
		return fmt.Errorf("read directory of mounts: %w", err)
	}
	defer dir.Close()
	// Names only: a dead mount answers no question about its type.
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("read directory of mounts: %w", err)
	}
	for _, name := range names {
		if d.mounts.used(name) {
			continue
		}
		dir := filepath.Join(d.mounts.dir, name)
		err := detachAll(dir)
		if err == nil {
			err = removeDir(dir)
		}
		if err != nil {
			d.log.Error("cannot remove a mount that no volume uses", "dir", dir, "error", err)
		}
	}
	return nil
}
