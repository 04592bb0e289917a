package main

import (
	"encoding/json"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

func newInspectCommand() *cobra.Command {
	form := argForm{layoutTag}
	return &cobra.Command{
		Use:   "inspect LAYOUT:TAG",
		Short: "Print the metadata of an image as JSON",
		Long: `Print the metadata of an image as one JSON object: "manifest" with the digests that name the
image and its annotations, "rootfs" with the content that 'capnp convert binary:json' prints for the rootfs blob, and
"layers" with the same for the metadata blobs of images of versions 1 and 2. LAYOUT TAG may be two
arguments, too.`,
		Example: `  mkdir -p /tmp/tree && echo hello > /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v1
  csi-puzzlefs inspect /tmp/images:v1`,
		Args: form.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, _, err := form.split(cmd, args)
			if err != nil {
				return err
			}
			return withTag(ref, func(s *store.Store, root format.Descriptor) error {
				out, err := image.Inspect(cmd.Context(), s, root)
				if err != nil {
					return err
				}
				return json.NewEncoder(cmd.OutOrStdout()).Encode(out)
			})
		},
	}
}
