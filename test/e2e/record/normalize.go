package record

import (
	"regexp"
	"slices"
	"strings"
)

// What differs from one run to the next although nothing has changed, and what is recorded instead. Only what
// the session's commands print is here: whatever else varies must show as a difference.
var (
	// The API server ends the names of a DaemonSet's pods with five of these characters.
	podSuffix = regexp.MustCompile(`\b(pod/csi-puzzlefs-)[bcdfghjklmnpqrstvwxz2456789]{5}\b`)
	// Helm says when.
	deployed = regexp.MustCompile(`(?m)^(LAST DEPLOYED: ).*$`)
	// The scheduler chooses a node.
	assigned = regexp.MustCompile(`(?m)\b(Successfully assigned default/inline-volume to ).*$`)
	// kubectl describe sets the events in columns, of which the third has ages such as 3s or "2s (x3 over 4s)".
	columns = regexp.MustCompile(` {2,}`)
)

// normalize replaces what varies in a command's output.
func normalize(output string) string {
	output = podSuffix.ReplaceAllString(output, "${1}xxxxx")
	output = deployed.ReplaceAllString(output, "${1}…")
	output = assigned.ReplaceAllString(output, "${1}NODE")
	return normalizeEvents(output)
}

// normalizeEvents sets the events that kubectl describe shows anew: with one age, and in one order, the scheduler's first and
// kubelet's last. They come within a moment, so that their order is chance, and the width of a column depends on the
// ages in it.
func normalizeEvents(output string) string {
	head, events, found := strings.Cut(output, "\nEvents:\n")
	if !found {
		if events, found = strings.CutPrefix(output, "Events:\n"); !found {
			return output
		}
	} else {
		head += "\n"
	}
	var rows [][]string
	for line := range strings.Lines(events) {
		cells := columns.Split(strings.TrimSpace(line), 5)
		if len(cells) != 5 {
			return output // not the table that it was taken for
		}
		if len(rows) > 1 {
			cells[2] = "0s"
		}
		rows = append(rows, cells)
	}
	if len(rows) < 2 {
		return output
	}
	slices.SortStableFunc(rows[2:], func(a, b []string) int { return sender(a) - sender(b) })
	return head + "Events:\n" + table(rows)
}

// sender ranks an event by who sent it.
func sender(event []string) int {
	switch event[3] {
	case "default-scheduler":
		return 0
	case "kubelet":
		return 2
	}
	return 1
}

// table sets rows in columns, indented and two spaces apart as kubectl does it.
func table(rows [][]string) string {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], len(cell))
		}
	}
	var b strings.Builder
	for _, row := range rows {
		b.WriteByte(' ')
		for i, cell := range row {
			pad := "  "
			if i == 0 {
				pad = " "
			}
			b.WriteString(pad + cell)
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-len(cell)))
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// cut leaves the lines of output that a step shows, and says with an ellipsis where there were more.
func (s *Step) cut(output string) string {
	lines := slices.Collect(strings.Lines(output))
	if s.From != nil {
		if i := slices.IndexFunc(lines, s.From.MatchString); i > 0 {
			lines = append([]string{ellipsis}, lines[i:]...)
		}
	}
	if s.Until != nil {
		if i := slices.IndexFunc(lines, s.Until.MatchString); i >= 0 {
			lines = append(lines[:i:i], ellipsis)
		}
	}
	return strings.Join(lines, "")
}

// ellipsis stands for lines that are not shown.
const ellipsis = "[…]\n"
