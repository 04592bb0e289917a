package e2e_test

import (
	"context"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"
)

// testObserve tests what an administrator sees of the driver, and the author of a pod that does not start.
func (s *suite) testObserve(t *testing.T) {
	o := &observation{s: s}
	s.Test(t,
		features.New("metrics").
			Setup(o.prepare).
			Assess("are those that are documented", o.documented).
			Assess("count what is done", o.counted).
			Assess("and probes answer", o.probes).
			Feature(),
		o.words(),
	)
}

// observation is what the features of the part share.
type observation struct {
	s     *suite
	nodes []string

	namespace string // of the pods of the feature words
	refusals  []refusal
	served    *pod
	container string // digest of a container image
}

func (o *observation) prepare(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	o.s.driver(ctx, t)
	o.nodes = o.s.mustNodes(ctx, t)
	return ctx
}

func (o *observation) documented(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	want := documentedMetrics(t)
	for _, node := range o.nodes {
		if diff := cmp.Diff(want, o.s.scrape(ctx, t, node).described()); diff != "" {
			t.Errorf("docs/metrics.md (-) and the driver on %s (+) differ:\n%s", node, diff)
		}
	}
	return ctx
}

// newImage pushes an image that no node has, of one file that is not a small one.
func (o *observation) newImage(ctx context.Context, t *testing.T, name string) image {
	t.Helper()
	content := make([]byte, 1<<20)
	_, err := rand.Read(content)
	must(t, err)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "file"), content, 0o644))
	return o.s.open.pushTree(ctx, t, dir, name)
}

// emptyConfig is the length of the configuration of an image, {}, which its manifest has in itself: nothing
// is fetched for it.
const emptyConfig = 2

