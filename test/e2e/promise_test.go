package e2e_test

import (
	"context"
	"strings"
	"testing"
)

// promise is what users are promised for the time in which the driver's process is not there, because it
// was killed, replaced or upgraded. Everything that the part takeover demands of running pods comes from
// here.
type promise struct {
	// readersSurvive: containers that run do not notice: no operation fails, and they need no restart.
	// Without it their volumes may end with the driver: docs/operations.md, "Upgrading".
	readersSurvive bool
	// endings are the errors, by name, with which volumes that do not survive end for their readers.
	endings []string
}

// promised is what this version promises. When a successor takes the file systems over, readersSurvive
// becomes true here, and from then on the suite demands zero errors.
//
// A file system that has ended answers ENOTCONN; who waits for an answer just then may get ECONNABORTED.
//
// Until then readers may fail, but need not: what is better than promised fails no test.
func promised() promise {
	return promise{readersSurvive: false, endings: []string{"ENOTCONN", "ECONNABORTED"}}
}

// checkReader holds what a reader has seen, whose driver went away and came back meanwhile, against the
// promise. Whatever is promised, it never gets other bytes, finds nothing missing, and does not hang.
func (p promise) checkReader(t testing.TB, who string, r readings) {
	t.Helper()
	t.Logf("%s: %v", who, r)
	if len(r.Stuck) > 0 {
		t.Errorf("%s hangs at %v", who, r.Stuck)
	}
	if p.readersSurvive {
		if r.failed() > 0 {
			t.Errorf("%s got errors, and is promised none: %v", who, r)
		}
		return
	}
	allowed := map[string]bool{}
	for _, name := range p.endings {
		allowed[name] = true
	}
	for name, n := range r.Errors {
		if n > 0 && !allowed[name] {
			t.Errorf("%s got %s %d times, and is promised nothing worse than %v: %v", who, name, n, p.endings, r)
		}
	}
}

// notConnected is ENOTCONN as the tools in pods word it.
const notConnected = "not connected"

// checkDirectory looks at the volume of a pod whose driver went away and came back: the pod sees what it saw
// before or, if it is not promised to survive, an error. An empty directory would be silent.
func (p promise) checkDirectory(ctx context.Context, t testing.TB, pod *pod, want string) {
	t.Helper()
	got, err := pod.try(ctx, "ls", "-A", "/data")
	switch {
	case err == nil && got != want:
		t.Errorf("pod %s sees other names in its volume than before: %q, want %q", pod, got, want)
	case err != nil && (p.readersSurvive || !strings.Contains(err.Error(), notConnected)):
		t.Errorf("list the volume of pod %s: %v", pod, err)
	}
	// What no cache answers.
	_, err = pod.try(ctx, "stat", "-f", "/data")
	t.Logf("pod %s: stat -f: %v", pod, err)
	if err != nil && (p.readersSurvive || !strings.Contains(err.Error(), notConnected)) {
		t.Errorf("ask the file system of pod %s: %v", pod, err)
	}
}
