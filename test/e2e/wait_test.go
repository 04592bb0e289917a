package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

// patience is how long the suite waits for what should take seconds: for a slow machine it is a lot, for
// a person who reads a failure it is not. Kubelet's pauses between attempts at a mount grow to two
// minutes, so whatever waits for a next attempt takes slowPatience.
const (
	patience     = 3 * time.Minute
	slowPatience = 6 * time.Minute
	// pollFirst is the pause after the first look, which grows to pollLast: looking at a node takes a
	// process in a container there, and many of these slow down what is waited for.
	pollFirst = 200 * time.Millisecond
	pollLast  = 2 * time.Second
)

// await asks again and again until ask says that it is done. An error of ask is taken for a passing one,
// as while an API server restarts, and is what is reported if it does not pass; stop ends the waiting.
// saw is what was there, for the message: "wait for WHAT: not there after 3m0s; last seen: SAW".
func await(ctx context.Context, limit time.Duration, what string, ask func(context.Context) (done bool, saw string, err error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	last, failure := "nothing", ""
	for pause := pollFirst; ; pause = min(pause*5/4, pollLast) {
		done, saw, err := ask(ctx)
		var final finalError
		switch {
		case errors.As(err, &final):
			return fmt.Errorf("wait for %s: %w", what, final.error)
		case err == nil && done:
			return nil
		case err == nil:
			last, failure = saw, ""
		case ctx.Err() == nil: // else it says only that the time is over
			failure = "; then error: " + err.Error()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: not there after %v; last seen: %s%s", what, limit, last, failure)
		case <-time.After(pause):
		}
	}
}

// finalError is an error of ask that no waiting will cure.
type finalError struct{ error }

func (e finalError) Unwrap() error { return e.error }

// stop makes await return err.
func stop(err error) error { return finalError{err} }

// mustAwait is await for tests.
func mustAwait(ctx context.Context, t testing.TB, limit time.Duration, what string, ask func(context.Context) (done bool, saw string, err error)) {
	t.Helper()
	if err := await(ctx, limit, what, ask); err != nil {
		t.Fatal(err)
	}
}

// must fails the test if err is one.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
