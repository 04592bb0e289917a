// Package manpage writes manual pages from the commands of a program, in the man(7) macros that
// man-db and mandoc read.
//
// The help texts are plain text, and stay so: paragraphs are filled, lines that begin with a space
// are kept as they are. A generator that takes them for Markdown, as that of cobra does, would
// read emphasis and lists into them, and bring a Markdown parser along. Pages depend on the
// commands and the Config alone, so that the same source gives the same bytes.
package manpage

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// ErrConfig says that a Config is not usable.
var ErrConfig = errors.New("invalid configuration of manual pages")

// Config says what stands in all pages.
type Config struct {
	// Version is the program's, without a leading v.
	Version string
	// Date is the day that the pages are of, in UTC.
	Date time.Time
	// ExitStatus describes exit codes: a code and a sentence each.
	ExitStatus [][2]string
}

// Write writes a page for a command and for each one below it to a directory, which is made if
// it does not exist: PROGRAM.1, PROGRAM-COMMAND.1, … It returns the names of the files.
func Write(cfg Config, root *cobra.Command, dir string) (names []string, err error) {
	if cfg.Date.IsZero() || cfg.Version == "" {
		return nil, fmt.Errorf("write manual pages to %s: no date or no version: %w", dir, ErrConfig)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("write manual pages: %w", err)
	}
	var write func(cmd *cobra.Command) error
	write = func(cmd *cobra.Command) error {
		name := pageName(cmd) + ".1"
		if err := os.WriteFile(filepath.Join(dir, name), Page(cfg, cmd), 0o644); err != nil {
			return err
		}
		names = append(names, name)
		for _, sub := range subcommands(cmd) {
			if err := write(sub); err != nil {
				return err
			}
		}
		return nil
	}
	if err := write(root); err != nil {
		return nil, fmt.Errorf("write manual pages: %w", err)
	}
	return names, nil
}

// Page returns the page of one command.
func Page(cfg Config, cmd *cobra.Command) []byte {
	cmd.InitDefaultHelpFlag()
	cmd.InitDefaultVersionFlag()
	p := &page{}
	fmt.Fprintf(p, ".TH %s 1 %s \"%s %s\" \"User Commands\"\n", escape(strings.ToUpper(pageName(cmd))),
		cfg.Date.UTC().Format(time.DateOnly), escape(cmd.Root().Name()), escape(cfg.Version))
	p.macro("nh") // names and flags are not to be broken
	p.macro("ad", "l")
	p.macro("SH", "NAME")
	fmt.Fprintf(p, "%s \\- %s\n", escape(pageName(cmd)), escape(cmd.Short))
	p.macro("SH", "SYNOPSIS")
	p.synopsis(cmd)
	p.macro("SH", "DESCRIPTION")
	long := cmd.Long
	if long == "" {
		long = cmd.Short
	}
	p.text(long)
	p.commands(cmd)
	p.flags("OPTIONS", cmd.LocalFlags())
	p.flags("GLOBAL OPTIONS", cmd.InheritedFlags())
	if cmd.Example != "" {
		p.macro("SH", "EXAMPLES")
		p.literal(strings.Split(strings.Trim(cmd.Example, "\n"), "\n"))
	}
	if len(cfg.ExitStatus) > 0 {
		p.macro("SH", "EXIT STATUS")
		for _, s := range cfg.ExitStatus {
			p.macro("TP")
			fmt.Fprintf(p, "\\fB%s\\fR\n", escape(s[0]))
			p.line(s[1])
		}
	}
	p.seeAlso(cmd)
	return p.Bytes()
}

// pageName is the path of a command as one word.
func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// subcommands returns the commands that have pages.
func subcommands(cmd *cobra.Command) []*cobra.Command {
	var list []*cobra.Command
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() && !sub.IsAdditionalHelpTopicCommand() && sub.Name() != "help" {
			list = append(list, sub)
		}
	}
	return list
}

// page is a page being written.
type page struct{ bytes.Buffer }

