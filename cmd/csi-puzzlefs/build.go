package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

func newBuildCommand() *cobra.Command {
	var base, chunker string
	var compress bool
	cmd := &cobra.Command{
		Use:   "build ROOTFS LAYOUT:TAG",
		Short: "Build an image from a directory",
		Long: `Build an image from the directory ROOTFS and tag it in the OCI image layout LAYOUT,
which is made if it does not exist. The tree must not change meanwhile.

The same tree gives the same image, and without --compression and with the canonical
chunker the same digests as the reference implementation's. The first line that is printed is
the fs-verity digest of the image manifest, which the PuzzleFS tools take, the second
its content digest, which registries and Kubernetes take.`,
		Example: `  mkdir -p /tmp/tree && echo hello > /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v1
  echo world >> /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v2 --base-layer v1`,
		Args: exactArgs("ROOTFS", "LAYOUT:TAG"),
		RunE: func(cmd *cobra.Command, args []string) error {
			algorithm, err := chunk.ParseAlgorithm(chunker)
			if err != nil {
				return usagef(cmd, "--chunker: %w", err)
			}
			cfg := builder.Config{Dir: args[0], Base: base, Compress: compress, Chunker: algorithm}
			return build(cmd, cfg, args[1])
		},
	}
	cmd.Flags().StringVarP(&base, "base-layer", "b", "", "build a delta on the image of this `tag` in the same layout")
	cmd.Flags().BoolVarP(&compress, "compression", "c", false, "store chunks as seekable zstd where that is smaller")
	cmd.Flags().StringVar(&chunker, "chunker", "canonical", "how to cut: `canonical|jotfs[:AVERAGE]`; an average of 16K to 4M, for images that need not share chunks with others")
	return cmd
}

func build(cmd *cobra.Command, cfg builder.Config, ref string) error {
	dir, tag, err := splitRef(cmd, ref)
	if err != nil {
		return err
	}
	// Looked at here so that a mistyped source does not leave an empty layout.
	if fi, err := os.Stat(cfg.Dir); err != nil {
		return fmt.Errorf("build %s: %w", ref, err)
	} else if !fi.IsDir() {
		return fmt.Errorf("build %s: %s is not a directory", ref, cfg.Dir)
	}
	s, err := store.Open(store.Config{Dir: dir, Create: cfg.Base == ""})
	if err != nil {
		return err
	}
	m := newMeter(cmd.ErrOrStderr(), "building")
	cfg.Store, cfg.Tag = s, tag
	cfg.Progress = func(p builder.Progress) { m.set(p.Bytes, 0) }
	result, err := builder.Build(cmd.Context(), cfg)
	m.close()
	if err = errors.Join(err, s.Close()); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "puzzlefs image manifest digest: %s\noci image manifest digest: %s\n", result.Verity, result.Manifest.Digest)
	return err
}
