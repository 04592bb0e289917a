package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// contentFiles is how many files contentTree makes.
const contentFiles = 8

// contentTree makes a directory of files with random bytes, which no compression makes smaller, of so many
// bytes together. Everybody may read them. Trees of different seeds have no content in common.
func (s *suite) contentTree(t testing.TB, seed uint64, size int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "content")
	must(t, os.MkdirAll(dir, 0o755))
	random := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	for i := range contentFiles {
		b := make([]byte, size/contentFiles)
		if _, err := random.Read(b); err != nil {
			t.Fatal(err)
		}
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("part-%d", i)), b, 0o644))
	}
	return dir
}

// launch creates a pod that outlasts the step of the test in which that is done, which those of start do not: it
// goes with its namespace.
func (s *suite) launch(ctx context.Context, t testing.TB, p *corev1.Pod) *pod {
	t.Helper()
	if _, err := s.client.CoreV1().Pods(p.Namespace).Create(ctx, p, metav1.CreateOptions{}); err != nil {
		t.Fatalf("create pod %s/%s: %v", p.Namespace, p.Name, err)
	}
	return s.pod(p.Namespace, p.Name)
}

// steady returns a pod on a node that reads its volume over and over until it is told to end, from the
// file system rather than from the page cache. Then its container starts again, as kubelet has it.
func (s *suite) steady(namespace, name, node string, img image) *corev1.Pod {
	p := on(node, s.reader(namespace, name, inline("data", img.attributes())))
	p.Spec.Containers[0].Command = []string{"checker", "read", "--fresh", "/data"}
	return p
}

// readings is what checker read says of itself.
type readings struct {
	State              string         `json:"state"`
	Files              int            `json:"files"`
	Operations         int64          `json:"operations"`
	Bytes              int64          `json:"bytes"`
	Errors             map[string]int `json:"errors"`
	LongestPauseMillis int64          `json:"longestPauseMillis"`
	Stuck              []string       `json:"stuck"`
	FirstErrors        []struct {
		Path  string `json:"path"`
		Error string `json:"error"`
	} `json:"firstErrors"`
}

// failed is how many operations did not give what was to be read.
func (r readings) failed() int {
	n := 0
	for _, count := range r.Errors {
		n += count
	}
	return n
}

func (r readings) String() string {
	text := fmt.Sprintf("%d files, %d operations, %d bytes, longest pause %d ms, errors", r.Files, r.Operations, r.Bytes, r.LongestPauseMillis)
	for name, n := range r.Errors {
		if n > 0 {
			text += fmt.Sprintf(" %s: %d", name, n)
		}
	}
	if r.failed() == 0 {
		return text + " none"
	}
	return text + ", the first: " + r.FirstErrors[0].Error
}

// reports returns what the reader in the pod has said up to now, or the one before it.
func (p *pod) reports(ctx context.Context, previous bool) ([]readings, error) {
	text, err := p.s.client.CoreV1().Pods(p.namespace).GetLogs(p.name, &corev1.PodLogOptions{Previous: previous}).DoRaw(ctx)
	if err != nil {
		return nil, fmt.Errorf("read logs of %s: %w", p, err)
	}
	var all []readings
	for _, line := range lines(string(text)) {
		var r readings
		if strings.HasPrefix(line, "{") {
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				return nil, fmt.Errorf("read logs of %s: %w: %s", p, err, line)
			}
			all = append(all, r)
		}
	}
	return all, nil
}

// waitReading waits until the reader in the pod has read all files once.
func (p *pod) waitReading(ctx context.Context, t testing.TB) {
	t.Helper()
	p.waitReady(ctx, t)
	var began readings
	mustAwait(ctx, t, patience, "the reader in "+p.String()+" to begin", func(ctx context.Context) (bool, string, error) {
		all, err := p.reports(ctx, false)
		if err != nil || len(all) == 0 {
			return false, "no report", err
		}
		began = all[0]
		return true, "", nil
	})
	if began.Files != contentFiles {
		t.Errorf("the reader in %s found %d files, want %d", p, began.Files, contentFiles)
	}
}

// readings asks the reader in the pod what it has seen up to now.
func (p *pod) readings(ctx context.Context, t testing.TB) readings {
	t.Helper()
	before, err := p.reports(ctx, false)
	must(t, err)
	p.exec(ctx, t, "kill", "-USR1", "1")
	var last readings
	mustAwait(ctx, t, patience, "a report of the reader in "+p.String(), func(ctx context.Context) (bool, string, error) {
		all, err := p.reports(ctx, false)
		if err != nil || len(all) <= len(before) {
			return false, fmt.Sprintf("%d reports", len(all)), err
		}
		last = all[len(all)-1]
		return true, "", nil
	})
	return last
}

// waitMore waits until the reader in the pod has read everything once more, and returns what it
// says then: what it has not read from the kernel's memory it has read from the file system by now. A
// reader whose file system has ended fails so many times instead.
func (p *pod) waitMore(ctx context.Context, t testing.TB) readings {
	t.Helper()
	began := p.readings(ctx, t)
	var now readings
	mustAwait(ctx, t, patience, "the reader in "+p.String()+" to go on", func(ctx context.Context) (bool, string, error) {
		now = p.readings(ctx, t)
		return now.Operations >= began.Operations+2*contentFiles, now.String(), nil
	})
	return now
}

// endReading tells the reader in the pod to end, and returns what it said then. Its container starts
// again.
func (p *pod) endReading(ctx context.Context, t testing.TB) readings {
	t.Helper()
	before := restarts(p.get(ctx, t))
	_, execErr := p.try(ctx, "kill", "-TERM", "1") // an error where the container ends before the answer
	mustAwait(ctx, t, slowPatience, "the container of "+p.String()+" to start again", func(ctx context.Context) (bool, string, error) {
		now, err := p.s.client.CoreV1().Pods(p.namespace).Get(ctx, p.name, metav1.GetOptions{})
		if err != nil {
			return false, "", err
		}
		return restarts(now) > before && podReady(now), fmt.Sprintf("%s; kill said %v", podState(now), execErr), nil
	})
	all, err := p.reports(ctx, true)
	must(t, err)
	i := slices.IndexFunc(all, func(r readings) bool { return r.State == "ended" })
	if i < 0 {
		t.Fatalf("the reader that was in %s did not say what it had seen", p)
	}
	return all[i]
}
