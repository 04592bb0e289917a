package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/seal"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// parseVerity parses the fs-verity digest of a manifest as build prints it, or with the prefix
// that its JSON has.
func parseVerity(cmd *cobra.Command, text string) (verity.Digest, error) {
	d, err := verity.Parse(strings.ToLower(strings.TrimPrefix(text, "verity:")))
	switch {
	case err == nil:
		return d, nil
	case strings.HasPrefix(text, format.DigestPrefix):
		return d, usagef(cmd, "%.100q is a content digest: want the fs-verity digest of the manifest, 64 hex digits, which build prints first", text)
	}
	return d, usagef(cmd, "digest: %w; build prints it first, as the puzzlefs image manifest digest", err)
}

// sealed is what enable-fs-verity prints with --json.
type sealed struct {
	Image  format.Digest `json:"image"`
	Verity string        `json:"verity"`
	// Blobs are sealed now, NewlySealed of them were not before.
	Blobs       int `json:"blobs"`
	NewlySealed int `json:"newlySealed"`
	// Missing are blobs that no file needs.
	Missing  int      `json:"missing"`
	Warnings []string `json:"warnings"`
	Seconds  float64  `json:"seconds"`
}

func newEnableCommand() *cobra.Command {
	form := argForm{layoutTag, "DIGEST"}
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "enable-fs-verity LAYOUT:TAG DIGEST",
		Short: "Seal an image with the kernel's fs-verity",
		Long: `Seal every blob of an image with the kernel's fs-verity, on a file system that has it: ext4 made with
-O verity, btrfs or f2fs. From then on the kernel refuses writes to the blobs, and checks all that it
reads of them; they can be removed as before. A seal cannot be taken off again, so first the whole
image is checked: DIGEST, which build prints first, must be the fs-verity digest of its manifest.
What is sealed already stays so. LAYOUT TAG may be two arguments, too.

'mount --digest DIGEST' checks the seals. --json prints the digest of the "image", its "verity" digest,
how many "blobs" are sealed and how many are "newlySealed", how many are "missing" that no file needs,
"warnings" and "seconds".`,
		Example: `  mkdir -p /tmp/tree && echo hello > /tmp/tree/greeting
  digest=$(csi-puzzlefs build /tmp/tree /tmp/images:v1 | sed -n '1s/.*: //p')
  csi-puzzlefs enable-fs-verity /tmp/images:v1 "$digest"`,
		Args: form.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, others, err := form.split(cmd, args)
			if err != nil {
				return err
			}
			digest, err := parseVerity(cmd, others[0])
			if err != nil {
				return err
			}
			return withTag(ref, func(s *store.Store, root format.Descriptor) error {
				return enable(cmd, ref, seal.Config{Store: s, Root: root, Digest: digest}, asJSON)
			})
		},
	}
	jsonFlag(cmd, &asJSON)
	return cmd
}

func enable(cmd *cobra.Command, ref layoutRef, cfg seal.Config, asJSON bool) error {
	started := time.Now()
	m := newMeter(cmd.ErrOrStderr(), "checking")
	cfg.Progress = func(done int64) { m.set(done, 0) }
	report, err := seal.Enable(cmd.Context(), cfg)
	m.close()
	if err != nil {
		return err
	}
	warn(cmd, report.Warnings...)
	out := sealed{
		Image: cfg.Root.Digest, Verity: "verity:" + cfg.Digest.String(), Blobs: report.Kernel, NewlySealed: report.Sealed,
		Missing: report.Missing, Warnings: append([]string{}, report.Warnings...), Seconds: secondsSince(started),
	}
	return printResult(cmd, asJSON, out, func(w io.Writer) {
		fmt.Fprintf(w, "sealed %s: %d blobs, %d of them now\n", ref, out.Blobs, out.NewlySealed)
	})
}
