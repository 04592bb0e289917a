package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/storage/driver"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cli-runtime/pkg/genericclioptions"
)

// release is the driver as Helm installs it, by Helm's own library.
type release struct {
	s               *suite
	name, namespace string
	// deployed are the values of what is installed as JSON, "" for nothing.
	deployed string
}

// driverSelector selects the pods of the driver.
const driverSelector = "app.kubernetes.io/name=csi-puzzlefs,app.kubernetes.io/component=node-driver"

// values returns the values that the suite installs with, with changes, which are merged over them in
// their order, keys of maps one by one.
func (s *suite) values(changes ...map[string]any) map[string]any {
	v := map[string]any{
		"image": map[string]any{
			"repository": s.settings.driver.repository, "tag": s.settings.driver.tag, "pullPolicy": "IfNotPresent",
		},
		"kubeletRootDir": s.settings.kubeletDir,
		"stateDir":       s.settings.stateDir,
		"events":         map[string]any{"slowPull": "5s"},
		"registries": map[string]any{"hosts": map[string]any{
			s.open.host(): s.open.hosts(), s.private.host(): s.private.hosts(),
		}},
		// The disk of a test machine may be nearly full of other things.
		"store": map[string]any{"reserve": "1Mi"},
		// A new driver is asked sooner whether it is ready; the rest is as users have it.
		"readinessProbe": map[string]any{"periodSeconds": 2},
	}
	for _, c := range changes {
		v = chartutil.MergeTables(clone(c), v)
	}
	return v
}

// clone copies values, which Helm and merging change.
func clone(v map[string]any) map[string]any {
	out := make(map[string]any, len(v))
	for key, value := range v {
		if m, ok := value.(map[string]any); ok {
			value = clone(m)
		}
		out[key] = value
	}
	return out
}

// driver makes sure that the driver is installed with the suite's values and these changes to them, and
// ready on every node. What is installed like that already is left alone; otherwise it is installed, or
// upgraded and every driver pod replaced, which ends the volumes of running pods: call it before there
// are any. Each part that uses the driver begins with it.
func (s *suite) driver(ctx context.Context, t testing.TB, changes ...map[string]any) {
	t.Helper()
	values := s.values(changes...)
	switch s.release.deployed {
	case asJSON(values):
		must(t, s.awaitDriver(ctx))
	case "":
		s.release.install(ctx, t, values)
	default:
		s.release.upgrade(ctx, t, values)
		s.replaceDriver(ctx, t)
	}
}

func asJSON(values map[string]any) string {
	b, err := json.Marshal(values) // in the order of keys
	if err != nil {
		panic(err) // values are made in this package
	}
	return string(b)
}

// config prepares Helm for an action.
func (r *release) config() (*action.Configuration, error) {
	flags := genericclioptions.NewConfigFlags(true)
	flags.KubeConfig, flags.Namespace = &r.s.kubeconfig, &r.namespace
	if r.s.settings.context != "" {
		flags.Context = &r.s.settings.context
	}
	c := new(action.Configuration)
	if err := c.Init(flags, r.namespace, "secret", func(string, ...any) {}); err != nil {
		return nil, fmt.Errorf("prepare helm: %w", err)
	}
	return c, nil
}

// chart loads the chart of this checkout.
func (r *release) chart() (*chart.Chart, error) {
	return loader.Load(filepath.Join("..", "..", "charts", "csi-puzzlefs"))
}

// install is helm install --create-namespace, and waits for the driver on every node.
func (r *release) install(ctx context.Context, t testing.TB, values map[string]any) {
	t.Helper()
	must(t, r.makeNamespace(ctx))
	c, err := r.config()
	must(t, err)
	ch, err := r.chart()
	must(t, err)
	install := action.NewInstall(c)
	install.ReleaseName, install.Namespace, install.Timeout = r.name, r.namespace, patience
	if _, err := install.RunWithContext(ctx, ch, clone(values)); err != nil {
		t.Fatalf("helm install: %v", err)
	}
	r.deployed = asJSON(values)
	must(t, r.s.awaitDriver(ctx))
}

// upgrade is helm upgrade --reset-values. Running drivers stay as they are, as OnDelete has it.
func (r *release) upgrade(ctx context.Context, t testing.TB, values map[string]any) {
	t.Helper()
	c, err := r.config()
	must(t, err)
	ch, err := r.chart()
	must(t, err)
	upgrade := action.NewUpgrade(c)
	upgrade.Namespace, upgrade.ResetValues, upgrade.Timeout = r.namespace, true, patience
	if _, err := upgrade.RunWithContext(ctx, r.name, ch, clone(values)); err != nil {
		t.Fatalf("helm upgrade: %v", err)
	}
	r.deployed = asJSON(values)
}

