package record_test

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/record"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

// sample has what a recording can have: a comment, a command of several lines, one without output, output
// that is wider than the terminal with and without spaces, columns, and characters that XML minds.
var sample = record.Recording{Steps: []record.Shown{
	{Comment: "First"},
	{Command: "echo a \\\n    --flag", Output: "[…]\nTYPE     NAME\nNormal   <b> & \"c\"\n\nend\n"},
	{Command: "true"},
	{Comment: "Second"},
	{Command: "cat", Output: strings.Repeat("word ", 30) + "\n" + strings.Repeat("0123456789", 12) + "\n"},
}}

func TestGolden(t *testing.T) {
	cast, err := sample.Cast("A <sample>")
	if err != nil {
		t.Fatal(err)
	}
	svg, err := record.SVG(cast)
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string][]byte{"sample.cast": cast, "sample.svg": svg} {
		file := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(file, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s (- golden, + got; -update writes it):\n%s", file, diff)
		}
	}
}

// TestCastFormat looks at a recording as a player does.
func TestCastFormat(t *testing.T) {
	cast, err := sample.Cast("title")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(cast), "\n"), "\n")
	var head struct{ Version, Width, Height int }
	if err := json.Unmarshal([]byte(lines[0]), &head); err != nil {
		t.Fatal(err)
	}
	if head.Version != 2 || head.Width < 80 || head.Height < 24 {
		t.Errorf("the header is %s", lines[0])
	}
	last := -1.0
	for _, line := range lines[1:] {
		var event []any
		if err := json.Unmarshal([]byte(line), &event); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		at, ok := event[0].(float64)
		if len(event) != 3 || !ok || event[1] != "o" {
			t.Fatalf("event %s: want [time, \"o\", text]", line)
		}
		if at <= last {
			t.Errorf("event %s is not after %v", line, last)
		}
		last = at
	}
}

// TestSVGStandsAlone looks for what a web page would not show in an image, or what would make it large.
func TestSVGStandsAlone(t *testing.T) {
	svg, err := os.ReadFile(filepath.Join(root, record.SVGFile))
	if err != nil {
		t.Fatal(err)
	}
	if len(svg) > 60_000 {
		t.Errorf("it has %d bytes, want at most 60000", len(svg))
	}
	dec := xml.NewDecoder(bytes.NewReader(svg))
	for {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		start, ok := token.(xml.StartElement)
		if !ok {
			continue
		}
		switch start.Name.Local {
		case "svg", "title", "style", "rect", "circle", "text":
		default:
			t.Errorf("it has an element %s", start.Name.Local)
		}
		for _, a := range start.Attr {
			if strings.Contains(a.Value, "url(") || a.Name.Local == "href" || strings.HasPrefix(a.Name.Local, "on") {
				t.Errorf("%s has %s=%q", start.Name.Local, a.Name.Local, a.Value)
			}
		}
	}
}

func TestSVGRefuses(t *testing.T) {
	const head = `{"version":2,"width":80,"height":24,"title":""}` + "\n"
	for name, c := range map[string]struct{ cast, want string }{
		"nothing":         {"", "read recording: EOF"},
		"other version":   {`{"version":3,"width":80}`, "version 3"},
		"no width":        {`{"version":2}`, "0 columns"},
		"input":           {head + `[1, "i", "x"]`, `want a time, "o" and a text`},
		"no text":         {head + `[1, "o", 2]`, `want a time, "o" and a text`},
		"cut":             {head + `[1, "o", "x"`, "unexpected EOF"},
		"moving cursor":   {head + `[1, "o", "\u001b[2Ax"]`, "unknown control sequence"},
		"carriage return": {head + `[1, "o", "x\ry"]`, "control character"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := record.SVG([]byte(c.cast))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want one with %q", err, c.want)
			}
		})
	}
}
