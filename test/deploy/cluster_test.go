package deploy_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/deploy/internal/apiserver"
)

// The Prometheus operator, for its CRDs. They are YAML in a module of Go, which nothing of ours
// imports: so it is not in go.mod, and its hash is here.
const (
	operator    = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
	operatorSum = "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s="
)

// cluster is an API server with what tests need in it.
type cluster struct {
	client   dynamic.Interface
	mapper   *restmapper.DeferredDiscoveryRESTMapper
	warnings *warnings
}

// warnings collects what the API server says in the header Warning: deprecated fields, and policies
// that will refuse.
type warnings struct {
	mu   sync.Mutex
	said []string // guarded by mu
}

// HandleWarningHeader implements rest.WarningHandler.
func (w *warnings) HandleWarningHeader(_ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.said = append(w.said, text)
}

// take returns and forgets what was said.
func (w *warnings) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	said := w.said
	w.said = nil
	return said
}

// newCluster starts an API server, with the CRDs of the Prometheus operator and the namespaces
// default and that of the chart.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), rootDir+"/hack/kube.sh")
	cmd.Stderr = os.Stderr
	programs, err := cmd.Output()
	if err != nil {
		t.Fatalf("build Kubernetes: %v", err)
	}
	server, err := apiserver.Start(t.Context(), apiserver.Config{Programs: strings.TrimSpace(string(programs)), Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Stop()
		if t.Failed() {
			t.Log(server.Logs())
		}
	})
	c := &cluster{warnings: &warnings{}}
	cfg := server.ClientConfig()
	cfg.WarningHandler = c.warnings
	if c.client, err = dynamic.NewForConfig(cfg); err != nil {
		t.Fatal(err)
	}
	discovered, err := discovery.NewDiscoveryClientForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.mapper = restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(discovered))

	for _, name := range []string{"podmonitors", "prometheusrules"} {
		b, err := os.ReadFile(filepath.Join(operatorDir(t), "example/prometheus-operator-crd/monitoring.coreos.com_"+name+".yaml"))
		if err != nil {
			t.Fatal(err)
		}
		c.mustCreate(t, parse(t, name, string(b))...)
	}
	// Controllers, which do not run here, would make the service accounts.
	c.mustCreate(t, parse(t, "namespaces", `
{apiVersion: v1, kind: Namespace, metadata: {name: csi-puzzlefs, labels: {pod-security.kubernetes.io/enforce: privileged}}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: default, namespace: csi-puzzlefs}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: csi-puzzlefs, namespace: csi-puzzlefs}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: default, namespace: default}}
`)...)
	c.eventually(t, "the CRDs are served", func() error {
		c.mapper.Reset()
		return errors.Join(c.accept(t.Context(), object(t, `{apiVersion: monitoring.coreos.com/v1, kind: PodMonitor, metadata: {name: a}, spec: {selector: {}}}`)),
			c.accept(t.Context(), object(t, `{apiVersion: monitoring.coreos.com/v1, kind: PrometheusRule, metadata: {name: a}, spec: {}}`)))
	})
	return c
}

// operatorDir downloads the module of the Prometheus operator and returns its directory.
func operatorDir(t *testing.T) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", operator)
	cmd.Dir = t.TempDir() // outside of our module
	b, err := cmd.Output()
	var m struct{ Dir, Sum, Error string }
	if jsonErr := json.Unmarshal(b, &m); err != nil || jsonErr != nil {
		t.Fatalf("download %s: %v, %v, %s", operator, err, jsonErr, m.Error)
	}
	if m.Sum != operatorSum {
		t.Fatalf("%s has the hash %s, want %s", operator, m.Sum, operatorSum)
	}
	return m.Dir
}

// object parses YAML of one object.
func object(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	list := parse(t, "object", text)
	if len(list) != 1 {
		t.Fatalf("%d objects, want 1: %s", len(list), text)
	}
	return list[0]
}

// create creates o, or asks for no more than whether it could.
func (c *cluster) create(ctx context.Context, o *unstructured.Unstructured, options metav1.CreateOptions) error {
	gvk := o.GroupVersionKind()
	mapping, err := c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if err != nil {
		return err
	}
	var to dynamic.ResourceInterface = c.client.Resource(mapping.Resource)
	if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
		namespace := o.GetNamespace()
		if namespace == "" {
			namespace = "default"
		}
		to = c.client.Resource(mapping.Resource).Namespace(namespace)
	}
	options.FieldValidation = metav1.FieldValidationStrict
	_, err = to.Create(ctx, o, options)
	return err
}

// accept asks whether the API server would create o: with everything that it checks, and with the
// refusal of fields that it does not know.
func (c *cluster) accept(ctx context.Context, o *unstructured.Unstructured) error {
	return c.create(ctx, o, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
}

// mustAccept fails for objects that the API server refuses or warns of.
func (c *cluster) mustAccept(t *testing.T, where string, list ...*unstructured.Unstructured) {
	t.Helper()
	c.warnings.take()
	for _, o := range list {
		if err := c.accept(t.Context(), o); err != nil && !apierrors.IsAlreadyExists(err) {
			t.Errorf("%s: %s %s is refused: %v", where, o.GetKind(), o.GetName(), err)
		}
		if said := c.warnings.take(); len(said) > 0 {
			t.Errorf("%s: %s %s: warnings: %q", where, o.GetKind(), o.GetName(), said)
		}
	}
}

func (c *cluster) mustCreate(t *testing.T, list ...*unstructured.Unstructured) {
	t.Helper()
	for _, o := range list {
		if err := c.create(t.Context(), o, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatalf("create %s %s: %v", o.GetKind(), o.GetName(), err)
		}
	}
}

// eventually waits until check returns nil.
func (c *cluster) eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(fmt.Errorf("%s: not after a minute: %w", what, err))
		}
		time.Sleep(50 * time.Millisecond)
	}
}
