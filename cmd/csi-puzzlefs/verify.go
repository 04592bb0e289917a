package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// verified is what verify prints with --json.
type verified struct {
	Image  format.Digest `json:"image"`
	Inodes uint64        `json:"inodes"`
	// Bytes is the content of all files, StoredBytes that of the blobs that were checked.
	Bytes       uint64            `json:"bytes"`
	Blobs       int               `json:"blobs"`
	StoredBytes int64             `json:"storedBytes"`
	Warnings    []string          `json:"warnings"`
	Problems    []verifiedProblem `json:"problems"`
	Seconds     float64           `json:"seconds"`
}

// verifiedProblem is a blob, with a file that needs it, and what is wrong with it.
type verifiedProblem struct {
	Where string `json:"where"`
	Error string `json:"error"`
}

func newVerifyCommand() *cobra.Command {
	form := argForm{layoutTag}
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify LAYOUT:TAG",
		Short: "Check every byte of an image",
		Long: `Check the metadata of an image, and of every blob its SHA-256 digest, its fs-verity digest, and
that it has the content that files refer to. Problems are printed one per line, with the blob and
a file that needs it; the exit code is 1 if there are any. LAYOUT TAG may be two arguments, too.

--json prints the digest of the "image", its "inodes", the "bytes" of its files, how many "blobs"
were checked, their size as "storedBytes", "warnings", "problems", each with "where" and "error",
and "seconds"; with problems, too.`,
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
				return verify(ctx, cmd, ref, im, asJSON)
			})
		},
	}
	jsonFlag(cmd, &asJSON)
	return cmd
}

func verify(ctx context.Context, cmd *cobra.Command, ref layoutRef, im *image.Image, asJSON bool) error {
	started := time.Now()
	m := newMeter(cmd.ErrOrStderr(), "verifying")
	report, err := im.Verify(ctx, func(done int64) { m.set(done, 0) })
	m.close()
	if err != nil {
		return err
	}
	warn(cmd, report.Warnings[len(im.Warnings()):]...)
	stats := im.Stats()
	out := verified{
		Image: im.Digest(), Inodes: stats.Inodes, Bytes: stats.Bytes, Blobs: report.Blobs, StoredBytes: report.Bytes,
		Warnings: append([]string{}, report.Warnings...), Problems: []verifiedProblem{},
	}
	for _, p := range report.Problems {
		fmt.Fprintf(cmd.ErrOrStderr(), "csi-puzzlefs: %s\n", p)
		out.Problems = append(out.Problems, verifiedProblem{p.Where, p.Err.Error()})
	}
	out.Seconds = secondsSince(started)
	n := len(out.Problems)
	if n == 0 || asJSON {
		err = printResult(cmd, asJSON, out, func(w io.Writer) {
			fmt.Fprintf(w, "verified %s: %d inodes, %d bytes of content in %d blobs of %d bytes\n",
				ref, out.Inodes, out.Bytes, out.Blobs, out.StoredBytes)
		})
	}
	if n > 0 && err == nil {
		err = fmt.Errorf("verify %s: %d problems found: build or pull the image again", ref, n)
	}
	return err
}
