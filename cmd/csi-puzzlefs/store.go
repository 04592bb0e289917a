package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// storeFlags are the flags of all store commands.
type storeFlags struct {
	dir    string
	asJSON bool
}

func newStoreCommand() *cobra.Command {
	var flags storeFlags
	cmd := &cobra.Command{
		Use:   "store",
		Short: "Look after the images on a node",
		Long: `Look after the images that a CSI node driver keeps on its node. The commands work on the driver's
state directory, whether it is running or not. On a cluster:

  kubectl exec -n NAMESPACE POD -- /csi-puzzlefs store ls`,
		Example: `  csi-puzzlefs store ls --state-dir /var/lib/csi-puzzlefs
  csi-puzzlefs store gc --state-dir /var/lib/csi-puzzlefs --quota 20Gi --dry-run
  csi-puzzlefs store verify --state-dir /var/lib/csi-puzzlefs`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef(cmd, "unknown command %q", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVar(&flags.dir, "state-dir", "/var/lib/csi-puzzlefs", "the driver's state `directory`")
	cmd.PersistentFlags().BoolVar(&flags.asJSON, "json", false, "print the result as one JSON object, on a line of its own")
	cmd.AddCommand(newStoreListCommand(&flags), newStoreCollectCommand(&flags), newStoreVerifyCommand(&flags),
		newStorePinCommand(&flags), newStoreUnpinCommand(&flags))
	return cmd
}

// withState opens the state directory and calls fn.
func (f *storeFlags) withState(fn func(s *driver.State) error) error {
	s, err := driver.OpenState(f.dir)
	if err != nil {
		return err
	}
	err = fn(s)
	return errors.Join(err, s.Close())
}

// print prints v as JSON, or what text writes as columns.
func (f *storeFlags) print(cmd *cobra.Command, v any, text func(w io.Writer)) error {
	return printResult(cmd, f.asJSON, v, text)
}

// The JSON of store ls. Bytes are those on the disk.
type (
	storeListing struct {
		Blobs       int          `json:"blobs"`
		Bytes       int64        `json:"bytes"`
		PinnedBytes int64        `json:"pinnedBytes"`
		Orphans     int          `json:"orphans"`
		OrphanBytes int64        `json:"orphanBytes"`
		Images      []storeImage `json:"images"`
	}
	storeImage struct {
		Image        format.Digest `json:"image"`
		Repositories []string      `json:"repositories"`
		OwnBytes     int64         `json:"ownBytes"`
		SharedBytes  int64         `json:"sharedBytes"`
		Blobs        int           `json:"blobs"`
		MissingBlobs int           `json:"missingBlobs"`
		LastUse      *time.Time    `json:"lastUse"`
		Pins         []storePin    `json:"pins"`
		Error        string        `json:"error,omitempty"`
	}
	storePin struct {
		Name  string    `json:"name"`
		Note  string    `json:"note,omitempty"`
		Since time.Time `json:"since"`
	}
)

func newStoreListCommand(flags *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the images on the node",
		Long: `List the images on the node in the order in which they are evicted, with the disk that they take up
alone and together with others, when a volume of them was published or unpublished last, what pins
them, and the repositories that give them to the node without a pod's secret.`,
		Example: `  csi-puzzlefs store ls --state-dir /var/lib/csi-puzzlefs`,
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return flags.withState(func(s *driver.State) error {
				v, images, err := s.Survey(cmd.Context())
				if err != nil {
					return err
				}
				out := storeListing{
					Blobs: v.Blobs, Bytes: v.Bytes, PinnedBytes: v.PinnedBytes, Orphans: v.Orphans, OrphanBytes: v.OrphanBytes,
					Images: []storeImage{},
				}
				for _, im := range images {
					out.Images = append(out.Images, listed(im))
				}
				return flags.print(cmd, out, func(w io.Writer) {
					fmt.Fprintln(w, "IMAGE\tOWN\tSHARED\tLAST USE\tPINS\tREPOSITORIES")
					for i, im := range out.Images {
						fmt.Fprintf(w, "%v\t%s\t%s\t%s\t%s\t%s\n", im.Image, sizeText(im.OwnBytes), sizeText(im.SharedBytes),
							timeText(im.LastUse), pinsText(im.Pins), repositoriesText(images[i]))
					}
					fmt.Fprintf(w, "%d images, %d blobs, %s; pinned: %s; of no image: %s\n",
						len(images), v.Blobs, sizeText(v.Bytes), sizeText(v.PinnedBytes), sizeText(v.OrphanBytes))
				})
			})
		},
	}
}

