package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// kubectl runs kubectl on the cluster that is tested, as a person would, and returns what it printed.
// It is the one that was built with the suite's own cluster; for another cluster it is that of PATH.
func (s *suite) kubectl(ctx context.Context, t testing.TB, args ...string) string {
	t.Helper()
	out, err := s.tryKubectl(ctx, args...)
	must(t, err)
	return out
}

// tryKubectl is kubectl for commands that may fail.
func (s *suite) tryKubectl(ctx context.Context, args ...string) (string, error) {
	program := "kubectl"
	if s.settings.ownCluster() {
		program = filepath.Join(s.settings.kube, "kubectl")
	}
	args = append([]string{"--kubeconfig", s.kubeconfig, "--cache-dir", filepath.Join(s.dir, "kubectl")}, args...)
	if s.settings.context != "" {
		args = append([]string{"--context", s.settings.context}, args...)
	}
	ctx, cancel := context.WithTimeout(ctx, slowPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, tail(stderr.String(), 20))
	}
	return stdout.String(), nil
}
