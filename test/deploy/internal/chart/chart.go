// Package chart renders our Helm chart with Helm's own library, as "helm template" does: values
// are checked against the schema first. It is for tests and for what generates deploy/kubernetes;
// nothing is installed.
package chart

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	helmchart "helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/json"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
)

// Options say what to render a chart for.
type Options struct {
	// Release and Namespace are those of "helm install".
	Release, Namespace string
	// KubeVersion is the version of the API server, such as "v1.36.3".
	KubeVersion string
	// Values go over the chart's own.
	Values map[string]any
}

// File is what one template became.
type File struct {
	// Name is the template's path in the chart, "templates/daemonset.yaml".
	Name string
	// Text is YAML, of any number of documents, but for NOTES.txt.
	Text string
}

// Load reads the chart in a directory.
func Load(dir string) (*helmchart.Chart, error) {
	c, err := loader.LoadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("load chart %s: %w", dir, err)
	}
	return c, nil
}

// Render renders c and returns the files that are not empty in the order of their names.
func Render(c *helmchart.Chart, o Options) ([]File, error) {
	version, err := chartutil.ParseKubeVersion(o.KubeVersion)
	if err != nil {
		return nil, fmt.Errorf("render chart: version of Kubernetes %q: %w", o.KubeVersion, err)
	}
	caps := chartutil.DefaultCapabilities.Copy()
	caps.KubeVersion = *version
	release := chartutil.ReleaseOptions{Name: o.Release, Namespace: o.Namespace, Revision: 1, IsInstall: true}
	values, err := chartutil.ToRenderValues(c, o.Values, release, caps)
	if err != nil {
		return nil, fmt.Errorf("render chart: %w", err)
	}
	rendered, err := engine.Render(c, values)
	if err != nil {
		return nil, fmt.Errorf("render chart: %w", err)
	}
	var files []File
	for _, name := range slices.Sorted(maps.Keys(rendered)) {
		if text := strings.TrimSpace(rendered[name]); text != "" {
			files = append(files, File{Name: strings.TrimPrefix(name, c.Name()+"/"), Text: text + "\n"})
		}
	}
	return files, nil
}

// IsTest says whether f is part of "helm test" and not of an installation.
func (f File) IsTest() bool { return path.Dir(f.Name) == "templates/tests" }

// IsManifest says whether f holds objects; NOTES.txt does not.
func (f File) IsManifest() bool { return path.Ext(f.Name) == ".yaml" }

// Objects parses all documents of YAML in text. Empty ones are left out.
func Objects(text string) ([]*unstructured.Unstructured, error) {
	var objects []*unstructured.Unstructured
	decoder := utilyaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		var document runtime.RawExtension
		err := decoder.Decode(&document)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		var content map[string]any
		if err == nil && len(document.Raw) > 0 {
			err = json.Unmarshal(document.Raw, &content) // whole numbers become int64
		}
		if err != nil {
			return nil, fmt.Errorf("parse manifest: %w", err)
		}
		if len(content) > 0 {
			objects = append(objects, &unstructured.Unstructured{Object: content})
		}
	}
}
