package record

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Sizes of the picture, in pixels.
const (
	charWidth  = 8
	charHeight = 18
	fontSize   = "13.33" // most fonts of fixed width are 0.6 of it wide; textLength sets the others right
	margin     = 18
	titleBar   = 34
)

// style is the picture's style sheet.
const style = `text{fill:#c9d1d9;white-space:pre;font:` + fontSize + `px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace}
.p{fill:#3fb950;font-weight:bold}.c{fill:#fff}.n{fill:#79c0ff}.t{fill:#8b949e;text-anchor:middle}`

// SVG draws a recording that Cast wrote: a window with everything that appeared in it. It stands still, for a picture
// that unfolds is empty when it is printed, previewed or glanced at; who wants it to move plays the recording. It
// has no script and refers to nothing outside, so that a web page may show it as an image, and its own dark background makes it
// readable on pages of any colour.
func SVG(cast []byte) ([]byte, error) {
	head, events, err := readCast(cast)
	if err != nil {
		return nil, err
	}
	rows, err := screen(head.Width, events)
	if err != nil {
		return nil, err
	}
	width := head.Width*charWidth + 2*margin
	height := titleBar + len(rows)*charHeight + margin
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img" xml:space="preserve">`+"\n", width, height, width, height)
	fmt.Fprintf(&b, "<title>%s</title>\n<style>%s</style>\n", escape(head.Title), style)
	fmt.Fprintf(&b, `<rect x=".5" y=".5" width="%d" height="%d" rx="8" fill="#0d1117" stroke="#484f58"/>`+"\n", width-1, height-1)
	for i, colour := range []string{"#ff5f56", "#ffbd2e", "#27c93f"} {
		fmt.Fprintf(&b, `<circle cx="%d" cy="17" r="5.5" fill="%s"/>`+"\n", margin+6+18*i, colour)
	}
	fmt.Fprintf(&b, `<text class="t" x="%d" y="22">%s</text>`+"\n", width/2, escape(head.Title))
	draw(&b, rows)
	b.WriteString("</svg>\n")
	return b.Bytes(), nil
}

// draw writes the rows.
func draw(b *bytes.Buffer, rows []row) {
	for i, row := range rows {
		for _, r := range row {
			text := strings.TrimRight(r.text, " ")
			trimmed := strings.TrimLeft(text, " ")
			if trimmed == "" {
				continue
			}
			class := ""
			if r.style != "" {
				class = fmt.Sprintf(` class="%s"`, r.style)
			}
			x := margin + (r.column+len(text)-len(trimmed))*charWidth
			y := titleBar + i*charHeight + charHeight*3/4
			fmt.Fprintf(b, `<text%s x="%d" y="%d" textLength="%d">%s</text>`+"\n", class, x, y, utf8.RuneCountInString(trimmed)*charWidth, escape(trimmed))
		}
	}
}

// escape writes text as XML has it.
func escape(text string) string {
	var b strings.Builder
	// A strings.Builder takes everything.
	_ = xml.EscapeText(&b, []byte(text))
	return b.String()
}
