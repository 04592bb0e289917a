package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// Steps of a pull, of publish, of mounting again and of unpublish, in order, at which Config.Fault is called. A driver that
// is killed at any of them leaves a node that the next one puts right.
const (
	stepPullHeld           = "pull: image is held"
	stepPullStored         = "pull: blobs are in the store, untagged"
	stepPullTagged         = "pull: image is tagged, without a record"
	stepPublishObtained    = "publish: image is in the store"
	stepPublishBegun       = "publish: record is pending"
	stepPublishPinned      = "publish: image is pinned"
	stepPublishMounted     = "publish: image is mounted"
	stepPublishTarget      = "publish: target exists"
	stepPublishBound       = "publish: target is bound"
	stepPublishCommitted   = "publish: record is committed"
	stepRestoreOpened      = "restore: the new mount is ready, the old one is there"
	stepUnpublishRetired   = "unpublish: record is pending"
	stepUnpublishUnmounted = "unpublish: target is unmounted"
	stepUnpublishRemoved   = "unpublish: target is removed"
	stepUnpublishDropped   = "unpublish: record is gone"
	stepUnpublishReleased  = "unpublish: image is unmounted"
	stepUnpublishEnded     = "unpublish: image is served no more, but pinned"
)

// at calls the fault hook of tests.
func (d *Driver) at(step string) error {
	if d.cfg.Fault == nil {
		return nil
	}
	if err := d.cfg.Fault(step); err != nil {
		return fmt.Errorf("%s: %w", step, err)
	}
	return nil
}

// undo is a list of what to do, last first, when a later step fails. It ends where one of
// them fails: a record stays as long as what it is about.
type undo []func() error

func (u *undo) add(f func() error) { *u = append(*u, f) }

func (u *undo) run() error {
	for i := len(*u) - 1; i >= 0; i-- {
		if err := (*u)[i](); err != nil {
			return err
		}
	}
	return nil
}

// notUndone is the error of a publish that had to leave something behind. Whatever the
// causes, they are in it as text: the code must not be a final one, after which kubelet would
// not unpublish.
func notUndone(err, undoing error) error {
	return fmt.Errorf("%s; and what was half done cannot be undone yet: %s: %w", err.Error(), undoing.Error(), ErrUnavailable)
}

// publish makes the image of req appear at its target. When it fails, nothing of it is
// left, except that a volume that was published before stays as it is, and except where the
// code of the error makes kubelet come back.
func (d *Driver) publish(ctx context.Context, req *csi.NodePublishVolumeRequest) error {
	spec, err := parsePublish(req)
	if err != nil {
		return err
	}
	t, err := resolveTarget(spec.args.TargetPath)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrInvalid)
	}
	unlock, err := d.locks.try(t.real)
	if err != nil {
		return err
	}
	defer unlock()

	vol, known := d.volumes.at(t)
	if known && vol.pending {
		// An unpublish failed half way. Its rest comes first.
		if err := d.takeDown(vol.record); err != nil {
			return notUndone(fmt.Errorf("publish at %s: a volume is half unpublished there", t.given), err)
		}
		known = false
	}
	if known {
		if !vol.Args.equal(spec.args) {
			return fmt.Errorf("publish at %s: volume %s is published there with other arguments; unpublish it first: %w", t.given, vol.Args.VolumeID, ErrExists)
		}
		return d.republish(ctx, vol.record, spec)
	}
	if err := d.cfg.Policy.checkPinned(spec); err != nil {
		return err
	}
	manifest, release, err := d.obtain(ctx, spec)
	if err != nil {
		return err
	}
	defer release()
	if err := d.at(stepPublishObtained); err != nil {
		return err
	}
	r := record{Version: recordVersion, Args: spec.args, Real: t.real, Manifest: manifest, Pod: podOf(req), options: spec.options}
	err = d.setUp(ctx, r)
	if errors.Is(err, store.ErrDigestMismatch) {
		err = d.setUpAgain(ctx, r, spec)
	}
	return err
}

