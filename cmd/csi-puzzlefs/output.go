package main

import (
	"encoding/json"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// jsonFlag adds --json, which every command has that prints a result. The fields of what is
// printed stand in the command's help; more may be added, none changes its meaning.
//
// Nothing else is different with it. What goes wrong is said on stderr, in words, and by the
// exit code; the object is printed only where the command came to a result, which a list of
// problems is, too.
func jsonFlag(cmd *cobra.Command, asJSON *bool) {
	cmd.Flags().BoolVar(asJSON, "json", false, "print the result as one JSON object, on a line of its own")
}

// printResult prints v as one line of JSON, or what text writes, in columns where there are tabs.
func printResult(cmd *cobra.Command, asJSON bool, v any, text func(w io.Writer)) error {
	if asJSON {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(v)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
	text(w)
	return w.Flush()
}

// secondsSince returns how long something took, to the millisecond.
func secondsSince(started time.Time) float64 {
	return time.Since(started).Round(time.Millisecond).Seconds()
}
