package deploy_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// build runs kustomize in dir.
func build(t *testing.T, fs filesys.FileSystem, dir string) []*unstructured.Unstructured {
	t.Helper()
	result, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(fs, dir)
	if err != nil {
		t.Fatalf("kustomize build %s: %v", dir, err)
	}
	text, err := result.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, dir, string(text))
}

// TestKustomizeEqualsChart: the base is the chart with its default values, but for what only Helm
// needs, and for the namespace, which "helm install --create-namespace" makes.
func TestKustomizeEqualsChart(t *testing.T) {
	files, err := renderFor("v1.30.0", nil)
	if err != nil {
		t.Fatal(err)
	}
	fromChart := map[string]any{}
	for _, f := range files {
		if !f.IsManifest() || f.IsTest() {
			continue
		}
		for _, o := range parse(t, f.Name, f.Text) {
			fromChart[o.GetKind()+"/"+o.GetNamespace()+"/"+o.GetName()] = withoutHelm(o.Object)
		}
	}
	fromBase := map[string]any{}
	for _, o := range build(t, filesys.MakeFsOnDisk(), baseDir) {
		if o.GetKind() == "Namespace" {
			if o.GetName() != namespace || o.GetLabels()["pod-security.kubernetes.io/enforce"] != "privileged" {
				t.Errorf("namespace %s with the labels %v", o.GetName(), o.GetLabels())
			}
			continue
		}
		fromBase[o.GetKind()+"/"+o.GetNamespace()+"/"+o.GetName()] = o.Object
	}
	if diff := cmp.Diff(fromChart, fromBase); diff != "" {
		t.Errorf("the chart (-) and deploy/kubernetes (+) differ; if the chart is right, run make generate:\n%s", diff)
	}
}

// withoutHelm removes the labels that only Helm needs, wherever in an object they are.
func withoutHelm(v any) any {
	switch v := v.(type) {
	case map[string]any:
		delete(v, "helm.sh/chart")
		delete(v, "app.kubernetes.io/managed-by")
		for _, inner := range v {
			withoutHelm(inner)
		}
	case []any:
		for _, inner := range v {
			withoutHelm(inner)
		}
	}
	return v
}

// TestOverlay is the overlay of deploy/kubernetes/README.md.
func TestOverlay(t *testing.T) {
	fs := filesys.MakeFsInMemory()
	for _, name := range yamlFiles(t, baseDir) {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := fs.WriteFile("/base/"+filepath.Base(name), b); err != nil {
			t.Fatal(err)
		}
	}
	if err := fs.WriteFile("/overlay/kustomization.yaml", []byte(overlay(t))); err != nil {
		t.Fatal(err)
	}
	spec := podSpec(find(t, build(t, fs, "/overlay"), "DaemonSet", ""))
	driver := container(spec, "driver")
	if want := "registry.example.com/platform/csi-puzzlefs@sha256:" + strings.Repeat("0", 64); driver["image"] != want {
		t.Errorf("image %v, want %s", driver["image"], want)
	}
	args := stringsAt(driver, "args")
	base := container(podSpec(find(t, build(t, filesys.MakeFsOnDisk(), baseDir), "DaemonSet", "")), "driver")
	if diff := cmp.Diff(append(stringsAt(base, "args"), "--allowed-registries=registry.example.com/team"), args); diff != "" {
		t.Errorf("arguments (-want +got):\n%s", diff)
	}
}

// overlay returns the kustomization that the README shows, on top of /base.
func overlay(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(baseDir + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "```yaml\n# kustomization.yaml\n")
	text, _, closed := strings.Cut(text, "```\n")
	remote := regexp.MustCompile(`https://\S+//deploy/kubernetes\S*`)
	if !closed || len(remote.FindAllString(text, -1)) != 1 {
		t.Fatalf("no kustomization with one remote base in the README: %q", text)
	}
	return remote.ReplaceAllString(text, "../base")
}
