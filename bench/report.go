package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// unit is what a figure counts.
type unit string

const (
	seconds        unit = "s"
	bytesUnit      unit = "MB"
	bytesPerSecond unit = "GB/s"
	perSecond      unit = "1/s"
)

// more reports whether larger figures are better.
func (u unit) more() bool { return u == bytesPerSecond || u == perSecond }

// format writes a figure.
func (u unit) format(v float64) string {
	switch {
	case u == bytesUnit:
		return fmt.Sprintf("%.0f", v/1e6)
	case u == bytesPerSecond:
		return fmt.Sprintf("%.2f", v/1e9)
	case u == perSecond:
		return fmt.Sprintf("%.0f", v)
	case v < 1:
		return fmt.Sprintf("%.3f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// report is what one run of the benchmarks found.
type report struct {
	When, Kernel, CPU string
	CPUs, Runs        int
	Trees             []string
	Results           []*result
}

// result is one measurement: seconds, bytes, or bytes or times a second.
type result struct {
	Name    string
	Unit    unit
	On      string // the file system of what was read and written
	Figures []figure
	// Failed are contenders that failed in one of the runs, or took too long.
	Failed []string `json:",omitempty"`
}

// figure is what was measured of a contender, run by run.
type figure struct {
	Contender string
	Runs      []float64
}

func (r *result) add(contender string, v float64) {
	i := slices.IndexFunc(r.Figures, func(f figure) bool { return f.Contender == contender })
	if i < 0 {
		i = len(r.Figures)
		r.Figures = append(r.Figures, figure{Contender: contender})
	}
	r.Figures[i].Runs = append(r.Figures[i].Runs, v)
}

func (f figure) median() float64 {
	sorted := slices.Sorted(slices.Values(f.Runs))
	return sorted[len(sorted)/2]
}

// ratio says how many times better the first contender of a result is than f; less than 1 is worse.
func (r *result) ratio(f figure) float64 {
	if r.Unit.more() {
		return r.Figures[0].median() / f.median()
	}
	return f.median() / r.Figures[0].median()
}

// text is a table of one result.
func (r *result) text() string {
	var s strings.Builder
	fmt.Fprintf(&s, "\n### %s\n\n| | %s, on %s | %s is better by |\n|---|---|---|\n", r.Name, r.Unit, r.On, r.Figures[0].Contender)
	for i, f := range r.Figures {
		note, ratio := "", ""
		if len(f.Runs) == 1 {
			note = " (1 run)"
		}
		if i > 0 {
			ratio = fmt.Sprintf("%.2f", r.ratio(f))
		}
		fmt.Fprintf(&s, "| %s | %s%s | %s |\n", f.Contender, r.Unit.format(f.median()), note, ratio)
	}
	for _, name := range r.Failed {
		fmt.Fprintf(&s, "\n%s failed or was given up.\n", name)
	}
	return s.String()
}

// continueFrom adds what an earlier run on the same machine and trees found and wrote to dir.
func (r *report) continueFrom(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, figuresFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var earlier report
	if err == nil {
		err = json.Unmarshal(b, &earlier)
	}
	if err != nil {
		return fmt.Errorf("read earlier figures: %w", err)
	}
	if earlier.Kernel == r.Kernel && earlier.CPU == r.CPU && earlier.CPUs == r.CPUs && earlier.Runs == r.Runs && slices.Equal(earlier.Trees, r.Trees) {
		r.Results = earlier.Results
	}
	return nil
}

// set adds a result. It takes the place of an earlier one of that name.
func (r *report) set(result *result) {
	for i := range r.Results {
		if r.Results[i].Name == result.Name {
			r.Results[i] = result
			return
		}
	}
	r.Results = append(r.Results, result)
}

// sort orders the results as they are measured.
func (r *report) sort(all []measurement) {
	place := make(map[string]int, len(all))
	for i, m := range all {
		place[m.name] = i
	}
	slices.SortStableFunc(r.Results, func(a, b *result) int { return cmp.Compare(place[a.Name], place[b.Name]) })
}

// figuresFile has the figures, run by run.
const figuresFile = "figures.json"

// write writes the report: all figures, which aims were reached, tables, and a chart for each result.
func (r *report) write(dir string, aims []aim) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	figures, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "# Results\n\nMade by `make bench` on %s: %d CPUs (%s), Linux %s; medians of %d runs, all in figures.json.\n\n", r.When, r.CPUs, r.CPU, r.Kernel, r.Runs)
	for _, t := range r.Trees {
		fmt.Fprintf(&text, "- %s\n", t)
	}
	text.WriteString(r.aimsTable(aims))
	files := map[string][]byte{figuresFile: append(figures, '\n')}
	for _, result := range r.Results {
		chart := strings.Map(func(c rune) rune {
			if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
				return c
			}
			return '-'
		}, strings.ToLower(result.Name)) + ".svg"
		files[chart] = result.chart()
		fmt.Fprintf(&text, "%s\n![%s](%s)\n", result.text(), result.Name, chart)
	}
	files["README.md"] = []byte(text.String())
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Sizes in a chart, in pixels.
const (
	chartWidth  = 720
	labelWidth  = 150
	figureWidth = 90
	barHeight   = 22
	barGap      = 6
	titleHeight = 34
)

// chart draws a bar for each contender.
func (r *result) chart() []byte {
	longest := 0.0
	for _, f := range r.Figures {
		longest = max(longest, f.median())
	}
	better := "less is better"
	if r.Unit.more() {
		better = "more is better"
	}
	height := titleHeight + len(r.Figures)*(barHeight+barGap)
	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="13">`+"\n", chartWidth, height)
	fmt.Fprintf(&s, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", chartWidth, height)
	fmt.Fprintf(&s, `<text x="8" y="20" font-weight="bold">%s</text><text x="%d" y="20" text-anchor="end" fill="#666666">%s on %s, %s</text>`+"\n",
		html.EscapeString(r.Name), chartWidth-8, r.Unit, html.EscapeString(r.On), better)
	for i, f := range r.Figures {
		y := titleHeight + i*(barHeight+barGap)
		width := max(1, int(f.median()/longest*float64(chartWidth-labelWidth-figureWidth)))
		color := "#b0b8c4"
		if strings.HasPrefix(f.Contender, oursPrefix) {
			color = "#3b6ea5"
		}
		fmt.Fprintf(&s, `<text x="%d" y="%d" text-anchor="end">%s</text><rect x="%d" y="%d" width="%d" height="%d" fill="%s"/><text x="%d" y="%d">%s</text>`+"\n",
			labelWidth-8, y+16, html.EscapeString(f.Contender), labelWidth, y, width, barHeight, color, labelWidth+width+6, y+16, r.Unit.format(f.median()))
	}
	s.WriteString("</svg>\n")
	return []byte(s.String())
}
