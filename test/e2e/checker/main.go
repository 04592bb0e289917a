// Command checker looks at volumes from where their users are: the end-to-end suite runs it in pods,
// and on nodes in a pod that sees all of the node. It is part of the suite's image of tools, static,
// and asks nothing of the system but files, signals and /proc.
//
// Every command prints text or JSON that is the same for the same facts, and exits with 1 and a
// sentence on stderr for what is not as it should be; with 2 for wrong usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() {
	err := run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)
	var usage usageError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "checker: %v\n", err)
		os.Exit(2)
	default:
		fmt.Fprintf(os.Stderr, "checker: %v\n", err)
		os.Exit(1)
	}
}

// usageError is a command line that makes no sense.
type usageError struct{ error }

// command is one of the program's commands.
type command struct {
	name, args, about string
	run               func(*call) error
}

func commands() []command {
	return []command{
		{"tree", "DIR", `Describes a tree in text, a line for each path: type, mode, owner, size, SHA-256, target, device,
number of links, extended attributes; then which paths are links to one file.`, describeTree},
		{"make", "DIR", `Makes a tree with everything that an image can hold, in a directory that is empty or not there. The
same seed and size give the same tree. Owners, devices and some attributes take root; what could not
be made is said on stderr.`, makeSample},
		{"write", "DIR", `Tries every kind of change below DIR, and prints what came of each. It fails unless all were refused
because the file system is read-only. What is not refused is undone.`, tryWrites},
		{"read", "DIR", `Reads the files below DIR over and over and compares them with what they were at the start. It prints
a line of JSON when it begins, on SIGUSR1, and at the end: after a time, or on SIGTERM or SIGINT. It
reports whatever becomes of the file system, and fails if anything went wrong.`, readFiles},
		{"mounts", "", `Prints mounts from the kernel's table, as JSON, without touching them.`, listMounts},
	}
}

// call is one run of a command.
type call struct {
	ctx            context.Context
	command        command
	flags          *flag.FlagSet
	line           []string
	stdout, stderr io.Writer
}

// run runs one command line.
func run(ctx context.Context, line []string, stdout, stderr io.Writer) error {
	if len(line) == 0 {
		printUsage(stderr)
		return usageError{errors.New("want a command")}
	}
	switch line[0] {
	case "-h", "-help", "--help", "help":
		printUsage(stdout)
		return nil
	}
	for _, cmd := range commands() {
		if cmd.name != line[0] {
			continue
		}
		c := &call{ctx: ctx, command: cmd, flags: flag.NewFlagSet(cmd.name, flag.ContinueOnError), line: line[1:], stdout: stdout, stderr: stderr}
		c.flags.SetOutput(io.Discard)
		if err := cmd.run(c); err != nil {
			return fmt.Errorf("%s: %w", cmd.name, err)
		}
		return nil
	}
	printUsage(stderr)
	return usageError{fmt.Errorf("there is no command %q", line[0])}
}

func printUsage(w io.Writer) {
	fmt.Fprint(w, "usage: checker COMMAND [ARGUMENTS]\n\n")
	for _, cmd := range commands() {
		fmt.Fprintf(w, "checker %s\n  %s\n\n", strings.TrimSpace(cmd.name+" "+cmd.args), strings.ReplaceAll(cmd.about, "\n", "\n  "))
	}
	fmt.Fprint(w, "checker COMMAND --help tells the flags.\n")
}

// parse parses the flags and the arguments, which may come in any order, and returns as many
// arguments as the command takes.
func (c *call) parse() ([]string, error) {
	var args []string
	for rest := c.line; ; rest = c.flags.Args()[1:] {
		err := c.flags.Parse(rest)
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprintf(c.stdout, "usage: %s [flags]\n\n%s\n\n", strings.TrimSpace("checker "+c.command.name+" "+c.command.args), c.command.about)
			c.flags.SetOutput(c.stdout)
			c.flags.PrintDefaults()
			return nil, err
		}
		if err != nil {
			return nil, usageError{err}
		}
		if c.flags.NArg() == 0 {
			break
		}
		args = append(args, c.flags.Arg(0))
	}
	if want := strings.Fields(c.command.args); len(args) != len(want) {
		return nil, usageError{fmt.Errorf("takes %d arguments, %d given: %q", len(want), len(args), args)}
	}
	return args, nil
}
