package driver_test

import (
	"context"
	"log/slog"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// mounter serves images with the real FUSE server, as the command does.
type mounter struct{}

func (mounter) Mount(_ context.Context, img *image.Image, dir, source string) (driver.Mount, error) {
	return fuse.Mount(fuse.Config{Image: img, Dir: dir, FSName: source, Logger: slog.New(slog.DiscardHandler)})
}