// macro writes a request and its arguments, which are words of roff.
func (p *page) macro(words ...string) { p.WriteString("." + strings.Join(words, " ") + "\n") }

// line writes a line of text, in which flags are bold.
func (p *page) line(s string) {
	s = flags(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, `\(aq`) {
		s = `\&` + s
	}
	p.WriteString(s + "\n")
}

// text writes paragraphs, and keeps lines that begin with a space.
func (p *page) text(s string) {
	for i, paragraph := range strings.Split(strings.Trim(s, "\n"), "\n\n") {
		if i > 0 {
			p.macro("PP")
		}
		lines := strings.Split(paragraph, "\n")
		for len(lines) > 0 {
			kept := strings.HasPrefix(lines[0], " ")
			n := 1
			for n < len(lines) && strings.HasPrefix(lines[n], " ") == kept {
				n++
			}
			if kept {
				p.literal(lines[:n])
			} else {
				for _, l := range lines[:n] {
					p.line(l)
				}
			}
			lines = lines[n:]
		}
	}
}

// literal writes lines as they are, but for the indentation that they have in common.
func (p *page) literal(lines []string) {
	p.macro("RS", "4")
	p.macro("nf")
	for _, l := range lines {
		l = escape(strings.TrimPrefix(l, "  "))
		if l == "" || strings.HasPrefix(l, ".") || strings.HasPrefix(l, `\(aq`) {
			l = `\&` + l
		}
		p.WriteString(l + "\n")
	}
	p.macro("fi")
	p.macro("RE")
}

// synopsis writes how a command is used.
func (p *page) synopsis(cmd *cobra.Command) {
	_, args, _ := strings.Cut(cmd.Use, " ")
	if len(subcommands(cmd)) > 0 {
		args = "COMMAND"
	}
	line := "\\fB" + escape(cmd.CommandPath()) + "\\fR"
	if args != "" {
		line += " " + flags(args)
	}
	p.WriteString(line + " [options]\n")
}

// commands lists the commands below one.
func (p *page) commands(cmd *cobra.Command) {
	list := subcommands(cmd)
	if len(list) == 0 {
		return
	}
	p.macro("SH", "COMMANDS")
	for _, sub := range list {
		p.macro("TP")
		fmt.Fprintf(p, "\\fB%s\\fR(1)\n", escape(pageName(sub)))
		p.line(sub.Short + ".")
	}
}

// flags lists flags under a heading.
func (p *page) flags(heading string, set *pflag.FlagSet) {
	if !set.HasAvailableFlags() {
		return
	}
	p.macro("SH", heading)
	set.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		p.macro("TP")
		value, usage := pflag.UnquoteUsage(f)
		name := "\\fB" + escape("--"+f.Name) + "\\fR"
		if f.Shorthand != "" {
			name = "\\fB" + escape("-"+f.Shorthand) + "\\fR, " + name
		}
		if value != "" {
			name += "=\\fI" + escape(value) + "\\fR"
		}
		p.WriteString(name + "\n")
		if d := f.DefValue; d != "" && d != "false" && d != "0" && d != "0s" && d != "[]" && !strings.Contains(usage, "default") {
			usage += " (default " + strings.Trim(d, "[]") + ")"
		}
		if usage != "" {
			p.line(strings.ToUpper(usage[:1]) + usage[1:] + ".")
		}
	})
}

// seeAlso names the pages next to one.
func (p *page) seeAlso(cmd *cobra.Command) {
	var list []*cobra.Command
	if parent := cmd.Parent(); parent != nil {
		list = append(list, parent)
		for _, c := range subcommands(parent) {
			if c != cmd {
				list = append(list, c)
			}
		}
	} else {
		list = subcommands(cmd)
	}
	if len(list) == 0 {
		return
	}
	p.macro("SH", "SEE ALSO")
	for i, c := range list {
		end := ","
		if i == len(list)-1 {
			end = ""
		}
		fmt.Fprintf(p, "\\fB%s\\fR(1)%s\n", escape(pageName(c)), end)
	}
}
