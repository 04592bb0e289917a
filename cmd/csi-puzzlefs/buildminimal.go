package main

import (
	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
)

// minimalFlags say what is left out of an image, as they were given.
type minimalFlags struct {
	noXattrs, noDevices bool
	owner               string
	exclude             []string
}

func (f *minimalFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.BoolVar(&f.noXattrs, "no-xattrs", false, "leave out extended attributes, access control lists and file capabilities included")
	flags.BoolVar(&f.noDevices, "no-devices", false, "leave out character and block devices; fifos and sockets stay")
	flags.StringVar(&f.owner, "owner", "", "let everything belong to `UID:GID`, two numbers")
	flags.StringArrayVar(&f.exclude, "exclude", nil, "leave out the paths that match `PATTERN`, and what is below them; may be given several times")
}

// parse makes sense of the flags.
func (f *minimalFlags) parse(cmd *cobra.Command) (builder.Minimal, error) {
	m := builder.Minimal{NoXattrs: f.noXattrs, NoDevices: f.noDevices}
	if cmd.Flags().Changed("owner") {
		owner, err := builder.ParseOwner(f.owner)
		if err != nil {
			return m, usagef(cmd, "--owner: %w", err)
		}
		m.Owner = &owner
	}
	for _, text := range f.exclude {
		p, err := builder.ParsePattern(text)
		if err != nil {
			return m, usagef(cmd, "--exclude: %w", err)
		}
		m.Exclude = append(m.Exclude, p)
	}
	return m, nil
}
