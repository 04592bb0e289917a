// Package deploy_test holds what is delivered for installation to what it promises: the Helm chart,
// the kustomize base and the examples.
package deploy_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/deploy/internal/chart"
)

const (
	rootDir  = "../.."
	chartDir = rootDir + "/charts/csi-puzzlefs"
	baseDir  = rootDir + "/deploy/kubernetes"

	// What hack/kube.sh builds.
	kubeVersion = "v1.36.3"
	namespace   = "csi-puzzlefs"
)

// values parses YAML.
func values(t *testing.T, text string) map[string]any {
	t.Helper()
	var v map[string]any
	if err := yaml.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func everything(t *testing.T) map[string]any {
	t.Helper()
	b, err := os.ReadFile("testdata/everything.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return values(t, string(b))
}

// render renders the chart as it is for Kubernetes of kubeVersion.
func render(v map[string]any) ([]chart.File, error) {
	return renderFor(kubeVersion, v)
}

func renderFor(version string, v map[string]any) ([]chart.File, error) {
	c, err := chart.Load(chartDir)
	if err != nil {
		return nil, err
	}
	return chart.Render(c, chart.Options{Release: "csi-puzzlefs", Namespace: namespace, KubeVersion: version, Values: v})
}

func mustRender(t *testing.T, v map[string]any) []chart.File {
	t.Helper()
	files, err := render(v)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// objects returns the objects of all manifests in files.
func objects(t *testing.T, files []chart.File) []*unstructured.Unstructured {
	t.Helper()
	var all []*unstructured.Unstructured
	for _, f := range files {
		if f.IsManifest() {
			all = append(all, parse(t, f.Name, f.Text)...)
		}
	}
	return all
}

func parse(t *testing.T, name, text string) []*unstructured.Unstructured {
	t.Helper()
	list, err := chart.Objects(text)
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, text)
	}
	return list
}

// find returns the only object of a kind whose name ends with suffix.
func find(t *testing.T, list []*unstructured.Unstructured, kind, suffix string) *unstructured.Unstructured {
	t.Helper()
	var found []*unstructured.Unstructured
	for _, o := range list {
		if o.GetKind() == kind && strings.HasSuffix(o.GetName(), suffix) {
			found = append(found, o)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d objects of kind %s whose names end with %q, want 1; there are %v", len(found), kind, suffix, names(list))
	}
	return found[0]
}

// names returns KIND/NAME of all objects, sorted.
func names(list []*unstructured.Unstructured) []string {
	var all []string
	for _, o := range list {
		all = append(all, o.GetKind()+"/"+o.GetName())
	}
	slices.Sort(all)
	return all
}

// at returns what is at a path of keys and indexes in an object, nil if there is nothing.
func at(v any, path ...any) any {
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[p]
		case int:
			l, _ := v.([]any)
			if p >= len(l) {
				return nil
			}
			v = l[p]
		}
	}
	return v
}

// listAt returns the list at a path, empty if there is none.
func listAt(v any, path ...any) []any {
	list, _ := at(v, path...).([]any)
	return list
}

// mapAt returns the map at a path, empty if there is none.
func mapAt(v any, path ...any) map[string]any {
	m, _ := at(v, path...).(map[string]any)
	return m
}

// textAt returns the string at a path, "" if there is none.
func textAt(v any, path ...any) string {
	s, _ := at(v, path...).(string)
	return s
}

// podSpec returns the pod spec of a DaemonSet or the like.
func podSpec(o *unstructured.Unstructured) map[string]any {
	return mapAt(o.Object, "spec", "template", "spec")
}

// container returns the container of a name, nil if there is none.
func container(spec map[string]any, name string) map[string]any {
	for _, c := range listAt(spec, "containers") {
		if c, ok := c.(map[string]any); ok && c["name"] == name {
			return c
		}
	}
	return nil
}

// stringsAt returns the list of strings at a path.
func stringsAt(v any, path ...any) []string {
	var all []string
	for _, s := range listAt(v, path...) {
		all = append(all, textAt(s))
	}
	return all
}

// yamlFiles returns the YAML files directly in dir.
func yamlFiles(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("no YAML files in %s", dir)
	}
	return files
}
