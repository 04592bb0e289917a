// Package cases says which cases of Kubernetes' storage suites apply to our driver, which do not
// and why, and holds what a run of the suites did against that.
//
// It knows nothing of clusters, and imports nothing of Kubernetes.
package cases

import (
	"fmt"
	"slices"
	"strings"
)

// Outcome is how a case ended.
type Outcome string

// The outcomes of a case.
const (
	Passed  Outcome = "passed"
	Failed  Outcome = "failed" // also if it did not end by itself
	Skipped Outcome = "skipped"
)

// Result is what became of one case.
type Result struct {
	// Name is the case's, without what all have in common: the name of the suites and of the driver.
	Name    string  `json:"name"`
	Outcome Outcome `json:"outcome"`
	// Message says why a case failed, or why the suite skipped it; it is empty for one that was left out.
	Message string  `json:"message,omitempty"`
	Seconds float64 `json:"seconds"`
	// Reason says of a case that does not apply why it does not.
	Reason string `json:"reason,omitempty"`
}

// LeftOut returns regular expressions that match the names of the cases that are not to be run.
func LeftOut() []string {
	var exprs []string
	for _, g := range notApplying() {
		if g.words == nil {
			exprs = append(exprs, g.cases.String())
		}
	}
	return exprs
}

// Explain returns the results with the reasons of those that were skipped as expected.
func Explain(results []Result) []Result {
	explained := slices.Clone(results)
	groups := notApplying()
	for i, r := range explained {
		if g := find(groups, r.Name); g >= 0 && r.Outcome == Skipped {
			explained[i].Reason = groups[g].reason
		}
	}
	return explained
}

// Check returns a sentence for each deviation from the table in a run of all cases: a case that
// applies and did not pass, or was not there; one that passed or was skipped although the table
// does not say so, or for another reason; and a group of the table that matches nothing.
func Check(results []Result) []string {
	var complaints []string
	complain := func(format string, args ...any) {
		complaints = append(complaints, fmt.Sprintf(format, args...))
	}
	groups, used := notApplying(), map[int]bool{}
	missing := map[string]bool{}
	for _, name := range applying() {
		missing[name] = true
	}
	for _, r := range results {
		applies := missing[r.Name]
		delete(missing, r.Name)
		g := find(groups, r.Name)
		if g >= 0 && !applies {
			used[g] = true
		}
		switch {
		case r.Outcome == Failed:
			complain("%q failed: %s", r.Name, r.Message)
		case applies && r.Outcome == Skipped:
			complain("%q applies and was skipped: %s", r.Name, orLeftOut(r.Message))
		case applies: // and passed
		case r.Outcome == Passed:
			complain("%q passed, but cases/table.go does not say that it applies: look what it shows, and add it there", r.Name)
		case g < 0:
			complain("%q was skipped (%s), and no group of cases/table.go has it: look whether it applies, and add it there", r.Name, orLeftOut(r.Message))
		case groups[g].words == nil && r.Message != "":
			complain("%q was to be left out (%s), but the suite skipped it itself: %s", r.Name, groups[g].reason, r.Message)
		case groups[g].words != nil && !groups[g].words.MatchString(r.Message):
			complain("%q was skipped for another reason than that of cases/table.go (%s): %s", r.Name, groups[g].reason, orLeftOut(r.Message))
		}
	}
	for _, name := range applying() {
		if missing[name] {
			complain("there is no case %q any more: look by what it was replaced", name)
		}
	}
	for i, g := range groups {
		if !used[i] {
			complain("no case is in the group %s (%s): remove it from cases/table.go", g.cases, g.reason)
		}
	}
	return complaints
}

// Summary returns one line about a run.
func Summary(results []Result) string {
	count := map[Outcome]int{}
	for _, r := range results {
		count[r.Outcome]++
	}
	return fmt.Sprintf("of %d cases %d passed, %d failed, %d do not apply", len(results), count[Passed], count[Failed], count[Skipped])
}

func orLeftOut(message string) string {
	if message == "" {
		return "it was left out"
	}
	return strings.TrimSpace(message)
}

// find returns the index of the first group that a case is in, or -1.
func find(groups []group, name string) int {
	return slices.IndexFunc(groups, func(g group) bool { return g.cases.MatchString(name) })
}