func listed(im driver.StoredImage) storeImage {
	out := storeImage{
		Image: im.Image, Repositories: append([]string{}, im.Repositories...), OwnBytes: im.Own, SharedBytes: im.Shared,
		Blobs: im.Blobs, MissingBlobs: im.Missing, LastUse: timeOf(im.LastUse), Pins: []storePin{},
	}
	for _, p := range im.Pins {
		out.Pins = append(out.Pins, storePin{Name: p.Name, Note: p.Note, Since: p.Since.UTC()})
	}
	if im.Err != nil {
		out.Error = im.Err.Error()
	}
	return out
}

// repositoriesText says where an image comes from, or what else there is to say of it.
func repositoriesText(im driver.StoredImage) string {
	switch {
	case im.Err != nil:
		return "(its manifest cannot be read)"
	case im.Missing > 0:
		return fmt.Sprintf("(%d of %d blobs are missing)", im.Missing, im.Blobs)
	case im.Recorded && len(im.Repositories) == 0:
		return "(private)"
	case len(im.Repositories) == 0:
		return "-"
	}
	return strings.Join(im.Repositories, ",")
}

// pinsText says who pins an image: "mount, user (models for the demo)".
func pinsText(pins []storePin) string {
	var list []string
	for _, p := range pins {
		owner, _, _ := strings.Cut(p.Name, "-")
		if p.Name == driver.UserPin && p.Note != "" {
			owner += " (" + p.Note + ")"
		}
		list = append(list, owner)
	}
	if len(list) == 0 {
		return "-"
	}
	return strings.Join(list, ", ")
}

// timeOf returns t, or nil for the zero time.
func timeOf(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC().Truncate(time.Second)
	return &t
}

func timeText(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return t.Format(time.RFC3339)
}

// sizeText writes a number of bytes with a binary unit.
func sizeText(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	value, i := float64(n), 0
	for value >= 1024 && i < len(units)-1 {
		value, i = value/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", value, units[i])
}

// The JSON of store gc.
type (
	storeCollected struct {
		DryRun      bool           `json:"dryRun"`
		Evicted     []storeEvicted `json:"evicted"`
		Orphans     int            `json:"orphans"`
		OrphanBytes int64          `json:"orphanBytes"`
		Blobs       int            `json:"blobs"`
		Bytes       int64          `json:"bytes"`
		LeftBytes   int64          `json:"leftBytes"`
		PinnedBytes int64          `json:"pinnedBytes"`
	}
	storeEvicted struct {
		Image   format.Digest `json:"image"`
		Bytes   int64         `json:"bytes"`
		LastUse *time.Time    `json:"lastUse"`
	}
)

func newStoreCollectCommand(flags *storeFlags) *cobra.Command {
	var opts driver.CollectOptions
	var quota, reserve string
	cmd := &cobra.Command{
		Use:   "gc [--all | --quota QUANTITY | --reserve QUANTITY|PERCENT]",
		Short: "Remove images that no volume uses",
		Long: `Remove images that no volume uses, least recently used first, until the quota or the reserve holds; or
all of them. Without a flag only blobs go that belong to no image for an hour or longer. Images
that are mounted, pinned or being pulled stay, and so does every blob that they share with others.
What is removed is fetched again when a pod needs it.`,
		Example: `  csi-puzzlefs store gc --state-dir /var/lib/csi-puzzlefs --quota 20Gi --dry-run`,
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if opts.Quota, err = driver.ParseQuantity(quota); err != nil {
				return usagef(cmd, "--quota: %w", err)
			}
			if cmd.Flags().Changed("quota") && opts.Quota == 0 {
				return usagef(cmd, "--quota 0: say --all to remove all images that no volume uses")
			}
			if opts.Reserve, err = driver.ParseReserve(reserve); err != nil {
				return usagef(cmd, "--reserve: %w", err)
			}
			return flags.withState(func(s *driver.State) error {
				c, err := s.Collect(cmd.Context(), opts)
				// What was removed before an error is gone, too.
				return errors.Join(printCollected(cmd, flags, c, opts.DryRun), err)
			})
		},
	}
	cmd.Flags().BoolVar(&opts.All, "all", false, "remove all images that no volume uses")
	cmd.Flags().StringVar(&quota, "quota", "0", "`quantity` of disk that images may take up, such as 20Gi")
	cmd.Flags().StringVar(&reserve, "reserve", "0", "`quantity or percentage` of the disk that is to be free")
	cmd.Flags().BoolVar(&opts.DryRun, "dry-run", false, "only say what would be removed")
	cmd.MarkFlagsMutuallyExclusive("all", "quota")
	cmd.MarkFlagsMutuallyExclusive("all", "reserve")
	return cmd
}

