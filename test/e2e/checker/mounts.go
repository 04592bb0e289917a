package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

// mountLine is a mount as it is printed.
type mountLine struct {
	ID      int    `json:"id"`
	Parent  int    `json:"parent"`
	Device  string `json:"device"` // MAJOR:MINOR, the same for all binds of one mount
	Root    string `json:"root"`
	Point   string `json:"mountpoint"`
	Type    string `json:"fstype"`
	Source  string `json:"source"`
	Options string `json:"options"` // the mount's own, by commas
	Super   string `json:"superOptions"`
}

func listMounts(c *call) error {
	pid := c.flags.Int("pid", 1, "whose table: that of the mount namespace of this `process`")
	if _, err := c.parse(); err != nil {
		return err
	}
	table, err := mountinfo.Read(fmt.Sprintf("/proc/%d/mountinfo", *pid))
	if err != nil {
		return err
	}
	lines := make([]mountLine, 0, len(table))
	for _, m := range table {
		lines = append(lines, mountLine{
			ID: m.ID, Parent: m.Parent, Device: string(m.Device), Root: m.Root, Point: m.Point, Type: m.Type, Source: m.Source,
			Options: strings.Join(m.Options, ","), Super: strings.Join(m.SuperOptions, ","),
		})
	}
	enc := json.NewEncoder(c.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(lines)
}
