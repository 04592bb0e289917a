package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/overlay"
)

func newUmountCommand() *cobra.Command {
	var lazy bool
	cmd := &cobra.Command{
		Use:   "umount DIR",
		Short: "Unmount an image",
		Long: `Unmount the PuzzleFS image that is mounted on DIR, read-only or with a writable overlay, whose
directories stay. Its server ends by itself. With --lazy the mount is taken away from DIR though it is
in use, and served until its last user is gone.`,
		Example: `  csi-puzzlefs umount /tmp/mnt`,
		Args:    exactArgs("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			return unmount(args[0], lazy)
		},
	}
	cmd.Flags().BoolVar(&lazy, "lazy", false, "unmount though it is in use")
	return cmd
}

// unmount unmounts what the mount command mounted on a directory.
func unmount(dir string, lazy bool) error {
	o, err := overlay.Find(dir)
	if errors.Is(err, overlay.ErrNotMounted) {
		return fuse.Unmount(dir, lazy)
	}
	if err != nil {
		return err
	}
	if err := o.Unmount(lazy); err != nil {
		return err
	}
	// Nobody gets there by way of the overlay any longer. The server, if it is not dead, does the
	// same.
	if err := fuse.Unmount(o.Lower[0], true); err != nil && !errors.Is(err, fuse.ErrNotMounted) {
		return err
	}
	return nil
}

// findMounted reports whether something that unmount may unmount is on a directory.
func findMounted(dir string) bool {
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return true // so that nothing is touched
	}
	_, stack, _ := table.Find(dir)
	return len(stack) > 0
}
