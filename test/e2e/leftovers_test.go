package e2e_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
)

// objects returns all objects of the cluster that an installation of the driver has made, whatever their
// kind, as KIND NAMESPACE/NAME: those in its namespace, and those with its name or labels. Events are left
// out, which the API server forgets by itself, and what every namespace has.
func (r *release) objects(ctx context.Context) ([]string, error) {
	quiet := rest.CopyConfig(r.s.config)
	quiet.WarningHandler = rest.NoWarnings{} // some kinds are deprecated
	dyn, err := dynamic.NewForConfig(quiet)
	if err != nil {
		return nil, err
	}
	lists, err := r.s.client.Discovery().ServerPreferredResources()
	if err != nil {
		return nil, fmt.Errorf("list the API's resources: %w", err)
	}
	lists = discovery.FilteredBy(discovery.SupportsAllVerbs{Verbs: []string{"list", "delete"}}, lists)
	kinds := 0
	var found []string
	for _, list := range lists {
		version, err := schema.ParseGroupVersion(list.GroupVersion)
		if err != nil {
			return nil, err
		}
		for _, resource := range list.APIResources {
			if resource.Kind == "Event" {
				continue
			}
			kinds++
			all, err := dyn.Resource(version.WithResource(resource.Name)).List(ctx, metav1.ListOptions{})
			if err != nil {
				return nil, fmt.Errorf("list %s: %w", resource.Name, err)
			}
			for i := range all.Items {
				if o := &all.Items[i]; r.made(o) {
					found = append(found, strings.TrimSpace(fmt.Sprintf("%s %s/%s", o.GetKind(), o.GetNamespace(), o.GetName())))
				}
			}
		}
	}
	if kinds < 30 {
		return nil, fmt.Errorf("look for what an installation made: the API server has only %d kinds of objects that can be listed", kinds)
	}
	slices.Sort(found)
	return found, nil
}

// made says whether an object belongs to the installation.
func (r *release) made(o *unstructured.Unstructured) bool {
	switch o.GetKind() + " " + o.GetName() {
	case "ServiceAccount default", "ConfigMap kube-root-ca.crt":
		return false
	}
	labels := o.GetLabels()
	return o.GetNamespace() == r.namespace || o.GetName() == r.namespace || o.GetName() == driverName ||
		strings.Contains(o.GetName(), r.name) ||
		strings.HasPrefix(labels["app.kubernetes.io/name"], "csi-puzzlefs") || labels["app.kubernetes.io/instance"] == r.name
}

// waitNoObjects waits until the cluster has no object of the installation but these, which controllers
// and the collection of garbage take a moment for.
func (r *release) waitNoObjects(ctx context.Context, t testing.TB, but ...string) {
	t.Helper()
	mustAwait(ctx, t, patience, "nothing to be left in the cluster but "+strings.Join(but, ", "), func(ctx context.Context) (bool, string, error) {
		found, err := r.objects(ctx)
		if err != nil {
			return false, "", err
		}
		for _, node := range r.s.mustNodes(ctx, t) {
			if there, err := r.s.registered(ctx, node); err != nil {
				return false, "", err
			} else if there {
				found = append(found, "CSINode "+node+" with the driver")
			}
		}
		return slices.Equal(found, but), strings.Join(found, ", "), nil
	})
}

// mustNodes is nodes for tests.
func (s *suite) mustNodes(ctx context.Context, t testing.TB) []string {
	t.Helper()
	nodes, err := s.nodes(ctx)
	must(t, err)
	return nodes
}

// waitUninstalled waits until nothing of the driver is left on the node but its state directory: no volume,
// no mount, no socket, no process.
func (a *agent) waitUninstalled(ctx context.Context, t testing.TB) {
	t.Helper()
	a.waitClean(ctx, t)
	mustAwait(ctx, t, patience, "node "+a.node+" to have nothing of the driver left but its state directory", func(ctx context.Context) (bool, string, error) {
		found := a.pluginFiles(ctx, t)
		for _, m := range a.mounts(ctx, t) {
			if m.Type == fuseType || within(m.Point, a.s.settings.stateDir) || strings.Contains(m.Point, driverName) {
				found = append(found, "mount "+m.Point)
			}
		}
		// Nodes of one machine may share their processes, but not the name of the driver's node.
		found = append(found, lines(a.shell(ctx, t, fmt.Sprintf(
			`for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline 2>/dev/null | grep -e '^/csi-puzzlefs driver.*--node-id=%s ' || true; done`, a.node)))...)
		return len(found) == 0, strings.Join(found, ", "), nil
	})
}

// pluginFiles returns the files of the driver that lie below kubelet's directory for plugins: its socket, and
// that by which kubelet finds it.
func (a *agent) pluginFiles(ctx context.Context, t testing.TB) []string {
	t.Helper()
	return lines(a.shell(ctx, t, fmt.Sprintf(`cd %s && find plugins plugins_registry -xdev -path '*csi.puzzlefs.io*' | sort`,
		hostRoot+a.s.settings.kubeletDir)))
}

// within says whether a path is that of a directory or lies below it.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}
