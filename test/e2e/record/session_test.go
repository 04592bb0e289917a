package record_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/record"
)

func TestParseSession(t *testing.T) {
	s, err := record.ParseSession(`; a remark
;
# A comment
$ first \
    --flag
+ --more
= DIGEST digest: (\S+)
< ^Events:
> ^End

" Do this.
% second {DIGEST}
@ third
`)
	if err != nil {
		t.Fatal(err)
	}
	want := []record.Step{
		{Comment: "A comment"},
		{Command: "first \\\n    --flag", Added: "--more"},
		{Command: "second {DIGEST}", Quoted: "Do this."},
		{Command: "third", Hidden: true},
	}
	ignored := cmpopts.IgnoreFields(record.Step{}, "Captures", "From", "Until")
	if diff := cmp.Diff(want, s.Steps, ignored, cmpopts.IgnoreUnexported(record.Step{})); diff != "" {
		t.Errorf("steps (- want, + got):\n%s", diff)
	}
	first := s.Steps[1]
	if len(first.Captures) != 1 || first.Captures[0].Name != "DIGEST" || first.Captures[0].Pattern.String() != `digest: (\S+)` {
		t.Errorf("captures are %v", first.Captures)
	}
	if first.From.String() != "^Events:" || first.Until.String() != "^End" {
		t.Errorf("shows from %v until %v", first.From, first.Until)
	}
}

func TestParseSessionErrors(t *testing.T) {
	for name, c := range map[string]struct{ session, want string }{
		"unknown character":   {"$ a\n& b\n", "line 2: want it to begin with one of"},
		"no space":            {"$a\n", "line 1: want a character, a space and text"},
		"nothing":             {"$\n", "line 1: want a character, a space and text"},
		"unfinished":          {"\n$ a \\\n", "line 2: it ends in a backslash"},
		"of no command":       {"# c\n> x\n", "line 2: > speaks of the command before it"},
		"first":               {"= A (b)\n", "line 1: = speaks of the command before it"},
		"no group":            {"$ a\n= A b\n", "line 2: want a name and an expression with one group"},
		"bad expression":      {"$ a\n< (\n", "line 2: error parsing regexp"},
		"no quotation":        {"% a\n", "line 1: no sentence of the documentation"},
		"forgotten quotation": {"\" Do this.\n$ a\n", `no % command follows the quoted sentence "Do this."`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := record.ParseSession(c.session)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestFill(t *testing.T) {
	values := map[string]string{"DIGEST": "sha256:1", "VALUES": "v.yaml"}
	for name, c := range map[string]struct{ command, want string }{
		"nothing":         {"a b", "a b"},
		"names":           {"{DIGEST}{VALUES}|{DIGEST}", "sha256:1v.yaml|sha256:1"},
		"jsonpath":        {"-o jsonpath={.metadata.uid} {DIGEST}", "-o jsonpath={.metadata.uid} sha256:1"},
		"the shell's own": {"${x} {a,b} { c; }", "${x} {a,b} { c; }"},
		"open":            {"a {", "a {"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := record.Fill(c.command, values)
			if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	if _, err := record.Fill("{WRONG}", values); err == nil || !strings.Contains(err.Error(), "{WRONG} is nothing yet") {
		t.Errorf("an unknown name: error is %v", err)
	}
}
