package e2e_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
)

// example returns a file of examples/ as it is after somebody has edited it: in each line that says EDIT, or
// in the line after one that says EDIT the next line, one of the texts in edits is replaced. All edits must
// be used.
func example(t testing.TB, file string, edits map[string]string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "examples", file))
	must(t, err)
	all := lines(string(b))
	used := map[string]bool{}
	// The longest first, as one may be the beginning of another.
	texts := slices.SortedFunc(maps.Keys(edits), func(a, b string) int { return len(b) - len(a) })
	for i := range all {
		_, mark, marked := strings.Cut(all[i], "# EDIT")
		if !marked {
			continue
		}
		at := i
		if strings.HasPrefix(mark, " the next line") {
			at++
		}
		found := slices.IndexFunc(texts, func(old string) bool { return strings.Contains(all[at], old) })
		if found < 0 {
			t.Fatalf("examples/%s has a line to edit that the test does not know: %s", file, all[at])
		}
		old := texts[found]
		all[at], used[old] = strings.Replace(all[at], old, edits[old], 1), true
	}
	if len(used) != len(edits) {
		t.Fatalf("examples/%s has lines to edit for %v only, want %v", file, slices.Sorted(maps.Keys(used)), slices.Sorted(maps.Keys(edits)))
	}
	return []byte(strings.Join(all, "\n"))
}

// What is in examples/ to be edited.
const (
	exampleDigest = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
	exampleModels = "registry.example.com/team/models:v1"
	exampleSite   = "registry.example.com/team/site:v1"
)

// apply is kubectl apply of a text, and kubectl delete of it when the test ends.
func (s *suite) apply(ctx context.Context, t *testing.T, namespace string, text []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "objects.yaml")
	must(t, os.WriteFile(file, text, 0o600))
	s.kubectl(ctx, t, "--namespace", namespace, "apply", "--filename", file)
	t.Cleanup(func() {
		if t.Failed() && s.settings.keep {
			return
		}
		// The examples' shells do not hear SIGTERM.
		s.kubectl(context.WithoutCancel(ctx), t, "--namespace", namespace, "delete", "--ignore-not-found", "--grace-period=1", "--filename", file)
	})
}

// podExamples applies the examples of pods, and looks where they say that one sees that they work.
func (c *claims) podExamples(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s, dir := c.s, t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	must(t, os.MkdirAll(filepath.Join(dir, "small", "en"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "small", "en", "words"), []byte("hello\n"), 0o644))
	img, secret := s.open.pushTree(ctx, t, dir, "examples/models:v1"), s.private.pushTree(ctx, t, dir, "examples/models:v1")
	edits := map[string]string{exampleModels: img.Ref, exampleDigest: img.Digest}

	for _, e := range []struct {
		file  string
		edits map[string]string
		says  []string
	}{
		{"inline-volume.yaml", edits, []string{"/models/small/en:", "words"}},
		{"sub-path.yaml", with(edits, "small/en", "small"), []string{"/models/en:", "words"}},
		{"pull-secret.yaml", map[string]string{
			exampleModels: secret.Ref, exampleDigest: secret.Digest,
			`{"auths": {"registry.example.com": {"username": "reader", "password": "change-me"}}}`: string(dockerConfig(s.private.user, s.private.password, s.private.host())),
		}, []string{"/models/small/en:", "words"}},
		{"static-pv.yaml", with(edits, "namespace: default", "namespace: "+c.namespace), []string{"/models/small/en:", "words"}},
		{"user-namespace.yaml", edits, []string{"/models/small/en:", "words"}},
	} {
		t.Run(e.file, func(t *testing.T) {
			s.apply(ctx, t, c.namespace, example(t, e.file, e.edits))
			p := s.pod(c.namespace, strings.TrimSuffix(e.file, ".yaml"))
			p.waitReady(ctx, t)
			mustAwait(ctx, t, patience, "what "+p.String()+" says", func(ctx context.Context) (bool, string, error) {
				said := p.logs(ctx, t, "")
				for _, text := range e.says {
					if !strings.Contains(said, text) {
						return false, said, nil
					}
				}
				return true, "", nil
			})
			if out, err := p.try(ctx, "touch", "/models/x"); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
				t.Errorf("touch /models/x: %q, %v; want Read-only file system", out, err)
			}
			if p.get(ctx, t).Spec.HostUsers != nil {
				if id := strings.Fields(p.exec(ctx, t, "cat", "/proc/self/uid_map")); len(id) != 3 || id[0] != "0" || id[1] == "0" {
					t.Errorf("the pod has the user ids %v, want 0 not to be that of the node", id)
				}
			}
		})
	}
	return ctx
}

// manyReaders uses the claim of the example in more pods, on all nodes.
func (c *claims) manyReaders(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s := c.s
	img := s.open.pushTree(ctx, t, textTree(t, "claimed\n"), "claims/models:v1")
	s.apply(ctx, t, c.namespace, example(t, "static-pv.yaml", map[string]string{
		exampleModels: img.Ref, exampleDigest: img.Digest, "namespace: default": "namespace: " + c.namespace,
	}))
	nodes, err := s.nodes(ctx)
	must(t, err)
	pods := []*pod{s.pod(c.namespace, "static-pv")}
	for i := range 2 * len(nodes) {
		pods = append(pods, s.start(ctx, t, on(nodes[i%len(nodes)], s.reader(c.namespace, fmt.Sprintf("claimant-%d", i), claimed("data", "models")))))
	}
	for i, p := range pods {
		p.waitReady(ctx, t)
		dir := "/data"
		if i == 0 {
			dir = "/models"
		}
		if got := p.exec(ctx, t, "cat", dir+"/text"); got != "claimed\n" {
			t.Errorf("pod %s reads %q from the claim", p, got)
		}
		if out, err := p.try(ctx, "touch", dir+"/x"); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
			t.Errorf("touch in the claim: %q, %v; want Read-only file system", out, err)
		}
	}
	claim, err := s.client.CoreV1().PersistentVolumeClaims(c.namespace).Get(ctx, "models", metav1.GetOptions{})
	must(t, err)
	if claim.Spec.VolumeName != "models-v1" {
		t.Errorf("the claim has the volume %q, want models-v1", claim.Spec.VolumeName)
	}
	for _, node := range nodes {
		if got := s.agent(node).metric(ctx, t, "puzzlefs_mounts"); got != 1 {
			t.Errorf("the driver on %s has %v mounts for the pods of one claim, want 1", node, got)
		}
	}
	s.kubectl(ctx, t, "--namespace", c.namespace, "delete", "pods", "--all", "--grace-period=1")
	for _, node := range nodes {
		s.agent(node).waitClean(ctx, t)
	}
	return ctx
}
