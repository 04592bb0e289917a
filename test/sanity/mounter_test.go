package sanity_test

import (
	"context"
	"log/slog"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// mounter serves images with the real FUSE server, as the command does.
type mounter struct{}

func (mounter) Mount(_ context.Context, img *image.Image, spec driver.MountSpec) (driver.Mount, error) {
	return fuse.Mount(fuse.Config{
		Image: img, Dir: spec.Dir, FSName: spec.Source, Logger: slog.New(slog.DiscardHandler),
		ModTime: spec.ModTime, Dev: spec.Dev, Suid: spec.Suid, NoExec: spec.NoExec, SELinux: spec.SELinux,
	})
}
