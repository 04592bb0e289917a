package record_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/record"
)

// TestRun runs sessions of commands that need no cluster.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	const session = `# Comment
@ echo hidden >file
$ cat file missing || echo failed
$ echo name: pod/csi-puzzlefs-bcdfg
= NAME name: (.*)
$ echo {NAME}
+ ; echo more
$ umask; printf x
`
	var progress strings.Builder
	rec, err := record.Run(t.Context(), session, dir, &progress)
	if err != nil {
		t.Fatal(err)
	}
	want := []record.Shown{
		{Comment: "Comment"},
		{Command: "cat file missing || echo failed", Output: "hidden\ncat: missing: No such file or directory\nfailed\n"},
		{Command: "echo name: pod/csi-puzzlefs-bcdfg", Output: "name: pod/csi-puzzlefs-xxxxx\n"},
		{Command: "echo pod/csi-puzzlefs-bcdfg", Output: "pod/csi-puzzlefs-xxxxx\nmore\n"},
		{Command: "umask; printf x", Output: "0022\nx\n"},
	}
	if diff := cmp.Diff(want, rec.Steps); diff != "" {
		t.Errorf("recorded (- want, + got):\n%s", diff)
	}
	if !strings.Contains(progress.String(), "pod/csi-puzzlefs-bcdfg") {
		t.Errorf("progress does not have the output as it was:\n%s", progress.String())
	}
}

func TestRunFails(t *testing.T) {
	for name, c := range map[string]struct{ session, want string }{
		"a command":         {"$ true\n$ echo why; exit 3\n", "line 2 of the session: run \"echo why; exit 3\": exit status 3; it printed:\nwhy\n"},
		"a hidden one":      {"@ echo why; false\n", "it printed:\nwhy\n"},
		"within a pipe":     {"$ false | cat\n", "exit status 1"},
		"nothing captured":  {"$ echo a\n= B (b)\n", "line 1 of the session: B is what"},
		"name of nothing":   {"$ echo {B}\n", "line 1 of the session: {B} is nothing yet"},
		"control character": {"$ printf 'a\\tb'\n", `control character '\t'`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := record.Run(t.Context(), c.session, t.TempDir(), &strings.Builder{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want one with %q", err, c.want)
			}
		})
	}
}

// TestQuickstartWithoutCluster makes sure that what is missing is said before anything is run.
func TestQuickstartWithoutCluster(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "kubeconfig")
	_, err := record.Quickstart(t.Context(), record.Config{Source: root, Kubeconfig: missing})
	if err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("error is %v, want one that names %s", err, missing)
	}
	local := filepath.Join(t.TempDir(), "local")
	const kubeconfig = `{apiVersion: v1, kind: Config, current-context: a, contexts: [{name: a, context: {cluster: a}}],
 clusters: [{name: a, cluster: {server: "https://127.0.0.1:6443"}}]}`
	if err := os.WriteFile(local, []byte(kubeconfig), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = record.Quickstart(t.Context(), record.Config{Source: root, Kubeconfig: local})
	if err == nil || !strings.Contains(err.Error(), "is on loopback") {
		t.Errorf("error is %v, want one that asks for an address", err)
	}
}
