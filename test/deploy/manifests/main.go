// Command manifests writes deploy/kubernetes, a kustomize base that is the chart with its default
// values, for those who do not use Helm. What only Helm needs is left out, and comments stay, for
// these files are read by people. hack/generate.sh runs it.
//
// usage: manifests CHART DIR
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/deploy/internal/chart"
)

const (
	name = "csi-puzzlefs"
	// The oldest version that the chart takes: what is written has to do for all of them.
	kubeVersion = "v1.30.0"

	header = "# Generated from charts/csi-puzzlefs by make generate; change it there.\n"

	namespace = header + `apiVersion: v1
kind: Namespace
metadata:
  name: csi-puzzlefs
  labels:
    app.kubernetes.io/name: csi-puzzlefs
    # The driver mounts, and has to be privileged for that.
    pod-security.kubernetes.io/enforce: privileged
`
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: manifests CHART DIR")
		os.Exit(2)
	}
	if err := write(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintf(os.Stderr, "manifests: %v\n", err)
		os.Exit(1)
	}
}

// write replaces all YAML files in dir by those of the chart.
func write(chartDir, dir string) error {
	c, err := chart.Load(chartDir)
	if err != nil {
		return err
	}
	files, err := chart.Render(c, chart.Options{Release: name, Namespace: name, KubeVersion: kubeVersion})
	if err != nil {
		return err
	}
	old, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return err
	}
	for _, file := range old {
		if err := os.Remove(file); err != nil {
			return err
		}
	}
	kustomization := header + "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n  - namespace.yaml\n"
	content := map[string]string{"namespace.yaml": namespace}
	for _, f := range files {
		if !f.IsManifest() || f.IsTest() {
			continue
		}
		base := filepath.Base(f.Name)
		content[base] = header + withoutHelm(f.Text)
		kustomization += "  - " + base + "\n"
	}
	content["kustomization.yaml"] = kustomization
	for base, text := range content {
		if err := os.WriteFile(filepath.Join(dir, base), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// withoutHelm leaves out the labels by which Helm knows what it manages.
func withoutHelm(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		key, _, _ := strings.Cut(strings.TrimSpace(line), ":")
		if key != "helm.sh/chart" && key != "app.kubernetes.io/managed-by" {
			b.WriteString(line)
		}
	}
	return b.String()
}
