package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	corev1 "k8s.io/api/core/v1"
)

// httpPort is the port of the driver for metrics and probes, by default.
const httpPort = "9809"

// askDriver asks the driver on a node for a path of its HTTP port, by way of the API server.
func (s *suite) askDriver(ctx context.Context, t testing.TB, node, path string) []byte {
	t.Helper()
	b, err := s.askPod(ctx, s.driverPod(ctx, t, node), path)
	must(t, err)
	return b
}

func (s *suite) askPod(ctx context.Context, p *corev1.Pod, path string) ([]byte, error) {
	b, err := s.client.CoreV1().Pods(p.Namespace).ProxyGet("http", p.Name, httpPort, path, nil).DoRaw(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask %s on %s for %s: %w: %s", p.Name, p.Spec.NodeName, path, err, b)
	}
	return b, nil
}

// metricsPatience is how long metrics may take to say what was seen already.
const metricsPatience = 30 * time.Second

// families are what a driver said of itself, by name.
type families map[string]*dto.MetricFamily

// scrape reads the metrics of the driver on a node, as Prometheus would.
func (s *suite) scrape(ctx context.Context, t testing.TB, node string) families {
	t.Helper()
	m, err := s.scrapePod(ctx, s.driverPod(ctx, t, node))
	must(t, err)
	return m
}

func (s *suite) scrapePod(ctx context.Context, p *corev1.Pod) (families, error) {
	b, err := s.askPod(ctx, p, "/metrics")
	if err != nil {
		return nil, err
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	m, err := parser.TextToMetricFamilies(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("read the metrics of %s: %w", p.Name, err)
	}
	return m, nil
}

// sum returns the sum of the series of a metric that have these labels, in pairs of name and value; of
// a histogram it is how many observations there were. Series that are not there yet are 0.
func (m families) sum(t testing.TB, name string, labels ...string) float64 {
	t.Helper()
	family, ok := m[name]
	if !ok && name != operations {
		t.Fatalf("there is no metric %s", name)
	}
	total := 0.0
	for _, series := range family.GetMetric() {
		if hasLabels(series, labels) {
			total += series.GetCounter().GetValue() + series.GetGauge().GetValue() + float64(series.GetHistogram().GetSampleCount())
		}
	}
	return total
}

func hasLabels(series *dto.Metric, labels []string) bool {
	for i := 0; i+1 < len(labels); i += 2 {
		if !slices.ContainsFunc(series.GetLabel(), func(l *dto.LabelPair) bool {
			return l.GetName() == labels[i] && l.GetValue() == labels[i+1]
		}) {
			return false
		}
	}
	return true
}

// operations is the metric of the calls of kubelet, publish and unpublish are the labels of two of them.
const operations = "csi_plugin_operations_seconds"

func publish(code string) []string {
	return []string{"method_name", "/csi.v1.Node/NodePublishVolume", "driver_name", driverName, "grpc_status_code", code}
}

func unpublish(code string) []string {
	return []string{"method_name", "/csi.v1.Node/NodeUnpublishVolume", "driver_name", driverName, "grpc_status_code", code}
}

// described returns "type label label" of all metrics, but of those that Prometheus' library brings.
func (m families) described() map[string]string {
	out := map[string]string{}
	for name, family := range m {
		if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
			continue
		}
		labels := map[string]bool{}
		for _, series := range family.GetMetric() {
			for _, l := range series.GetLabel() {
				labels[l.GetName()] = true
			}
		}
		out[name] = strings.Join(append([]string{strings.ToLower(family.GetType().String())}, slices.Sorted(maps.Keys(labels))...), " ")
	}
	return out
}

// documentedMetrics returns the same of the table in docs/metrics.md.
func documentedMetrics(t testing.TB) map[string]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "metrics.md"))
	must(t, err)
	quoted := regexp.MustCompile("`([a-z_]+)`")
	out := map[string]string{}
	for _, line := range lines(string(b)) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || !slices.Contains([]string{"counter", "gauge", "histogram"}, strings.TrimSpace(cells[2])) {
			continue
		}
		name := quoted.FindStringSubmatch(cells[1])
		if name == nil {
			t.Fatalf("docs/metrics.md has a row without a name: %s", line)
		}
		var labels []string
		for _, l := range quoted.FindAllStringSubmatch(cells[3], -1) {
			labels = append(labels, l[1])
		}
		slices.Sort(labels)
		out[name[1]] = strings.Join(append([]string{strings.TrimSpace(cells[2])}, labels...), " ")
	}
	if len(out) < 20 {
		t.Fatalf("docs/metrics.md has a table of %d metrics only", len(out))
	}
	return out
}

// watched compares what metrics are with what they were.
type watched struct {
	s      *suite
	pod    *corev1.Pod
	before families
}

// watch scrapes the driver on a node before something is done.
func (s *suite) watch(ctx context.Context, t testing.TB, node string) *watched {
	t.Helper()
	return &watched{s: s, pod: s.driverPod(ctx, t, node), before: s.scrape(ctx, t, node)}
}

// moved is how a series is to have moved: by exactly by, or, if it cannot be said how often kubelet asks,
// by no less.
type moved struct {
	name   string
	labels []string
	by     float64
	more   bool
}

// check waits until the series have moved as they should; calls of kubelet end, and are counted, a moment
// after what they bring about.
func (w *watched) check(ctx context.Context, t testing.TB, want ...moved) {
	t.Helper()
	what := "the metrics of the driver on " + w.pod.Spec.NodeName + " to say what was done"
	mustAwait(ctx, t, metricsPatience, what, func(ctx context.Context) (bool, string, error) {
		now, err := w.s.scrapePod(ctx, w.pod)
		if err != nil {
			return false, "", err
		}
		var wrong []string
		for _, m := range want {
			got := now.sum(t, m.name, m.labels...) - w.before.sum(t, m.name, m.labels...)
			if got == m.by || m.more && got > m.by {
				continue
			}
			sign := ""
			if m.more {
				sign = " or more"
			}
			wrong = append(wrong, fmt.Sprintf("%s%q moved by %v, want %v%s", m.name, m.labels, got, m.by, sign))
		}
		return len(wrong) == 0, strings.Join(wrong, "\n"), nil
	})
}