func printCollected(cmd *cobra.Command, flags *storeFlags, c store.Collected, dryRun bool) error {
	out := storeCollected{
		DryRun: dryRun, Evicted: []storeEvicted{}, Orphans: c.Orphans, OrphanBytes: c.OrphanBytes,
		Blobs: c.Blobs, Bytes: c.Bytes, LeftBytes: c.Left, PinnedBytes: c.Pinned,
	}
	for _, e := range c.Evicted {
		out.Evicted = append(out.Evicted, storeEvicted{Image: e.Image, Bytes: e.Bytes, LastUse: timeOf(e.LastUse)})
	}
	verb := "removed"
	if dryRun {
		verb = "would remove"
	}
	return flags.print(cmd, out, func(w io.Writer) {
		for _, e := range out.Evicted {
			fmt.Fprintf(w, "%s %v\t%s\tlast used %s\n", verb, e.Image, sizeText(e.Bytes), timeText(e.LastUse))
		}
		fmt.Fprintf(w, "%s %d images, and %d blobs of no image: %s in all; left: %s, pinned: %s\n",
			verb, len(out.Evicted), c.Orphans, sizeText(c.Bytes), sizeText(c.Left), sizeText(c.Pinned))
	})
}

// The JSON of store verify.
type (
	storeVerified struct {
		Blobs   int            `json:"blobs"`
		Bytes   int64          `json:"bytes"`
		Corrupt []storeDamaged `json:"corrupt"`
		Missing []storeDamaged `json:"missing"`
	}
	storeDamaged struct {
		Blob    format.Digest   `json:"blob"`
		Images  []format.Digest `json:"images"`
		Removed bool            `json:"removed"`
	}
)

