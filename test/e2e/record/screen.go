package record

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// run is a piece of a row that looks the same.
type run struct {
	column int
	text   string
	style  string // one of the values of styles
}

// row is a line of the terminal.
type row []run

// styles are what is understood of SGR, by what the picture calls them.
var styles = map[string]string{sgrReset: "", sgrComment: "n", sgrPrompt: "p", sgrCommand: "c"}

// cell is a place of the terminal with a character in it.
type cell struct {
	char  rune
	style string
}

// screen returns all rows that a terminal would have shown, the scrolled ones too. It understands what a recording of
// ours has: text, ends of lines, and the styles above.
func screen(width int, events []event) ([]row, error) {
	var rows []row
	var line []cell
	style := ""
	for _, e := range events {
		for text := e.text; text != ""; {
			switch {
			case strings.HasPrefix(text, "\r\n"):
				rows = append(rows, wrap(line, width)...)
				line, text = nil, text[2:]
			case text[0] == '\x1b':
				end := strings.IndexByte(text, 'm') + 1
				name, known := styles[text[:end]]
				if !known {
					return nil, fmt.Errorf("draw recording: unknown control sequence in %q", e.text)
				}
				style, text = name, text[end:]
			default:
				char, size := utf8.DecodeRuneInString(text)
				if char < ' ' {
					return nil, fmt.Errorf("draw recording: control character %q in %q", char, e.text)
				}
				line = append(line, cell{char: char, style: style})
				text = text[size:]
			}
		}
	}
	if len(line) > 0 {
		rows = append(rows, wrap(line, width)...)
	}
	return rows, nil
}

// wrap cuts a line into rows. It prefers the place behind a space in the row's last third, which a terminal does
// not do, but readers do.
func wrap(line []cell, width int) []row {
	var rows []row
	for len(line) > width {
		end := width
		for i := width; i > width*2/3; i-- {
			if line[i-1].char == ' ' {
				end = i
				break
			}
		}
		rows = append(rows, runs(line[:end]))
		line = line[end:]
	}
	return append(rows, runs(line))
}

// runs joins cells that look the same.
func runs(cells []cell) row {
	var r row
	for i, c := range cells {
		if i == 0 || c.style != cells[i-1].style {
			r = append(r, run{column: i, style: c.style})
		}
		r[len(r)-1].text += string(c.char)
	}
	return r
}
