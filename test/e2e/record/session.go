package record

import (
	"bufio"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Session is a list of commands to run and to record, in order.
//
// It is read from text. What a line is, its first character and the space behind it say; a backslash at the end of a
// command continues it with the next line, and empty lines are nothing.
//
//	; text       a remark on the session, not recorded
//	# text       recorded as a comment at the prompt
//	$ command    run and recorded; the documentation shows the same command
//	" text       a sentence of the documentation that tells to do what the next command does
//	% command    run and recorded, as what that sentence says
//	@ command    run, and not recorded: it waits for what a person's slowness waits for
//
// These speak of the command before them:
//
//   - text       added to the command when it runs, and not recorded
//     = NAME RE    from here on {NAME} in commands is what RE's first group matches in the output
//     < RE         the recorded output begins with the first line that RE matches
//     > RE         the recorded output ends before the first line that RE matches
type Session struct {
	Steps []Step
}

// Step is a command of a session, or a comment.
type Step struct {
	// Comment is recorded as typed at the prompt. If there is one, there is no command.
	Comment string
	// Command is for the shell. It may have several lines.
	Command string
	// Quoted is the sentence of the documentation that the command stands for. Without one the documentation
	// has the command itself.
	Quoted string
	// Hidden commands leave no trace in the recording.
	Hidden bool
	// Added is put behind the command when it runs, and not recorded.
	Added string
	// Captures name parts of the output for later commands.
	Captures []Capture
	// From and Until, if not nil, match the lines with which the recorded output begins, and before which it ends.
	From, Until *regexp.Regexp

	line int
}

// Capture is a part of a command's output with a name.
type Capture struct {
	Name    string
	Pattern *regexp.Regexp // with one group
}

// ParseSession reads a session. An error names the line.
func ParseSession(text string) (*Session, error) {
	p := parser{session: &Session{}}
	lines := bufio.NewScanner(strings.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		first := n
		for continued(line) {
			if !lines.Scan() {
				return nil, fmt.Errorf("read session: line %d: it ends in a backslash, and nothing follows", n)
			}
			n++
			line += "\n" + lines.Text()
		}
		if err := p.line(first, line); err != nil {
			return nil, fmt.Errorf("read session: line %d: %w", first, err)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read session: %w", err)
	}
	if p.quoted != "" {
		return nil, fmt.Errorf("read session: no %% command follows the quoted sentence %q", p.quoted)
	}
	return p.session, nil
}

// continued says whether a command goes on in the next line.
func continued(line string) bool {
	return line != "" && strings.ContainsRune("$%@", rune(line[0])) && strings.HasSuffix(line, `\`)
}

// parser reads a session line by line.
type parser struct {
	session *Session
	quoted  string // for the next command
}

func (p *parser) line(number int, line string) error {
	if line == "" || line[0] == ';' {
		return nil
	}
	kind, text, found := strings.Cut(line, " ")
	if !found || strings.TrimSpace(text) == "" {
		return fmt.Errorf("want a character, a space and text, got %q", line)
	}
	switch kind {
	case "#":
		p.add(Step{Comment: text, line: number})
	case `"`:
		p.quoted = text
	case "$":
		p.add(Step{Command: text, line: number})
	case "@":
		p.add(Step{Command: text, Hidden: true, line: number})
	case "%":
		if p.quoted == "" {
			return errors.New(`no sentence of the documentation before it: want a line that begins with "`)
		}
		p.add(Step{Command: text, Quoted: p.quoted, line: number})
		p.quoted = ""
	case "+", "=", "<", ">":
		return p.modify(kind, text)
	default:
		return fmt.Errorf(`want it to begin with one of ; # $ " %% @ + = < > and a space, got %q`, line)
	}
	return nil
}

func (p *parser) add(s Step) { p.session.Steps = append(p.session.Steps, s) }

// modify changes the last command.
func (p *parser) modify(kind, text string) error {
	if len(p.session.Steps) == 0 || p.session.Steps[len(p.session.Steps)-1].Command == "" {
		return fmt.Errorf("%s speaks of the command before it, and there is none", kind)
	}
	step := &p.session.Steps[len(p.session.Steps)-1]
	if kind == "+" {
		step.Added = text
		return nil
	}
	var name string
	if kind == "=" {
		name, text, _ = strings.Cut(text, " ")
	}
	pattern, err := regexp.Compile(text)
	if err != nil {
		return err
	}
	switch kind {
	case "=":
		if pattern.NumSubexp() != 1 {
			return fmt.Errorf("want a name and an expression with one group, got %q", text)
		}
		step.Captures = append(step.Captures, Capture{Name: name, Pattern: pattern})
	case "<":
		step.From = pattern
	case ">":
		step.Until = pattern
	}
	return nil
}