// setUpAgain fetches what was corrupt in the store, and was removed when that was noticed,
// and tries once more.
func (d *Driver) setUpAgain(ctx context.Context, r record, spec volumeSpec) error {
	// The tag may have moved on: what is fetched is what was to be mounted.
	spec.ref.Digest = r.Manifest
	_, release, err := d.obtain(ctx, spec)
	if err != nil {
		return fmt.Errorf("fetch what was corrupt in the store: %w", err)
	}
	defer release()
	return d.setUp(ctx, r)
}

// republish answers a publish of what is published. Usually there is nothing to do; where
// the mount is gone or dead it is made again, without asking the registry for permission,
// which this volume had. It never unmounts what works.
func (d *Driver) republish(ctx context.Context, r record, spec volumeSpec) error {
	if ok, err := d.shows(ctx, r); err != nil || ok {
		callOf(ctx).repeated.Store(ok)
		return err
	}
	d.log.WarnContext(ctx, "a published volume is not mounted, mounting it again", "volume", r.Args.VolumeID, "target", r.Args.TargetPath)
	err := d.restore(ctx, r)
	if err == nil {
		return nil
	}
	spec.ref.Digest = r.Manifest
	_, release, obtainErr := d.obtain(ctx, spec)
	switch {
	case obtainErr == nil:
		defer release()
		if err = d.restore(ctx, r); err == nil {
			return nil
		}
	case errors.Is(obtainErr, ErrBusy):
		return obtainErr
	default:
		err = errors.Join(err, obtainErr)
	}
	// As text: whatever the cause, the code must not be a final one. The volume is still
	// recorded, and kubelet has to come back.
	return fmt.Errorf("mount volume again: %s: %w", err.Error(), ErrUnavailable)
}

// shows reports whether r's target shows r's image, served by a live mount.
func (d *Driver) shows(ctx context.Context, r record) (bool, error) {
	_, dev, ok := d.mounts.lookup(ctx, r.mount())
	if !ok {
		return false, nil
	}
	table, err := readMounts()
	if err != nil {
		return false, err
	}
	return serves(table, r.Real, dev), nil
}

// setUp mounts, binds and records a new volume, or leaves nothing.
func (d *Driver) setUp(ctx context.Context, r record) (err error) {
	var u undo
	defer func() {
		if err == nil {
			return
		}
		if undoing := u.run(); undoing != nil {
			err = notUndone(err, undoing)
		}
	}()
	u.add(func() error { return d.volumes.drop(r) })
	if err := d.volumes.begin(r); err != nil {
		return err
	}
	if err := d.at(stepPublishBegun); err != nil {
		return err
	}
	u.add(func() error { return d.mounts.release(r.mount(), r.Real) })
	img, _, err := d.mounts.acquire(ctx, r.mount(), r.Real, admission{inodes: d.cfg.Policy.MaxInodes})
	if err != nil {
		return err
	}
	if err := d.cfg.Policy.checkStats(r.Args.Attributes[attrImage], img.Stats()); err != nil {
		return err
	}
	if err := checkDirectory(img, r.Args.subPath()); err != nil {
		return err
	}
	if err := d.at(stepPublishMounted); err != nil {
		return err
	}
	// What lies there without a record is left over from a lost unpublish.
	if err := clearTarget(r.target()); err != nil {
		return err
	}
	created, err := r.target().make()
	if err != nil {
		return err
	}
	if created {
		u.add(r.target().remove)
	}
	if err := d.at(stepPublishTarget); err != nil {
		return err
	}
	u.add(func() error { return detachAll(r.Real) })
	source, err := openBeneath(ctx, d.mounts.path(r.mount()), r.Args.subPath())
	if err != nil {
		return err
	}
	defer source.Close()
	if err := bind(source, r.target(), d.flags.tighten(r.Args.MountFlags)); err != nil {
		return err
	}
	if err := d.at(stepPublishBound); err != nil {
		return err
	}
	if err := d.volumes.commit(r); err != nil {
		return err
	}
	d.touch(r.Manifest)
	return d.at(stepPublishCommitted)
}

