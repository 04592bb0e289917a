package record_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/record"
)

// root is that of the source tree.
const root = "../../.."

// TestSessionIsDocumented holds the commands of the session against the documentation: what is recorded is what
// people are told to type. The documentation's line breaks and the remarks behind its commands do not matter.
func TestSessionIsDocumented(t *testing.T) {
	var prose string
	var commands []string
	for _, file := range []string{"README.md", "docs/quickstart.md"} {
		text := read(t, file)
		prose += " " + strings.Join(strings.Fields(text), " ")
		commands = append(commands, commandsOf(text)...)
	}
	session, err := record.ParseSession(read(t, record.SessionFile))
	if err != nil {
		t.Fatal(err)
	}
	shown := 0
	for _, step := range session.Steps {
		switch {
		case step.Command == "" || step.Hidden:
		case step.Quoted != "":
			shown++
			if !strings.Contains(prose, step.Quoted) {
				t.Errorf("%q stands for a sentence that is neither in README.md nor in docs/quickstart.md: %q", step.Command, step.Quoted)
			}
		default:
			shown++
			if !slices.Contains(commands, oneLine(step.Command)) {
				t.Errorf("neither README.md nor docs/quickstart.md has the command %q of %s", oneLine(step.Command), record.SessionFile)
			}
		}
	}
	if shown < 5 {
		t.Errorf("%s shows %d commands; is it the quick start?", record.SessionFile, shown)
	}
}

// TestPictureIsOfRecording holds the committed picture against the committed recording.
func TestPictureIsOfRecording(t *testing.T) {
	svg, err := record.SVG([]byte(read(t, record.CastFile)))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(read(t, record.SVGFile), string(svg)); diff != "" {
		t.Errorf("%s is not what %s shows; run make docs (- committed, + drawn):\n%s", record.SVGFile, record.CastFile, diff)
	}
}

// TestRecordingIsOfSession holds the commands of the committed recording against the session's, as far as that can
// be done without running them.
func TestRecordingIsOfSession(t *testing.T) {
	session, err := record.ParseSession(read(t, record.SessionFile))
	if err != nil {
		t.Fatal(err)
	}
	typed, err := record.Typed([]byte(read(t, record.CastFile)))
	if err != nil {
		t.Fatal(err)
	}
	var patterns []string
	for _, step := range session.Steps {
		switch {
		case step.Comment != "":
			patterns = append(patterns, regexp.QuoteMeta("# "+step.Comment))
		case !step.Hidden:
			patterns = append(patterns, captured.ReplaceAllString(regexp.QuoteMeta("$ "+step.Command), ".+"))
		}
	}
	if len(typed) != len(patterns) {
		t.Fatalf("%s has %d commands and comments, the session %d; run make docs", record.CastFile, len(typed), len(patterns))
	}
	for i, pattern := range patterns {
		if !regexp.MustCompile("^" + pattern + "$").MatchString(typed[i]) {
			t.Errorf("%s has %q where the session has %q; run make docs", record.CastFile, typed[i], pattern)
		}
	}
}

// captured is the name of a captured text, as QuoteMeta writes it.
var captured = regexp.MustCompile(`\\\{[A-Z]+\\\}`)

var (
	codeSpan    = regexp.MustCompile("`([^`]+)`")
	spaces      = regexp.MustCompile(`\s+`)
	remark      = regexp.MustCompile(`\s+# .*$`)
	indentation = "    "
)

// commandsOf returns the lines of indented code, with continued lines joined, and the pieces of code in the text.
func commandsOf(markdown string) []string {
	var commands []string
	joined := strings.ReplaceAll(markdown, "\\\n", " ")
	for line := range strings.Lines(joined) {
		if code, ok := strings.CutPrefix(line, indentation); ok {
			commands = append(commands, oneLine(remark.ReplaceAllString(strings.TrimRight(code, "\n"), "")))
		}
	}
	for _, match := range codeSpan.FindAllStringSubmatch(markdown, -1) {
		commands = append(commands, oneLine(match[1]))
	}
	return commands
}

// oneLine joins the lines of a command, with one space where there are several.
func oneLine(command string) string {
	return strings.TrimSpace(spaces.ReplaceAllString(strings.ReplaceAll(command, "\\\n", " "), " "))
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