func (o *observation) counted(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s, node := o.s, o.nodes[0]
	namespace := s.namespace(ctx, t, "metrics", restrictedPods)
	img, other := o.newImage(ctx, t, "observe/image:v1"), o.newImage(ctx, t, "observe/other:v1")
	on := func(name string, attributes map[string]string) *pod {
		p := s.reader(namespace, name, inline("data", attributes))
		p.Spec.NodeSelector = map[string]string{corev1.LabelHostname: node}
		return s.start(ctx, t, p)
	}
	start := s.watch(ctx, t, node)
	var elsewhere []*watched
	for _, n := range o.nodes[1:] {
		elsewhere = append(elsewhere, s.watch(ctx, t, n))
	}

	// An image that the node has not.
	w := s.watch(ctx, t, node)
	first := on("first", img.attributes())
	first.waitReady(ctx, t)
	w.check(ctx, t,
		moved{name: operations, labels: publish("OK"), by: 1},
		moved{name: "puzzlefs_pulls_total", labels: []string{"result", "fetched"}, by: 1},
		moved{name: "puzzlefs_pulls_total", by: 1},
		moved{name: "puzzlefs_pull_duration_seconds", by: 1},
		moved{name: "puzzlefs_fetched_bytes_total", labels: []string{"source", "registry"}, by: float64(img.Stored - emptyConfig)},
		moved{name: "puzzlefs_fetched_bytes_total", labels: []string{"source", "mirror"}},
		moved{name: "puzzlefs_mounts", by: 1},
		moved{name: "puzzlefs_volumes", labels: []string{"state", "published"}, by: 1},
		moved{name: "puzzlefs_store_bytes", by: float64(img.Stored), more: true},
		moved{name: "puzzlefs_pod_events_total", labels: []string{"result", "sent"}, by: 1, more: true}, // if the pull is slow
	)
	w = s.watch(ctx, t, node)
	first.exec(ctx, t, "cat", "/data/file")
	w.check(ctx, t,
		moved{name: "puzzlefs_store_read_bytes_total", by: 1 << 20},
		moved{name: "puzzlefs_cache_loads_total", by: 1, more: true},
	)

	// The same image, which the node has.
	w = s.watch(ctx, t, node)
	second := on("second", img.attributes())
	second.waitReady(ctx, t)
	w.check(ctx, t,
		moved{name: operations, labels: publish("OK"), by: 1},
		moved{name: "puzzlefs_pulls_total"},
		moved{name: "puzzlefs_fetched_bytes_total"},
		moved{name: "puzzlefs_mounts"},
		moved{name: "puzzlefs_volumes", labels: []string{"state", "published"}, by: 1},
		moved{name: "puzzlefs_store_bytes"},
		moved{name: "puzzlefs_pod_events_total"},
	)
	w = s.watch(ctx, t, node)
	asked := on("asked", img.attributes("pullPolicy", "Always"))
	asked.waitReady(ctx, t)
	w.check(ctx, t,
		moved{name: operations, labels: publish("OK"), by: 1},
		moved{name: "puzzlefs_pulls_total", labels: []string{"result", "present"}, by: 1},
		moved{name: "puzzlefs_pulls_total", by: 1},
		moved{name: "puzzlefs_pull_duration_seconds"},
		moved{name: "puzzlefs_fetched_bytes_total"},
		moved{name: "puzzlefs_mounts"},
	)

	// A digest that is another image's.
	w = s.watch(ctx, t, node)
	refused := on("refused", img.attributes("digest", other.Verity))
	refused.waitEvent(ctx, t, "DigestRefused", "digest mismatch")
	w.check(ctx, t,
		moved{name: operations, labels: publish("DataLoss"), by: 1, more: true},
		moved{name: operations, labels: publish("OK")},
		moved{name: "puzzlefs_pulls_total", labels: []string{"result", "refused"}, by: 1, more: true},
		moved{name: "puzzlefs_verify_failures_total", labels: []string{"where", "manifest"}, by: 1, more: true},
		moved{name: "puzzlefs_verify_failures_total", labels: []string{"where", "pull"}},
		moved{name: "puzzlefs_pod_events_total", labels: []string{"result", "sent"}, by: 1, more: true},
		moved{name: "puzzlefs_mounts"},
		moved{name: "puzzlefs_volumes"},
	)

	for _, p := range []*pod{first, second, asked, refused} {
		p.delete(ctx, t)
	}
	s.agent(node).waitClean(ctx, t)
	start.check(ctx, t,
		moved{name: operations, labels: unpublish("OK"), by: 3, more: true},
		moved{name: "puzzlefs_mounts"},
		moved{name: "puzzlefs_volumes", labels: []string{"state", "published"}},
		moved{name: "puzzlefs_volumes", labels: []string{"state", "pending"}},
		moved{name: "puzzlefs_pulls_in_flight"},
		moved{name: "puzzlefs_store_bytes", by: float64(img.Stored), more: true}, // images stay
	)
	for _, w := range elsewhere {
		w.check(ctx, t,
			moved{name: operations, labels: publish("OK")},
			moved{name: "puzzlefs_pulls_total"},
			moved{name: "puzzlefs_store_bytes"},
		)
	}
	return ctx
}

func (o *observation) probes(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	for _, node := range o.nodes {
		for _, path := range []string{"/healthz", "/readyz"} {
			if got := string(o.s.askDriver(ctx, t, node, path)); got != "ok\n" {
				t.Errorf("%s of the driver on %s answers %q, want ok", path, node, got)
			}
		}
		m := o.s.scrape(ctx, t, node)
		for _, name := range []string{"puzzlefs_ready", "puzzlefs_kubelet_registered"} {
			if got := m.sum(t, name); got != 1 {
				t.Errorf("%s of the driver on %s is %v, want 1", name, node, got)
			}
		}
		if got := m.sum(t, "puzzlefs_build_info", "version", strings.TrimPrefix(o.s.settings.driver.tag, "v")); got != 1 && o.s.settings.ownCluster() {
			t.Errorf("puzzlefs_build_info of the driver on %s does not name version %s: %v", node, o.s.settings.driver.tag, m["puzzlefs_build_info"])
		}
	}
	return ctx
}
