package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/extract"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// extracted is what extract prints with --json. Sizes are in bytes.
type extracted struct {
	Image format.Digest `json:"image"`
	Dir   string        `json:"dir"`
	Files int64         `json:"files"`
	Bytes int64         `json:"bytes"`
	// ReusedFiles and ReusedBytes are the part that was in the directory already.
	ReusedFiles int64   `json:"reusedFiles"`
	ReusedBytes int64   `json:"reusedBytes"`
	Seconds     float64 `json:"seconds"`
}

func newExtractCommand() *cobra.Command {
	form := argForm{layoutTag, "DIR"}
	var force, asJSON bool
	cmd := &cobra.Command{
		Use:   "extract LAYOUT:TAG DIR",
		Short: "Write the tree of an image to a directory",
		Long: `Write the tree of an image to the directory DIR, which is made if it does not exist and must
be empty if it does. As root everything is restored; other users get files of their own and
cannot make devices. When extraction fails, what it wrote is removed. LAYOUT TAG may be two
arguments, too.

With --force DIR may have content: it completes what an extraction left that was killed, and
corrects what differs. A file stays if its content, every byte of which is compared, is that
of the image, and its owner, mode and attributes are put right; what differs is replaced. What the
image does not have is not touched: extraction refuses to begin, and names it. When it
fails or is interrupted, what was written stays, no file is incomplete under its name, and the
same command completes it.

--json prints the digest of the "image", "dir", the number of "files", hard links counted once,
and their "bytes", "reusedFiles" and "reusedBytes", the part of both that was there
already, and "seconds".`,
		Example: `  mkdir -p /tmp/tree && echo hello > /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v1
  csi-puzzlefs extract /tmp/images:v1 /tmp/copy
  echo good bye > /tmp/copy/greeting
  csi-puzzlefs extract --force /tmp/images:v1 /tmp/copy`,
		Args: form.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			started := time.Now()
			ref, others, err := form.split(cmd, args)
			if err != nil {
				return err
			}
			return withImage(cmd, ref, func(ctx context.Context, im *image.Image) error {
				m := newMeter(cmd.ErrOrStderr(), "extracting")
				total := int64(im.Stats().Bytes)
				r, err := extract.Extract(ctx, extract.Config{
					Image: im, Dir: others[0], Force: force,
					Progress: func(done int64) { m.set(done, total) },
				})
				m.close()
				if err != nil {
					return err
				}
				out := extracted{
					Image: im.Digest(), Dir: others[0], Files: r.Files, Bytes: r.Bytes,
					ReusedFiles: r.ReusedFiles, ReusedBytes: r.ReusedBytes, Seconds: secondsSince(started),
				}
				return printResult(cmd, asJSON, out, func(w io.Writer) {
					fmt.Fprintf(w, "extracted %s to %s: %d files of %d bytes", ref, out.Dir, out.Files, out.Bytes)
					if force {
						fmt.Fprintf(w, ", of which %d of %d bytes were there", out.ReusedFiles, out.ReusedBytes)
					}
					fmt.Fprintln(w)
				})
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "complete and correct what is in DIR already")
	jsonFlag(cmd, &asJSON)
	return cmd
}