// test is helm test --logs, and returns the logs.
func (r *release) test(_ context.Context, t testing.TB) string {
	t.Helper()
	c, err := r.config()
	must(t, err)
	test := action.NewReleaseTesting(c)
	test.Namespace, test.Timeout = r.namespace, slowPatience
	rel, testErr := test.Run(r.name)
	var logs bytes.Buffer
	if rel != nil {
		if err := test.GetPodLogs(&logs, rel); err != nil {
			fmt.Fprintf(&logs, "(cannot read the logs: %v)", err)
		}
	}
	if testErr != nil {
		t.Fatalf("helm test: %v\n%s", testErr, logs.String())
	}
	return logs.String()
}

// uninstall is helm uninstall --wait. Pods with volumes must be gone before.
func (r *release) uninstall(_ context.Context, t testing.TB) {
	t.Helper()
	must(t, r.runUninstall())
}

func (r *release) runUninstall() error {
	c, err := r.config()
	if err != nil {
		return err
	}
	uninstall := action.NewUninstall(c)
	uninstall.Wait, uninstall.Timeout = true, patience
	uninstall.DeletionPropagation = "foreground" // the pods too, not only what owns them
	if _, err := uninstall.Run(r.name); err != nil {
		return fmt.Errorf("helm uninstall: %w", err)
	}
	r.deployed = ""
	return nil
}

// remove uninstalls what there is, with the namespace, which must not have been there before the suite.
func (r *release) remove(ctx context.Context) error {
	if err := r.runUninstall(); err != nil && !errors.Is(err, driver.ErrReleaseNotFound) {
		return err
	}
	ns, err := r.s.client.CoreV1().Namespaces().Get(ctx, r.namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("get namespace %s: %w", r.namespace, err)
	}
	if ns.Labels[suiteLabel] == "" {
		return nil
	}
	return r.s.removeNamespace(ctx, r.namespace)
}

// makeNamespace makes the namespace of the driver, which is privileged, as docs/quickstart.md has it.
func (r *release) makeNamespace(ctx context.Context) error {
	_, err := r.s.makeNamespace(ctx, r.namespace, "", privilegedPods)
	if apierrors.IsAlreadyExists(err) {
		return r.s.awaitServiceAccount(ctx, r.namespace)
	}
	return err
}

// replaceDriver deletes all pods of the driver and waits for new ones.
func (s *suite) replaceDriver(ctx context.Context, t testing.TB) {
	t.Helper()
	for _, p := range s.pods(ctx, t, s.release.namespace, driverSelector) {
		s.pod(p.Namespace, p.Name).delete(ctx, t)
	}
	must(t, s.awaitDriver(ctx))
}

// driverPod returns the driver's pod on a node.
func (s *suite) driverPod(ctx context.Context, t testing.TB, node string) *corev1.Pod {
	t.Helper()
	for _, p := range s.pods(ctx, t, s.release.namespace, driverSelector) {
		if p.Spec.NodeName == node && p.DeletionTimestamp == nil {
			return &p
		}
	}
	t.Fatalf("find the driver on node %s: there is no such pod", node)
	return nil
}

// awaitDriver waits until the driver is ready and registered with kubelet on every node that it is for.
func (s *suite) awaitDriver(ctx context.Context) error {
	namespace := s.release.namespace
	return await(ctx, slowPatience, "the driver on every node", func(ctx context.Context) (bool, string, error) {
		sets, err := s.client.AppsV1().DaemonSets(namespace).List(ctx, metav1.ListOptions{LabelSelector: driverSelector})
		if err != nil {
			return false, "", err
		}
		if len(sets.Items) != 1 {
			return false, fmt.Sprintf("%d DaemonSets", len(sets.Items)), nil
		}
		status := sets.Items[0].Status
		saw := fmt.Sprintf("%d of %d pods ready", status.NumberReady, status.DesiredNumberScheduled)
		if status.ObservedGeneration < sets.Items[0].Generation || status.DesiredNumberScheduled == 0 ||
			status.NumberReady < status.DesiredNumberScheduled {
			return false, saw, nil
		}
		pods, err := s.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: driverSelector})
		if err != nil {
			return false, "", err
		}
		count := int32(0)
		for i := range pods.Items {
			p := &pods.Items[i]
			if !podReady(p) {
				return false, saw + "; " + p.Name + " " + podState(p), nil
			}
			registered, err := s.registered(ctx, p.Spec.NodeName)
			if err != nil {
				return false, "", err
			}
			if !registered {
				return false, saw + "; not in CSINode " + p.Spec.NodeName, nil
			}
			count++
		}
		return count == status.DesiredNumberScheduled, saw, nil
	})
}

// registered says whether kubelet on a node knows the driver.
func (s *suite) registered(ctx context.Context, node string) (bool, error) {
	n, err := s.client.StorageV1().CSINodes().Get(ctx, node, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, d := range n.Spec.Drivers {
		if d.Name == driverName {
			return true, nil
		}
	}
	return false, nil
}
