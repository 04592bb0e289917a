package deploy_test

import (
	"os"
	"path/filepath"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// TestAPIServer holds all that we deliver against a real API server.
func TestAPIServer(t *testing.T) {
	c := newCluster(t)
	t.Run("chart", func(t *testing.T) { testChartIsAccepted(t, c) })
	t.Run("kustomize", func(t *testing.T) {
		c.mustAccept(t, baseDir, build(t, filesys.MakeFsOnDisk(), baseDir)...)
	})
	t.Run("examples", func(t *testing.T) { testExamplesAreAccepted(t, c) })
	t.Run("unknown fields", func(t *testing.T) { testUnknownFieldIsRefused(t, c) })
	t.Run("admission", func(t *testing.T) { testAdmission(t, c) })
}

// testChartIsAccepted: with default values and with everything, every object, and a pod as the
// DaemonSet's controller would make it.
func testChartIsAccepted(t *testing.T, c *cluster) {
	for name, v := range map[string]map[string]any{
		"defaults":   nil,
		"everything": everything(t),
		"certs.d":    values(t, `registries: {hostPath: /etc/containerd/certs.d}`),
		"other":      values(t, `{networkPolicy: {enabled: true}, podMonitor: {enabled: true, relabelings: []}, admissionPolicy: {enabled: true, validationActions: [Warn, Audit]}}`),
	} {
		list := objects(t, mustRender(t, v))
		c.mustAccept(t, name, list...)
		daemonSet := find(t, list, "DaemonSet", "")
		pod := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "Pod"}}
		for key, value := range mapAt(daemonSet.Object, "spec", "template") {
			pod.Object[key] = value
		}
		pod.SetName("pod-of-the-daemonset")
		pod.SetNamespace(namespace)
		c.mustAccept(t, name, pod)
	}
}

// testExamplesAreAccepted: every file as it is.
func testExamplesAreAccepted(t *testing.T, c *cluster) {
	for _, name := range yamlFiles(t, rootDir+"/examples") {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		list := parse(t, name, string(b))
		if len(list) == 0 {
			t.Errorf("%s has no object", name)
		}
		c.mustAccept(t, filepath.Base(name), list...)
	}
}

// testUnknownFieldIsRefused: the check above would notice.
func testUnknownFieldIsRefused(t *testing.T, c *cluster) {
	for name, text := range map[string]string{
		"core": `{apiVersion: v1, kind: ConfigMap, metadata: {name: a}, dta: {}}`,
		"CRD":  `{apiVersion: monitoring.coreos.com/v1, kind: PodMonitor, metadata: {name: a}, spec: {selector: {}, podMetricEndpoints: []}}`,
	} {
		if err := c.accept(t.Context(), object(t, text)); err == nil {
			t.Errorf("%s: an unknown field was accepted", name)
		}
	}
}
