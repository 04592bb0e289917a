package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"
)

// upstreamLimit is how long Kubernetes' suites may take. They need two minutes, of which one is for a
// pod that must not start.
const upstreamLimit = 15 * time.Minute

// upstreamCase is one line of what test/kube/upstream reports.
type upstreamCase struct {
	Name, Outcome, Message, Reason string
	Seconds                        float64
}

// testUpstream runs Kubernetes' own tests of storage drivers. Which cases apply to read-only images, and
// why the others do not, is in test/kube/upstream/cases/table.go; the program checks that each ends as it
// is said there.
func (s *suite) testUpstream(t *testing.T) {
	f := features.New("Kubernetes' storage suites").
		Assess("pass where they apply", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			if s.settings.upstream == "" {
				s.skip(t, "Kubernetes' storage suites: E2E_UPSTREAM is not set, to the program that hack/upstream.sh prints")
			}
			s.driver(ctx, t)
			dir := t.TempDir()
			must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("content\n"), 0o644))
			cases, output, err := s.runUpstream(ctx, t, s.open.pushTree(ctx, t, dir, "upstream/files:v1"))
			passed := 0
			inapplicable := map[string]int{}
			for _, c := range cases {
				if c.Outcome == "skipped" {
					inapplicable[c.Reason]++
					continue
				}
				t.Run(c.Name, func(t *testing.T) {
					if c.Outcome != "passed" {
						t.Errorf("%s after %.1f s: %s", c.Outcome, c.Seconds, c.Message)
					}
				})
				passed++
			}
			var lines []string
			for reason, count := range inapplicable {
				lines = append(lines, fmt.Sprintf("%4d  %s", count, reason))
			}
			slices.Sort(lines)
			t.Logf("of %d cases of Kubernetes' storage suites %d were run; the others do not apply:\n%s", len(cases), passed, strings.Join(lines, "\n"))
			if err != nil || passed == 0 {
				t.Errorf("%s ran %d cases: %v; what it said:\n%s", s.settings.upstream, passed, err, tail(output, 300))
			}
			return ctx
		})
	s.Test(t, f.Feature())
}

// runUpstream runs the program and returns what became of the cases, and what it printed; the error says
// that it was not as it should be.
func (s *suite) runUpstream(ctx context.Context, t testing.TB, img image) (cases []upstreamCase, output string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, upstreamLimit)
	defer cancel()
	report := filepath.Join(t.TempDir(), "report.jsonl")
	cmd := exec.CommandContext(ctx, s.settings.upstream,
		"-kubeconfig", s.kubeconfig, "-context", s.settings.context,
		"-image", img.Ref, "-digest", img.Digest, "-pod-image", s.settings.tools.String(),
		"-namespace-label", suiteLabel+"=true", "-report", report, "-ginkgo.no-color")
	// It removes its namespaces when it is interrupted.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = patience
	out, err := cmd.CombinedOutput()
	text, readErr := os.ReadFile(report)
	if readErr != nil {
		if err == nil {
			err = readErr
		}
		return nil, string(out), err
	}
	for line := range bytes.Lines(text) {
		var c upstreamCase
		if err := json.Unmarshal(line, &c); err != nil {
			return nil, string(out), fmt.Errorf("read %s: %w", report, err)
		}
		cases = append(cases, c)
	}
	return cases, string(out), err
}
