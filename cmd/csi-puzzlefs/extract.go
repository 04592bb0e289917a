package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/extract"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

func newExtractCommand() *cobra.Command {
	form := argForm{layoutTag, "DIR"}
	return &cobra.Command{
		Use:   "extract LAYOUT:TAG DIR",
		Short: "Write the tree of an image to a directory",
		Long: `Write the tree of an image to the directory DIR, which is made if it does not exist and must
be empty if it does. As root everything is restored; other users get files of their own and
cannot make devices. When extraction fails, what it wrote is removed. LAYOUT TAG may be two
arguments, too.`,
		Example: `  mkdir -p /tmp/tree && echo hello > /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v1
  csi-puzzlefs extract /tmp/images:v1 /tmp/copy`,
		Args: form.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, others, err := form.split(cmd, args)
			if err != nil {
				return err
			}
			return withImage(cmd, ref, func(ctx context.Context, im *image.Image) error {
				m := newMeter(cmd.ErrOrStderr(), "extracting")
				defer m.close()
				total := int64(im.Stats().Bytes)
				return extract.Extract(ctx, extract.Config{
					Image: im, Dir: others[0],
					Progress: func(done int64) { m.set(done, total) },
				})
			})
		},
	}
}
