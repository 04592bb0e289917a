// Package e2e_test is the end-to-end suite: real pods on a real kubelet, with the chart and the image as
// users install them. docs/testing.md says how to run it, suite_test.go what is in it.
package e2e_test

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"sigs.k8s.io/e2e-framework/pkg/env"
	"sigs.k8s.io/e2e-framework/pkg/envconf"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/cluster"
)

// shared is the suite that TestMain makes for TestSuite: a program of tests has no other way to hand
// something over. Nobody else looks at it.
var shared *suite

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

// run runs the tests between the suite's beginning and its end, and returns the exit status.
func run(m *testing.M) int {
	inside := cluster.Inside()
	if inside {
		cluster.Enter()
	}
	settings, config, err := readSettings()
	if err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
		return 2
	}
	if settings.ownCluster() && !inside {
		cluster.Enter() // does not return: all the rest happens in the process that it starts
	}
	environment, err := env.NewWithContext(context.Background(), config)
	if err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %v\n", err)
		return 2
	}
	s := &suite{Environment: environment, settings: *settings, dumped: map[string]bool{}, started: map[*testing.T][]*pod{}}
	shared = s
	var finishErr error
	s.Setup(func(ctx context.Context, _ *envconf.Config) (context.Context, error) {
		return ctx, s.begin(ctx)
	})
	s.AfterEachTest(func(ctx context.Context, _ *envconf.Config, t *testing.T) (context.Context, error) {
		s.dumpFailed(ctx, t)
		return ctx, nil
	})
	s.Finish(func(ctx context.Context, _ *envconf.Config) (context.Context, error) {
		if s.failed && s.settings.keep {
			s.waitForInterrupt(ctx)
			if !s.settings.ownCluster() {
				return ctx, nil
			}
		}
		// The framework only logs what goes wrong here, and not even that by default.
		finishErr = s.end(context.WithoutCancel(ctx))
		return ctx, finishErr
	})
	status := s.Run(m)
	if finishErr != nil {
		fmt.Fprintf(os.Stderr, "e2e: clean up: %v\n", finishErr)
		status = max(status, 1)
	}
	return status
}

// waitForInterrupt leaves things as they are for a person to look at.
func (s *suite) waitForInterrupt(ctx context.Context) {
	if !s.settings.ownCluster() {
		fmt.Fprintln(os.Stderr, "e2e: -e2e.keep: what the suite made is left in the cluster; its next run removes it")
		return
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	fmt.Fprintf(os.Stderr, `e2e: -e2e.keep: the cluster stays until this is interrupted. As root, in another terminal:
  lab=$(lsns --noheadings --type net --output PID,COMMAND | awk '/e2e\.keep/ {print $1; exit}')
  nsenter --all --target "$lab" env KUBECONFIG=%s PATH=%s:%s:"$PATH" bash
The logs are in %s
`, s.kubeconfig, s.settings.kube, s.settings.node, s.cluster.LogDir())
	<-ctx.Done()
}
