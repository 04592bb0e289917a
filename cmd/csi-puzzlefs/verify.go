package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

func newVerifyCommand() *cobra.Command {
	form := argForm{layoutTag}
	return &cobra.Command{
		Use:   "verify LAYOUT:TAG",
		Short: "Check every byte of an image",
		Long: `Check the metadata of an image, and of every blob its SHA-256 digest, its fs-verity digest, and
that it has the content that files refer to. Problems are printed one per line, with the blob and
a file that needs it; the exit code is 1 if there are any. LAYOUT TAG may be two arguments, too.`,
		Example: `  mkdir -p /tmp/tree && echo hello > /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v1
  csi-puzzlefs verify /tmp/images:v1`,
		Args: form.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, _, err := form.split(cmd, args)
			if err != nil {
				return err
			}
			return withImage(cmd, ref, func(ctx context.Context, im *image.Image) error {
				m := newMeter(cmd.ErrOrStderr(), "verifying")
				report, err := im.Verify(ctx, func(done int64) { m.set(done, 0) })
				m.close()
				if err != nil {
					return err
				}
				warn(cmd, report.Warnings[len(im.Warnings()):]...)
				for _, p := range report.Problems {
					fmt.Fprintf(cmd.ErrOrStderr(), "csi-puzzlefs: %s\n", p)
				}
				if n := len(report.Problems); n > 0 {
					return fmt.Errorf("verify %s: %d problems found: build or pull the image again", ref, n)
				}
				stats := im.Stats()
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "verified %s: %d inodes, %d bytes of content in %d blobs of %d bytes\n",
					ref, stats.Inodes, stats.Bytes, report.Blobs, report.Bytes)
				return err
			})
		},
	}
}
