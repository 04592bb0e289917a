package deploy_test

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"
)

// metricsOf returns the names of the metrics in an expression, which it checks.
func metricsOf(t *testing.T, where, expr string) map[string]*parser.VectorSelector {
	t.Helper()
	parsed, err := parser.ParseExpr(expr)
	if err != nil {
		t.Errorf("%s: %s: %v", where, expr, err)
		return nil
	}
	found := map[string]*parser.VectorSelector{}
	parser.Inspect(parsed, func(node parser.Node, _ []parser.Node) error {
		if v, ok := node.(*parser.VectorSelector); ok {
			found[v.Name] = v
		}
		return nil
	})
	if len(found) == 0 {
		t.Errorf("%s: no metric in %s", where, expr)
	}
	return found
}

// documented returns the names that docs/metrics.md, which another test holds against the driver,
// says there are, with their rows.
func documented(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile(rootDir + "/docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{
		// Prometheus' own, of each target.
		"up": "",
	}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` .*$").FindAllStringSubmatch(string(b), -1) {
		all[row[1]] = row[0]
	}
	if len(all) < 10 {
		t.Fatalf("found only %v in docs/metrics.md", all)
	}
	return all
}

// checkMetrics fails for metrics, and for labels of ours, that there are not.
func checkMetrics(t *testing.T, where, expr string, rows map[string]string) {
	t.Helper()
	for name, selector := range metricsOf(t, where, expr) {
		base := name
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if trimmed := strings.TrimSuffix(name, suffix); rows[trimmed] != "" {
				base = trimmed
			}
		}
		row, ok := rows[base]
		if !ok && !strings.HasPrefix(name, "process_") && !strings.HasPrefix(name, "go_") {
			t.Errorf("%s: docs/metrics.md has no metric %s, which is in %s", where, name, expr)
		}
		for _, m := range selector.LabelMatchers {
			// What a label may be is in the row, in the form `label` or `value`.
			target := m.Name == "__name__" || m.Name == "node" || m.Name == "job"
			if !target && !strings.Contains(row, "`"+m.Name+"`") {
				t.Errorf("%s: the metric %s has no label %s, which is in %s", where, name, m.Name, expr)
			}
			for _, value := range strings.Split(m.Value, "|") {
				known := strings.HasPrefix(base, "csi_plugin") || strings.Contains(row, "`"+value+"`")
				if !target && !known {
					t.Errorf("%s: docs/metrics.md knows no value %s of the label %s of %s", where, value, m.Name, name)
				}
			}
		}
	}
}

func TestAlerts(t *testing.T) {
	rows := documented(t)
	list := objects(t, mustRender(t, values(t, `{prometheusRule: {enabled: true, alertLabels: {team: storage}}, podMonitor: {enabled: true}}`)))
	rule := find(t, list, "PrometheusRule", "")
	rules := listAt(rule.Object, "spec", "groups", 0, "rules")
	if len(rules) == 0 {
		t.Fatal("no alerts")
	}
	seen := map[string]bool{}
	for _, r := range rules {
		text := func(path ...any) string { return textAt(r, path...) }
		name := text("alert")
		if seen[name] {
			t.Errorf("there are two alerts %s", name)
		}
		seen[name] = true
		checkMetrics(t, name, text("expr"), rows)
		if severity := text("labels", "severity"); severity != "warning" && severity != "critical" {
			t.Errorf("%s has the severity %q", name, severity)
		}
		if text("labels", "team") != "storage" {
			t.Errorf("%s has the labels %v", name, at(r, "labels"))
		}
		if summary := text("annotations", "summary"); !strings.Contains(summary, "$labels.node") || text("annotations", "description") == "" {
			t.Errorf("%s does not say where and what: %v", name, at(r, "annotations"))
		}
		if strings.Contains(text("expr"), "JOB") {
			t.Errorf("%s: the job's name is missing in %s", name, text("expr"))
		}
	}
	monitor := find(t, list, "PodMonitor", "")
	job := monitor.GetNamespace() + "/" + monitor.GetName()
	if expr := textAt(rules[0], "expr"); !strings.Contains(expr, `job="`+job+`"`) {
		t.Errorf("the first alert is on %s, want the job %s", expr, job)
	}

	// What can be left out is what there is.
	for name := range seen {
		less := mustRender(t, values(t, `prometheusRule: {enabled: true, disabled: [`+name+`]}`))
		left := listAt(find(t, objects(t, less), "PrometheusRule", "").Object, "spec", "groups", 0, "rules")
		if len(left) != len(rules)-1 {
			t.Errorf("without %s there are %d alerts, want %d", name, len(left), len(rules)-1)
		}
	}
	with := mustRender(t, values(t, `{prometheusRule: {enabled: true}, registrar: {enabled: true}}`))
	for _, r := range listAt(find(t, objects(t, with), "PrometheusRule", "").Object, "spec", "groups", 0, "rules") {
		if at(r, "alert") == "PuzzleFSDriverNotRegistered" {
			t.Error("with the registrar there is an alert that the driver is not registered by itself")
		}
	}
}

func TestDashboard(t *testing.T) {
	rows := documented(t)
	data := at(find(t, objects(t, mustRender(t, values(t, `dashboard: {enabled: true}`))), "ConfigMap", "-dashboard").Object, "data")
	var dashboard struct {
		Panels []struct {
			Title   string
			ID      int
			Type    string
			Targets []struct{ Expr, RefID string }
			GridPos struct{ X, Y, W, H int }
		}
	}
	if err := json.Unmarshal([]byte(textAt(data, "csi-puzzlefs.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	variables := strings.NewReplacer("$__rate_interval", "5m", "$node", ".*")
	used := map[int]string{}
	for _, p := range dashboard.Panels {
		if other, ok := used[p.ID]; ok {
			t.Errorf("%s and %s have the same id", p.Title, other)
		}
		used[p.ID] = p.Title
		if p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("%s ends at column %d of 24", p.Title, p.GridPos.X+p.GridPos.W)
		}
		if len(p.Targets) == 0 && p.Type != "row" {
			t.Errorf("%s shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			checkMetrics(t, p.Title, variables.Replace(target.Expr), rows)
		}
	}
	if len(used) < 10 {
		t.Errorf("only %d panels", len(used))
	}
}
