package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/overlay"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

func newCommitCommand() *cobra.Command {
	var flags buildFlags
	cmd := &cobra.Command{
		Use:   "commit DIR LAYOUT:TAG [--push REF]",
		Short: "Build an image of what is in a writable mount",
		Long: `Build an image of the tree that is mounted on DIR by 'csi-puzzlefs mount -w' or '-p', or of any other
overlay over one mounted image, and tag it in the OCI image layout LAYOUT. Only what was changed
is read: the new image is a delta on the one that is mounted, which has to be in LAYOUT. The mount
can be used on, and committed again; but nothing must change while this runs. LAYOUT TAG may be two
arguments, too.

What is printed, and what the flags mean, is as in 'csi-puzzlefs build'.`,
		Example: `  mkdir -p /tmp/tree /tmp/mnt && echo hello > /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v1
  csi-puzzlefs mount -w /tmp/images:v1 /tmp/mnt
  echo world >> /tmp/mnt/greeting
  csi-puzzlefs commit /tmp/mnt /tmp/images:v2`,
		Args: argForm{"DIR", layoutTag}.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			result, err := runCommit(cmd, args, &flags)
			if err == nil {
				err = result.print(cmd, flags.json)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&flags.push, "push", "", "push the image to this `REF` as well: registry.example/name[:tag]")
	f.StringVarP(&flags.base, "base-layer", "b", "", "the `tag` of the image that is mounted; default the one that the table of mounts names")
	flags.addCompression(cmd)
	f.StringVar(&flags.chunker, "chunker", "canonical", "how to cut: `canonical|jotfs[:AVERAGE]`, as the base was")
	flags.upperXattrs = "auto"
	jsonFlag(cmd, &flags.json)
	flags.minimal.add(cmd)
	flags.registry.add(cmd)
	return cmd
}

// runCommit finds the directories of a writable mount and builds from them.
func runCommit(cmd *cobra.Command, args []string, flags *buildFlags) (_ *buildResult, err error) {
	dir, args := args[0], args[1:]
	defer func() {
		if err != nil {
			err = fmt.Errorf("commit %s: %w", dir, err)
		}
	}()
	o, err := findOverlay(dir)
	if err != nil {
		return nil, err
	}
	if flags.base == "" {
		if flags.mounted, err = mountedImage(o.Lower[0]); err != nil {
			return nil, err
		}
	}
	if err := syncTree(dir); err != nil {
		return nil, err
	}
	if flags.upperDir, err = o.OpenUpper(); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, flags.upperDir.Close()) }()
	flags.upper = o.Upper
	return runBuild(cmd, args, flags)
}

// findOverlay returns the overlay that is mounted on a directory.
func findOverlay(dir string) (*overlay.Overlay, error) {
	o, err := overlay.Find(dir)
	switch {
	case errors.Is(err, overlay.ErrNotMounted):
		return nil, fmt.Errorf("%w: commit is for what 'csi-puzzlefs mount -w' mounts; 'csi-puzzlefs build' makes an image of any directory", err)
	case err != nil:
		return nil, err
	case len(o.Lower) != 1:
		return nil, fmt.Errorf("the overlay that is mounted there has %d lower directories: only one over a single image can be committed", len(o.Lower))
	}
	return o, nil
}

// mountedImage returns the digest of the image that is mounted on a directory, which the
// overlay may hide.
func mountedImage(lower string) (format.Digest, error) {
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return format.Digest{}, err
	}
	unknown := func(what string) (format.Digest, error) {
		return format.Digest{}, fmt.Errorf("nothing tells which image is below the overlay, as %s: name its tag in the layout with --base-layer", what)
	}
	// An absolute path, as overlays of ours have, is found without being looked at.
	_, stack, err := table.Find(lower)
	switch {
	case err != nil || len(stack) == 0:
		return unknown("nothing is mounted on " + lower)
	case !strings.HasPrefix(stack[0].Type, imageType):
		return unknown(fmt.Sprintf("a file system of type %s is mounted on %s", stack[0].Type, lower))
	}
	// The source is what the option fsname of the mount says, else the digest.
	d, err := format.ParseDigest(stack[0].Source)
	if err != nil {
		return unknown(fmt.Sprintf("the source of the mount on %s is %q", lower, stack[0].Source))
	}
	return d, nil
}

// imageType is how the type of our mounts in the table of mounts begins; what follows is what the
// option subtype of the mount says.
const imageType = "fuse."

// syncTree lets what was written to a mount reach its directories.
func syncTree(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open it: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("sync it: %w", err)
	}
	return nil
}

// checkMounted makes sure that the layout has the image that is mounted.
func (f *buildFlags) checkMounted(s *store.Store) error {
	if f.mounted.IsZero() {
		return nil
	}
	_, err := s.Size(f.mounted)
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("the image that is mounted there, %s, is not in %s: commit to the layout that it was mounted from, push it from there and pull it into %s first, or name an image that has the same tree with --base-layer",
			f.mounted, s.Dir(), s.Dir())
	}
	return err
}
