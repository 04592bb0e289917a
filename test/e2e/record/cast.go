package record

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// How many columns and rows the terminal has.
const terminalWidth, terminalHeight = 110, 40

// How a terminal is told to show what: SGR, "select graphic rendition".
const (
	sgrReset   = "\x1b[0m"
	sgrComment = "\x1b[36m"   // cyan
	sgrPrompt  = "\x1b[1;32m" // bold green
	sgrCommand = "\x1b[1m"    // bold
)

// Times of the recording, in milliseconds. They are fixed, as those of a real run would differ from one to the next.
const (
	pauseTyping  = 90  // between two words
	pauseRunning = 300 // from the last word to the output
	pauseReading = 400 // after output, and
	pauseLine    = 60  // for each line of it
	pauseComment = 700
)

// words are pieces that are typed at once.
var words = regexp.MustCompile(`\S+\s*`)

// header is the first line of a file of asciinema's format, version 2.
type header struct {
	Version int    `json:"version"`
	Width   int    `json:"width"`
	Height  int    `json:"height"`
	Title   string `json:"title"`
}

// event is one of the other lines: something that appears at a time, in milliseconds from the start.
type event struct {
	at   int
	text string
}

// Cast returns the recording as asciinema's format has it, version 2: a line of JSON for the terminal, and one for
// each piece of what appears in it. "asciinema play" shows it.
func (r *Recording) Cast(title string) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(header{Version: 2, Width: terminalWidth, Height: terminalHeight, Title: title}); err != nil {
		return nil, fmt.Errorf("write recording: %w", err)
	}
	for _, e := range r.events() {
		fmt.Fprintf(&b, "[%d.%03d, \"o\", ", e.at/1000, e.at%1000)
		if err := enc.Encode(strings.ReplaceAll(e.text, "\n", "\r\n")); err != nil {
			return nil, fmt.Errorf("write recording: %w", err)
		}
		b.Truncate(b.Len() - 1) // Encode ends the line
		b.WriteString("]\n")
	}
	return b.Bytes(), nil
}

// events returns what appears when.
func (r *Recording) events() []event {
	var events []event
	now := 200
	add := func(text string, pause int) {
		events = append(events, event{at: now, text: text})
		now += pause
	}
	for i, s := range r.Steps {
		if s.Comment != "" {
			text := sgrComment + "# " + s.Comment + sgrReset + "\n"
			if i > 0 {
				text = "\n" + text
			}
			add(text, pauseComment)
			continue
		}
		add(sgrPrompt+"$"+sgrReset+" ", pauseTyping)
		typed := words.FindAllString(s.Command, -1)
		for _, word := range typed[:len(typed)-1] {
			add(sgrCommand+word+sgrReset, pauseTyping)
		}
		add(sgrCommand+typed[len(typed)-1]+sgrReset+"\n", pauseRunning)
		if s.Output != "" {
			add(s.Output, pauseReading+pauseLine*strings.Count(s.Output, "\n"))
		}
	}
	return events
}

// readCast reads what Cast wrote.
func readCast(cast []byte) (header, []event, error) {
	var head header
	dec := json.NewDecoder(bytes.NewReader(cast))
	if err := dec.Decode(&head); err != nil {
		return head, nil, fmt.Errorf("read recording: %w", err)
	}
	if head.Version != 2 || head.Width < 20 || head.Width > 1000 {
		return head, nil, fmt.Errorf("read recording: version %d, %d columns; want version 2 and 20 to 1000 columns", head.Version, head.Width)
	}
	var events []event
	for {
		var line [3]any
		err := dec.Decode(&line)
		if errors.Is(err, io.EOF) {
			return head, events, nil
		}
		if err != nil {
			return head, nil, fmt.Errorf("read recording: %w", err)
		}
		at, isTime := line[0].(float64)
		text, isText := line[2].(string)
		if !isTime || !isText || line[1] != "o" {
			return head, nil, fmt.Errorf("read recording: event %v: want a time, \"o\" and a text", line)
		}
		events = append(events, event{at: int(at*1000 + 0.5), text: text})
	}
}

// Typed returns what was typed in a recording that Cast wrote: comments with the sign that makes them one, and commands behind
// a prompt.
func Typed(cast []byte) ([]string, error) {
	_, events, err := readCast(cast)
	if err != nil {
		return nil, err
	}
	var typed []string
	for _, e := range events {
		text := strings.ReplaceAll(e.text, "\r\n", "\n")
		switch {
		case strings.HasPrefix(strings.TrimLeft(text, "\n"), sgrComment), strings.HasPrefix(text, sgrPrompt):
			typed = append(typed, "")
		case !strings.HasPrefix(text, sgrCommand):
			continue
		}
		typed[len(typed)-1] += plain.Replace(text)
	}
	for i, text := range typed {
		typed[i] = strings.Trim(text, "\n")
	}
	return typed, nil
}

// plain removes the styles.
var plain = strings.NewReplacer(sgrReset, "", sgrComment, "", sgrPrompt, "", sgrCommand, "")
