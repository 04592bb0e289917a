package manpage_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/manpage"
)

// program has all that roff could take for its own.
func program() *cobra.Command {
	root := &cobra.Command{Use: "prog", Short: "Do things", Long: "Do things."}
	root.PersistentFlags().String("level", "info", "how `much`")
	run := func(*cobra.Command, []string) {}
	sub := &cobra.Command{
		Use: "do-it FILE [--now]", Short: "Do it, and don't ask", Run: run,
		Long: `.first line with a dot, a back\slash, "quotes", ~, ^, and … more;
'second' line names --now and -n.

Kinds:
  .dot     kept   as it is
  'quote'  --too

Last.`,
		Example: "  prog do-it x\n\n  .y",
	}
	sub.Flags().BoolP("now", "n", false, "at once")
	sub.Flags().Int("times", 3, "how often")
	root.AddCommand(sub, &cobra.Command{Use: "secret", Hidden: true, Run: run})
	return root
}

func config() manpage.Config {
	return manpage.Config{Version: "1.2", Date: time.Unix(1_700_000_000, 0), ExitStatus: [][2]string{{"0", "Done."}}}
}

const want = `.TH PROG\-DO\-IT 1 2023-11-14 "prog 1.2" "User Commands"
.nh
.ad l
.SH NAME
prog\-do\-it \- Do it, and don\(aqt ask
.SH SYNOPSIS
\fBprog do\-it\fR FILE [\fB\-\-now\fR] [options]
.SH DESCRIPTION
\&.first line with a dot, a back\eslash, "quotes", \(ti, \(ha, and \[u2026] more;
\&\(aqsecond\(aq line names \fB\-\-now\fR and \fB\-n\fR.
.PP
Kinds:
.RS 4
.nf
\&.dot     kept   as it is
\&\(aqquote\(aq  \-\-too
.fi
.RE
.PP
Last.
.SH OPTIONS
.TP
\fB\-h\fR, \fB\-\-help\fR
Help for do\-it.
.TP
\fB\-n\fR, \fB\-\-now\fR
At once.
.TP
\fB\-\-times\fR=\fIint\fR
How often (default 3).
.SH GLOBAL OPTIONS
.TP
\fB\-\-level\fR=\fImuch\fR
How much (default info).
.SH EXAMPLES
.RS 4
.nf
prog do\-it x
\&
\&.y
.fi
.RE
.SH EXIT STATUS
.TP
\fB0\fR
Done.
.SH SEE ALSO
\fBprog\fR(1)
`

func TestPage(t *testing.T) {
	sub, _, err := program().Find([]string{"do-it"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(manpage.Page(config(), sub))); diff != "" {
		t.Error(diff)
	}
}

// What a checker says nothing of, and a reader shows as it was meant.
func TestPagesAreWellFormed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man")
	names, err := manpage.Write(config(), program(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"prog.1", "prog-do-it.1"}, names); diff != "" {
		t.Fatal(diff)
	}
	if _, err := exec.LookPath("mandoc"); err != nil {
		t.Fatalf("%v: hack/install-deps.sh installs it", err)
	}
	for _, name := range names {
		page := filepath.Join(dir, name)
		if out, err := exec.Command("mandoc", "-T", "lint", "-W", "warning", page).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	out, err := exec.Command("mandoc", "-T", "utf8", "-O", "width=100", filepath.Join(dir, "prog-do-it.1")).Output()
	if err != nil {
		t.Fatal(err)
	}
	// Bold is written as a character over itself.
	text := out
	for {
		i := bytes.IndexByte(text, '\b')
		if i < 1 {
			break
		}
		text = append(text[:i-1:i-1], text[i+1:]...)
	}
	for _, s := range []string{
		`.first line with a dot, a back\slash, "quotes", ~, ^, and … more; 'second'`, "\n           .dot     kept   as it is\n           'quote'  --too\n",
	} {
		if !bytes.Contains(text, []byte(s)) {
			t.Errorf("%q is not in\n%s", s, text)
		}
	}
}

func TestWriteRefuses(t *testing.T) {
	cfg := config()
	cfg.Date = time.Time{}
	if _, err := manpage.Write(cfg, program(), t.TempDir()); !errors.Is(err, manpage.ErrConfig) {
		t.Errorf("no date: %v, want ErrConfig", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := manpage.Write(config(), program(), file); err == nil {
		t.Error("into a file: no error")
	}
}
