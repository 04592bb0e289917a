package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

func newMountCommand() *cobra.Command {
	form := argForm{layoutTag, "DIR"}
	var foreground bool
	cmd := &cobra.Command{
		Use:   "mount -f LAYOUT:TAG DIR",
		Short: "Mount an image on a directory",
		Long: `Mount an image, read-only, on the directory DIR and serve it until it is unmounted: by
'csi-puzzlefs umount DIR', by Ctrl-C, or by SIGTERM. As root every user may read the mount, with the
permissions that the image gives; otherwise only the user who mounts it.`,
		Example: `  mkdir -p /tmp/tree /tmp/mnt && echo hello > /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v1
  csi-puzzlefs mount -f /tmp/images:v1 /tmp/mnt`,
		Args: form.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !foreground {
				return usagef(cmd, "mounting in the background is not in this version: add -f, and & to go on in the shell")
			}
			ref, others, err := form.split(cmd, args)
			if err != nil {
				return err
			}
			return withImage(cmd, ref, func(ctx context.Context, im *image.Image) error {
				return serve(ctx, im, others[0])
			})
		},
	}
	cmd.Flags().BoolVarP(&foreground, "foreground", "f", false, "stay in the foreground")
	return cmd
}

// serve mounts an image and waits until it is unmounted. When ctx is done it unmounts it
// itself: at once or, if somebody uses it, lazily, and then serves the last user to the end.
func serve(ctx context.Context, im *image.Image, dir string) error {
	//nolint:contextcheck // the mount is unmounted below, not when its context ends
	s, err := fuse.Mount(fuse.Config{
		Image: im, Dir: dir, FSName: im.Digest().String(), Logger: slog.Default(),
		Debug: slog.Default().Enabled(ctx, slog.LevelDebug),
	})
	if err != nil {
		return err
	}
	slog.Info("mounted", "image", im.Digest().String(), "dir", dir)
	select {
	case <-s.Done():
	case <-ctx.Done():
		err := s.Unmount()
		if errors.Is(err, fuse.ErrBusy) {
			slog.Warn("the mount is in use: it is detached, and served until its last user is gone", "dir", dir)
			err = s.Detach()
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
	s.Wait()
	slog.Info("unmounted", "dir", dir)
	return nil
}

func newUmountCommand() *cobra.Command {
	var lazy bool
	cmd := &cobra.Command{
		Use:   "umount DIR",
		Short: "Unmount an image",
		Long: `Unmount the PuzzleFS image that is mounted on DIR. Its server ends by itself. With --lazy the mount
is taken away from DIR though it is in use, and served until its last user is gone.`,
		Example: `  csi-puzzlefs umount /tmp/mnt`,
		Args:    exactArgs("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			return fuse.Unmount(args[0], lazy)
		},
	}
	cmd.Flags().BoolVar(&lazy, "lazy", false, "unmount though it is in use")
	return cmd
}