// restore mounts a recorded volume again from the store. A dead mount at its target is
// detached only when the new one is there to take its place: an error that pods can see is
// better than an empty directory.
func (d *Driver) restore(ctx context.Context, r record) error {
	img, _, err := d.mounts.acquire(ctx, r.mount(), r.Real, admission{admitted: true})
	if err != nil {
		return err
	}
	if err := checkDirectory(img, r.Args.subPath()); err != nil {
		return err
	}
	source, err := openBeneath(ctx, d.mounts.path(r.mount()), r.Args.subPath())
	if err != nil {
		return err
	}
	defer source.Close()
	if err := d.at(stepRestoreOpened); err != nil {
		return err
	}
	if err := clearTarget(r.target()); err != nil {
		return err
	}
	if _, err := r.target().make(); err != nil {
		return err
	}
	return bind(source, r.target(), d.flags.tighten(r.Args.MountFlags))
}

// clearTarget unmounts what is ours at t and refuses what is not.
func clearTarget(t target) error {
	stack, err := detachStack(t.real)
	if err != nil {
		return err
	}
	if len(stack) > 0 {
		return fmt.Errorf("mount at %s: another file system (%s) is mounted there; unmount it", t.given, stack[0].Source)
	}
	return nil
}

// checkDirectory looks a subPath up in the index, so that the mount is not asked for what
// it does not have.
func checkDirectory(img *image.Image, subPath string) error {
	if subPath == "" {
		return nil
	}
	a, err := img.LookupPath(subPath)
	switch {
	case errors.Is(err, image.ErrNotExist):
		return fmt.Errorf("find subPath %q: the image has no such directory: %w", subPath, ErrNotFound)
	case err != nil:
		return fmt.Errorf("find subPath %q: want a directory of the image, reached without symlinks: %w: %w", subPath, err, ErrInvalid)
	case a.Kind != format.KindDir:
		return fmt.Errorf("find subPath %q: it is a %v, want a directory: %w", subPath, a.Kind, ErrInvalid)
	}
	return nil
}

// unpublish takes a volume off its target. What is not published is fine.
func (d *Driver) unpublish(req *csi.NodeUnpublishVolumeRequest) error {
	if req.GetVolumeId() == "" {
		return fmt.Errorf("read request: no volume id: %w", ErrInvalid)
	}
	t, err := resolveTarget(req.GetTargetPath())
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		return err
	}
	unlock, err := d.locks.try(t.real)
	if err != nil {
		return err
	}
	defer unlock()

	vol, known := d.volumes.at(t)
	log := d.log.With("volume", req.GetVolumeId(), "target", t.given)
	if known && vol.Args.VolumeID != req.GetVolumeId() {
		log.Warn("unpublish of a volume that is not at this target; another one is, and is left alone", "published", vol.Args.VolumeID)
		return nil
	}
	if known {
		return d.takeDown(vol.record)
	}
	// Unknown: it was unpublished before, or its record was lost. An error would make
	// kubelet ask for ever, so only a mount of ours that cannot be undone is one.
	if err := detachAll(t.real); err != nil {
		return err
	}
	if err := t.remove(); err != nil {
		log.Warn("cannot remove the target of an unknown volume, leaving it", "error", err)
	}
	return nil
}

// takeDown undoes a volume that is, or is half, published. It can be repeated.
func (d *Driver) takeDown(r record) error {
	if err := d.volumes.retire(r); err != nil {
		return err
	}
	d.touch(r.Manifest)
	if err := d.at(stepUnpublishRetired); err != nil {
		return err
	}
	if err := detachAll(r.Real); err != nil {
		return err
	}
	if err := d.at(stepUnpublishUnmounted); err != nil {
		return err
	}
	if err := r.target().remove(); err != nil {
		return err
	}
	if err := d.at(stepUnpublishRemoved); err != nil {
		return err
	}
	if err := d.volumes.drop(r); err != nil {
		return err
	}
	if err := d.at(stepUnpublishDropped); err != nil {
		return err
	}
	if err := d.mounts.release(r.mount(), r.Real); err != nil {
		// The volume is gone all the same; the mount is taken off by its next user, or
		// when the driver starts.
		d.log.Error("cannot unmount an image that no volume uses any more", "image", r.Manifest.String(), "error", err)
	}
	return d.at(stepUnpublishReleased)
}
