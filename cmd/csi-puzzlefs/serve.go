package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/overlay"
)

// mounted is an image that is mounted, perhaps with a writable overlay on top.
type mounted struct {
	dir     string
	fuse    *fuse.Server
	overlay *overlay.Overlay // nil for a mount that is read-only
	undo    func() error     // removes directories that were made
}

// mount mounts an image. When it fails nothing is mounted and nothing was made.
func (p *mountPlan) mount(ctx context.Context, im *image.Image) (_ *mounted, err error) {
	cfg := fuse.Config{
		Image: im, Dir: p.dir, FSName: im.Digest().String(), Logger: slog.Default(),
		Debug: slog.Default().Enabled(ctx, slog.LevelDebug),
	}
	p.options.apply(&cfg)
	m := &mounted{dir: p.dir, undo: func() error { return nil }}
	if !p.writable {
		m.fuse, err = fuse.Mount(cfg) //nolint:contextcheck // the mount is unmounted by who called, not when its context ends
		return m, err
	}
	dirs, undo, err := overlay.MakeDirs(p.dir, p.upper)
	if err != nil {
		return nil, err
	}
	m.undo, cfg.Dir = undo, dirs.Lower
	if m.fuse, err = fuse.Mount(cfg); err != nil { //nolint:contextcheck // as above
		return nil, errors.Join(err, undo())
	}
	m.overlay, err = overlay.Mount(overlay.Config{
		Dirs: dirs, Tree: im.Digest().String(), Dev: cfg.Dev, Suid: cfg.Suid, NoExec: cfg.NoExec, NoAtime: cfg.NoAtime,
	})
	if err != nil {
		return nil, errors.Join(err, m.discard())
	}
	if previous := m.overlay.PreviousTree; previous != "" && previous != im.Digest().String() {
		p.warn(fmt.Sprintf("%s has changes of another image, %s: files that differ between the images may be wrong", dirs.Upper, previous))
	}
	return m, nil
}

// unmount takes the mounts off: at once or, where somebody uses them, lazily.
func (m *mounted) unmount() error {
	if m.overlay != nil {
		err := m.overlay.Unmount(false)
		if errors.Is(err, overlay.ErrBusy) {
			m.sayBusy()
			err = m.overlay.Unmount(true)
		}
		if err != nil {
			return err
		}
	}
	err := m.fuse.Unmount()
	if errors.Is(err, fuse.ErrBusy) {
		m.sayBusy()
		err = m.fuse.Detach()
	}
	return err
}

func (m *mounted) sayBusy() {
	slog.Warn("the mount is in use: it is detached, and served until its last user is gone", "dir", m.dir)
}

// discard undoes a mount that nobody was told of.
func (m *mounted) discard() error {
	err := m.unmount()
	if err == nil {
		m.fuse.Wait()
	}
	return errors.Join(err, m.undo())
}

// wait returns when the image is unmounted, by whomever. When ctx is done it unmounts it
// itself, and serves the last user to the end.
func (m *mounted) wait(ctx context.Context) error {
	watch, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	uncovered := make(chan error, 1)
	if m.overlay != nil {
		watching.Go(func() { uncovered <- m.overlay.Wait(watch) })
	}
	var err error
	select {
	case <-m.fuse.Done():
		if m.overlay != nil {
			// What is below is gone, so there is nothing left to use.
			err = m.overlay.Unmount(true)
		}
	case err = <-uncovered:
		if ctx.Err() != nil {
			err = nil // that is why it returned
		}
		err = errors.Join(err, m.unmount())
	case <-ctx.Done():
		err = m.unmount()
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", m.dir, err)
	}
	m.fuse.Wait()
	return nil
}

// serve mounts an image, calls ready, tells whoever reads the pipe, and waits until the image
// is unmounted. When ctx is done it unmounts it itself.
func (p *mountPlan) serve(ctx context.Context, im *image.Image, pipe *initPipe, ready func() error) error {
	collectForServer(im)
	m, err := p.mount(ctx, im)
	if err != nil {
		return err
	}
	if err = ctx.Err(); err == nil {
		err = ready()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("mount %s on %s: %w", p.ref, p.dir, err), m.discard())
	}
	slog.Info("mounted", "image", im.Digest().String(), "dir", p.dir)
	telling, cancel := context.WithCancel(ctx)
	told := make(chan struct{})
	go func() {
		defer close(told)
		if err := pipe.tell(telling, toldSuccess); err != nil {
			slog.Warn("nobody was told that the image is mounted", "error", err)
		}
	}()
	err = m.wait(ctx)
	cancel()
	<-told
	if err != nil {
		return err
	}
	slog.Info("unmounted", "dir", p.dir)
	return nil
}
