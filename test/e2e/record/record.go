// Package record runs the quick start that the documentation shows, in a real shell and against a real cluster,
// and makes of it what the README shows: a terminal recording as asciinema reads it, and a picture of that.
//
//	docs/quickstart.session   the commands, and which of them are recorded (ParseSession)
//	        │ Quickstart: run in a shell; what varies is replaced (normalize.go)
//	docs/quickstart.cast      what a terminal would have shown, and when (Recording.Cast)
//	        │ SVG
//	docs/quickstart.svg
//
// "make docs" writes the last two. They cannot go stale unnoticed: the same project gives the same bytes, so that
// the end-to-end suite runs the session too and fails when it gives others; a test without a cluster holds the
// commands against README.md and docs/quickstart.md, and the picture against the recording.
//
// What is recorded is what was printed, but for what differs from run to run: random names, times, and the order of
// events of one moment. How fast it seems to be typed is made up. Nothing is made up about names: registry.example.com,
// which the documentation uses and which nobody has, is a registry of this package (Registry), with a certificate for that
// name. The shell reaches it as people in many companies reach theirs, through a proxy (HTTPS_PROXY) and with an authority of
// its own (SSL_CERT_FILE), and the driver by a values file that says the same (registries.hosts). That file is the one thing
// that is added to a command without being shown; it also lowers store.reserve, for the disk of a machine that tests.
package record

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// stepTimeout ends a command that does not.
const stepTimeout = 5 * time.Minute

// Recording is what a session showed.
type Recording struct {
	Steps []Shown
}

// Shown is a comment, or a command and its output.
type Shown struct {
	Comment string
	Command string
	Output  string // whole lines
}

// shell says where commands run.
type shell struct {
	dir      string
	env      []string // the whole environment
	progress io.Writer
}

// record runs a session, in which {NAME} stands for values[NAME], and returns what is shown. A command that fails ends
// it, with an error that has the command's output.
func record(ctx context.Context, session *Session, sh shell, values map[string]string) (*Recording, error) {
	rec := &Recording{}
	for i := range session.Steps {
		step := &session.Steps[i]
		if step.Comment != "" {
			rec.Steps = append(rec.Steps, Shown{Comment: step.Comment})
			continue
		}
		command, err := fill(step.Command, values)
		if err != nil {
			return nil, fmt.Errorf("line %d of the session: %w", step.line, err)
		}
		added, err := fill(step.Added, values)
		if err != nil {
			return nil, fmt.Errorf("line %d of the session: %w", step.line, err)
		}
		fmt.Fprintf(sh.progress, "$ %s\n", strings.TrimSpace(command+" "+added))
		output, err := sh.run(ctx, command+" "+added)
		fmt.Fprint(sh.progress, output)
		if err != nil {
			return nil, fmt.Errorf("line %d of the session: run %q: %w; it printed:\n%s", step.line, command, err, output)
		}
		for _, c := range step.Captures {
			match := c.Pattern.FindStringSubmatch(output)
			if match == nil {
				return nil, fmt.Errorf("line %d of the session: %s is what %q matches, and it matches nothing of:\n%s", step.line, c.Name, c.Pattern, output)
			}
			values[c.Name] = match[1]
		}
		if step.Hidden {
			continue
		}
		shown := step.cut(normalize(output))
		if shown != "" && !strings.HasSuffix(shown, "\n") {
			shown += "\n"
		}
		if i := strings.IndexFunc(shown, func(r rune) bool { return unicode.IsControl(r) && r != '\n' }); i >= 0 {
			return nil, fmt.Errorf("line %d of the session: the output has the control character %q, which would do something to a terminal:\n%s", step.line, shown[i], output)
		}
		rec.Steps = append(rec.Steps, Shown{Command: command, Output: shown})
	}
	return rec, nil
}

// fill puts values in the place of their names.
func fill(command string, values map[string]string) (string, error) {
	var b strings.Builder
	for {
		before, rest, found := strings.Cut(command, "{")
		b.WriteString(before)
		if !found {
			return b.String(), nil
		}
		name, after, found := strings.Cut(rest, "}")
		if !found || name == "" || strings.ToUpper(name) != name || strings.ContainsAny(name, " .'\"$") {
			b.WriteByte('{') // the shell's, or of a template
			command = rest
			continue
		}
		value, ok := values[name]
		if !ok {
			return "", fmt.Errorf("{%s} is nothing yet: no = before it has this name", name)
		}
		b.WriteString(value)
		command = after
	}
}

// run runs one command and returns what it printed, to whichever stream. The shell is one per command: no command of
// a quick start should need what the one before it left in a variable.
func (sh *shell) run(ctx context.Context, command string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", "umask 022\n"+command)
	cmd.Dir, cmd.Env = sh.dir, sh.env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	// What it started must not outlive it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("it did not end in %s: %w", stepTimeout, err)
	}
	return out.String(), err
}

// environment is what commands see of the environment: little, so that output does not depend on who runs it.
func environment(home, kubeconfig string, path []string, more ...string) []string {
	return append([]string{
		"PATH=" + strings.Join(append(path, os.Getenv("PATH")), ":"),
		"HOME=" + home, "KUBECONFIG=" + kubeconfig, "LC_ALL=C.UTF-8", "TZ=UTC", "TERM=dumb",
	}, more...)
}