func newStoreVerifyCommand(flags *storeFlags) *cobra.Command {
	var repair bool
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Check every blob on the node",
		Long: `Read every blob on the node and check it against its digest. Corrupt blobs are printed one per line with
the images that need them, and so are blobs that pinned and mounted images lack; the exit code is
1 if there are any. With --repair corrupt blobs are removed: nobody can read them anyway, and
the next publish of a volume of their images fetches them again.`,
		Example: `  csi-puzzlefs store verify --state-dir /var/lib/csi-puzzlefs`,
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return flags.withState(func(s *driver.State) error {
				m := newMeter(cmd.ErrOrStderr(), "verifying")
				v, err := s.Verify(cmd.Context(), repair, func(done int64) { m.set(done, 0) })
				m.close()
				if err != nil {
					return err
				}
				out := storeVerified{Blobs: v.Blobs, Bytes: v.Bytes, Corrupt: damaged(v.Corrupt), Missing: damaged(v.Missing)}
				err = flags.print(cmd, out, func(w io.Writer) { printVerified(w, out) })
				bad := len(v.Missing)
				if !repair {
					bad += len(v.Corrupt)
				}
				if bad > 0 && err == nil {
					err = fmt.Errorf("verify %s: %d blobs are corrupt and %d are missing; remove corrupt ones with --repair, and publish volumes of the images again, which fetches what is not there",
						flags.dir, len(v.Corrupt), len(v.Missing))
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "remove corrupt blobs, so that they are fetched again")
	return cmd
}

func damaged(list []driver.DamagedBlob) []storeDamaged {
	out := []storeDamaged{}
	for _, d := range list {
		out = append(out, storeDamaged{Blob: d.Blob, Images: append([]format.Digest{}, d.Images...), Removed: d.Removed})
	}
	return out
}

func printVerified(w io.Writer, v storeVerified) {
	for _, d := range v.Corrupt {
		did := "corrupt"
		if d.Removed {
			did = "corrupt and removed"
		}
		fmt.Fprintf(w, "%v is %s, %s\n", d.Blob, did, neededBy(d.Images))
	}
	for _, d := range v.Missing {
		fmt.Fprintf(w, "%v is missing, %s\n", d.Blob, neededBy(d.Images))
	}
	fmt.Fprintf(w, "checked %d blobs of %s: %d corrupt, %d missing\n", v.Blobs, sizeText(v.Bytes), len(v.Corrupt), len(v.Missing))
}

func neededBy(images []format.Digest) string {
	if len(images) == 0 {
		return "needed by no image"
	}
	var list []string
	for _, d := range images {
		list = append(list, d.String())
	}
	return "needed by " + strings.Join(list, ", ")
}

// imageArg parses the DIGEST of a command.
func imageArg(cmd *cobra.Command, text string) (format.Digest, error) {
	d, err := format.ParseDigest(text)
	if err != nil {
		return d, usagef(cmd, "%q is no digest; give the sha256:<64 hex> of an image that %s ls prints", text, cmd.Parent().CommandPath())
	}
	return d, nil
}

func newStorePinCommand(flags *storeFlags) *cobra.Command {
	var note string
	cmd := &cobra.Command{
		Use:   "pin DIGEST",
		Short: "Keep an image on the node though no volume uses it",
		Long: `Keep an image on the node though no volume uses it, until it is unpinned. Pinning it again changes the
note. A quota holds for pinned images, too: what they take up is not there for others.`,
		Example: `  csi-puzzlefs store pin --state-dir /var/lib/csi-puzzlefs --note "nightly jobs" sha256:…`,
		Args:    exactArgs("DIGEST"),
		RunE: func(cmd *cobra.Command, args []string) error {
			image, err := imageArg(cmd, args[0])
			if err != nil {
				return err
			}
			return flags.withState(func(s *driver.State) error {
				if err := s.Pin(cmd.Context(), image, note); err != nil {
					return err
				}
				return flags.print(cmd, map[string]any{"pinned": image, "note": note}, func(w io.Writer) {
					fmt.Fprintf(w, "pinned %v\n", image)
				})
			})
		},
	}
	cmd.Flags().StringVar(&note, "note", "", "`text` that ls shows")
	return cmd
}

func newStoreUnpinCommand(flags *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use:     "unpin DIGEST",
		Short:   "Undo pin",
		Long:    `Undo pin. The image stays until its room is needed, and as long as it is mounted.`,
		Example: `  csi-puzzlefs store unpin --state-dir /var/lib/csi-puzzlefs sha256:…`,
		Args:    exactArgs("DIGEST"),
		RunE: func(cmd *cobra.Command, args []string) error {
			image, err := imageArg(cmd, args[0])
			if err != nil {
				return err
			}
			return flags.withState(func(s *driver.State) error {
				if err := s.Unpin(image); err != nil {
					return err
				}
				return flags.print(cmd, map[string]any{"unpinned": image}, func(w io.Writer) {
					fmt.Fprintf(w, "unpinned %v\n", image)
				})
			})
		},
	}
}
