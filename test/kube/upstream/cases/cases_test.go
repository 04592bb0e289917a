package cases_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/kube/upstream/cases"
)

const (
	applies  = "[Testpattern: CSI Ephemeral-volume (default fs)] ephemeral should create read-only inline ephemeral volume"
	writable = "[Testpattern: CSI Ephemeral-volume (default fs)] ephemeral should create read/write inline ephemeral volume"
	leftOut  = "[Testpattern: Inline-volume (default fs)] volumes should store data"
)

// TestCheck changes one result of a run at a time.
func TestCheck(t *testing.T) {
	good := goodRun(t)
	if c := cases.Check(good); len(c) > 0 {
		t.Fatalf("a run as it should be is complained about: %q", c)
	}
	for _, tt := range []struct {
		name   string
		change func(results []cases.Result) []cases.Result
		want   string
	}{
		{"fails", set(applies, cases.Failed, "no pod"), "failed: no pod"},
		{"fails though it does not apply", set(leftOut, cases.Failed, "read-only"), "failed: read-only"},
		{"skipped by the suite", set(applies, cases.Skipped, "no such feature"), "applies and was skipped: no such feature"},
		{"left out", set(applies, cases.Skipped, ""), "applies and was skipped: it was left out"},
		{"gone", remove(applies), "there is no case"},
		{"passes unexpectedly", set(writable, cases.Passed, ""), "passed, but"},
		{"skipped for another reason", set(writable, cases.Skipped, "no nodes"), "for another reason"},
		{"left out instead of skipped", set(writable, cases.Skipped, ""), "for another reason"},
		{"skipped instead of left out", set(leftOut, cases.Skipped, "no nodes"), "was to be left out"},
		{"new and passed", add("[Testpattern: New] should work", cases.Passed), "passed, but"},
		{"new and skipped", add("[Testpattern: New] should work", cases.Skipped), "no group of cases/table.go has it"},
		{"a group is empty", remove(writable), "no case is in the group"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := cases.Check(tt.change(slices.Clone(good)))
			if len(got) != 1 || !strings.Contains(got[0], tt.want) {
				t.Errorf("Check returned %q, want one complaint with %q", got, tt.want)
			}
		})
	}
}

func TestExplain(t *testing.T) {
	for _, r := range cases.Explain(goodRun(t)) {
		if (r.Reason != "") != (r.Outcome == cases.Skipped) {
			t.Errorf("%s was %s, and the reason is %q", r.Name, r.Outcome, r.Reason)
		}
	}
}

// goodRun returns what the suites of Kubernetes 1.36.3 reported of a run in which all was well.
func goodRun(t *testing.T) []cases.Result {
	t.Helper()
	f, err := os.Open("testdata/v1.36.3.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var results []cases.Result
	for lines := json.NewDecoder(f); ; {
		var r cases.Result
		switch err := lines.Decode(&r); {
		case errors.Is(err, io.EOF):
			return results
		case err != nil:
			t.Fatal(err)
		}
		r.Reason = ""
		results = append(results, r)
	}
}

func set(name string, o cases.Outcome, message string) func([]cases.Result) []cases.Result {
	return func(results []cases.Result) []cases.Result {
		i := slices.IndexFunc(results, func(r cases.Result) bool { return r.Name == name })
		results[i] = cases.Result{Name: name, Outcome: o, Message: message}
		return results
	}
}

func remove(name string) func([]cases.Result) []cases.Result {
	return func(results []cases.Result) []cases.Result {
		return slices.DeleteFunc(results, func(r cases.Result) bool { return r.Name == name })
	}
}

func add(name string, o cases.Outcome) func([]cases.Result) []cases.Result {
	return func(results []cases.Result) []cases.Result {
		return append(results, cases.Result{Name: name, Outcome: o})
	}
}
