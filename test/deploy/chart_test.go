package deploy_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chartutil"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/deploy/internal/chart"
)

func TestLint(t *testing.T) {
	for name, v := range map[string]map[string]any{"defaults": {}, "everything": everything(t)} {
		t.Run(name, func(t *testing.T) {
			lint := action.NewLint()
			lint.Strict = true
			lint.Namespace = namespace
			result := lint.Run([]string{chartDir}, v)
			for _, err := range result.Errors {
				t.Error(err)
			}
			for _, m := range result.Messages {
				// An icon is for catalogues.
				if !strings.Contains(m.Err.Error(), "icon is recommended") {
					t.Error(m)
				}
			}
		})
	}
}

func TestKubeVersions(t *testing.T) {
	c, err := chart.Load(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	for version, want := range map[string]bool{"v1.29.9": false, "v1.30.0": true, "v1.31.2-gke.100": true, kubeVersion: true, "v1.37.0": true} {
		if got := chartutil.IsCompatibleRange(c.Metadata.KubeVersion, version); got != want {
			t.Errorf("the chart takes Kubernetes %s: %v, want %v", version, got, want)
		}
	}
}

// TestObjects says what is installed, and for what values.
func TestObjects(t *testing.T) {
	standard := []string{
		"CSIDriver/csi.puzzlefs.io", "ClusterRole/csi-puzzlefs", "ClusterRoleBinding/csi-puzzlefs",
		"DaemonSet/csi-puzzlefs", "ServiceAccount/csi-puzzlefs",
	}
	tests := []struct {
		name, values string
		also, not    []string
	}{
		{"defaults", ``, nil, nil},
		{"no events, no permissions", `events: {enabled: false}`, nil, []string{"ClusterRole/csi-puzzlefs", "ClusterRoleBinding/csi-puzzlefs"}},
		{"no RBAC", `rbac: {create: false}`, nil, []string{"ClusterRole/csi-puzzlefs", "ClusterRoleBinding/csi-puzzlefs"}},
		{"no service account", `serviceAccount: {create: false, name: theirs}`, nil, []string{"ServiceAccount/csi-puzzlefs"}},
		{"registries", `registries: {hosts: {r.example.com: {hostsToml: x}}}`, []string{"ConfigMap/csi-puzzlefs-certs"}, nil},
		{"a registry with a secret only", `registries: {hosts: {r.example.com: {secret: {name: s, keys: [client.key]}}}}`, nil, nil},
		{"the node's certs.d", `registries: {hostPath: /etc/containerd/certs.d}`, nil, nil},
		{"keys", `policy: {signatureKeys: {k.pem: "-----BEGIN PUBLIC KEY-----"}}`, []string{"ConfigMap/csi-puzzlefs-keys"}, nil},
		{"quota", `resourceQuota: {enabled: true}`, []string{"ResourceQuota/csi-puzzlefs"}, nil},
		{"monitor", `podMonitor: {enabled: true}`, []string{"PodMonitor/csi-puzzlefs"}, nil},
		{"rules", `prometheusRule: {enabled: true}`, []string{"PrometheusRule/csi-puzzlefs"}, nil},
		{"dashboard", `dashboard: {enabled: true}`, []string{"ConfigMap/csi-puzzlefs-dashboard"}, nil},
		{"network policy", `networkPolicy: {enabled: true}`, []string{"NetworkPolicy/csi-puzzlefs"}, nil},
		{"admission", `admissionPolicy: {enabled: true}`, []string{
			"ValidatingAdmissionPolicy/csi-puzzlefs-pods", "ValidatingAdmissionPolicyBinding/csi-puzzlefs-pods",
			"ValidatingAdmissionPolicy/csi-puzzlefs-volumes", "ValidatingAdmissionPolicyBinding/csi-puzzlefs-volumes",
		}, nil},
		{"admission of pods", `admissionPolicy: {enabled: true, persistentVolumes: false}`, []string{
			"ValidatingAdmissionPolicy/csi-puzzlefs-pods", "ValidatingAdmissionPolicyBinding/csi-puzzlefs-pods",
		}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var want []string
			for _, n := range append(slices.Clone(standard), tt.also...) {
				if !slices.Contains(tt.not, n) {
					want = append(want, n)
				}
			}
			slices.Sort(want)
			files := mustRender(t, values(t, tt.values))
			files = slices.DeleteFunc(files, chart.File.IsTest)
			if diff := cmp.Diff(want, names(objects(t, files))); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
		})
	}
}

// TestNames: every object carries its release's name, or the one that was asked for, so that it
// can be found, and a name that is too long is cut where Kubernetes takes it.
func TestNames(t *testing.T) {
	c, err := chart.Load(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("n", 53) // the longest that Helm takes
	tests := []struct{ name, release, values, want string }{
		{"release named as the chart", "csi-puzzlefs", ``, "csi-puzzlefs"},
		{"release named otherwise", "prod", ``, "prod-csi-puzzlefs"},
		{"name overridden", "prod", `nameOverride: images`, "prod-images"},
		{"full name overridden", "prod", `fullnameOverride: puzzle`, "puzzle"},
		{"long release", long, ``, long[:50]},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := everything(t)
			for key, value := range values(t, tt.values) {
				v[key] = value
			}
			files, err := chart.Render(c, chart.Options{Release: tt.release, Namespace: "elsewhere", KubeVersion: kubeVersion, Values: v})
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range objects(t, files) {
				name := o.GetName()
				if o.GetKind() != "CSIDriver" && name != tt.want && !strings.HasPrefix(name, tt.want+"-") || len(name) > 63 {
					t.Errorf("%s %s, want %s", o.GetKind(), name, tt.want)
				}
				if o.GetLabels()["app.kubernetes.io/instance"] != tt.release {
					t.Errorf("%s %s has the labels %v", o.GetKind(), name, o.GetLabels())
				}
				if ns := o.GetNamespace(); ns != "" && ns != "elsewhere" {
					t.Errorf("%s %s is in the namespace %s", o.GetKind(), name, ns)
				}
			}
		})
	}
}

// TestSelector: what selects the driver's pods selects them, and not those of "helm test".
func TestSelector(t *testing.T) {
	list := objects(t, mustRender(t, everything(t)))
	selects := func(selector, labels any) bool {
		for key, value := range mapAt(selector) {
			if at(labels, key) != value {
				return false
			}
		}
		return true
	}
	daemonSet := find(t, list, "DaemonSet", "")
	labels := at(daemonSet.Object, "spec", "template", "metadata", "labels")
	selectors := map[string]any{
		"DaemonSet":     at(daemonSet.Object, "spec", "selector", "matchLabels"),
		"PodMonitor":    at(find(t, list, "PodMonitor", "").Object, "spec", "selector", "matchLabels"),
		"NetworkPolicy": at(find(t, list, "NetworkPolicy", "").Object, "spec", "podSelector", "matchLabels"),
		"Service":       at(find(t, list, "Service", "-test-ready").Object, "spec", "selector"),
	}
	for kind, selector := range selectors {
		if !selects(selector, labels) {
			t.Errorf("the %s selects %v, the driver's pods have %v", kind, selector, labels)
		}
		for _, name := range []string{"-test-ready", "-test-volume"} {
			if pod := find(t, list, "Pod", name); selects(selector, at(pod.Object, "metadata", "labels")) {
				t.Errorf("the %s selects the pod %s", kind, pod.GetName())
			}
		}
	}
}

// TestHooksHaveLogs: "helm test --logs" asks for the logs of a pod by the name of every test, and
// fails on the first that is no pod.
func TestHooksHaveLogs(t *testing.T) {
	tests := 0
	pods := make(map[string]bool)
	list := objects(t, mustRender(t, everything(t)))
	for _, o := range list {
		pods[o.GetName()] = pods[o.GetName()] || o.GetKind() == "Pod"
	}
	for _, o := range list {
		if o.GetAnnotations()["helm.sh/hook"] != "test" {
			continue
		}
		tests++
		if !pods[o.GetName()] {
			t.Errorf("there is no pod with the name of the %s %s", o.GetKind(), o.GetName())
		}
	}
	if tests == 0 {
		t.Error("there are no tests")
	}
}

// TestLeastPrivilege: the driver may write Events and nothing else, and gets no token where it
// does not.
func TestLeastPrivilege(t *testing.T) {
	for _, v := range []string{``, `events: {enabled: false}`} {
		list := objects(t, mustRender(t, values(t, v)))
		events := v == ``
		for _, o := range list {
			switch o.GetKind() {
			case "Role", "RoleBinding":
				t.Errorf("there is a %s", o.GetKind())
			case "ClusterRole":
				want := []any{map[string]any{"apiGroups": []any{""}, "resources": []any{"events"}, "verbs": []any{"create", "patch"}}}
				if diff := cmp.Diff(want, o.Object["rules"]); diff != "" {
					t.Errorf("rules (-want +got):\n%s", diff)
				}
			case "ServiceAccount":
				if o.Object["automountServiceAccountToken"] != false {
					t.Error("every pod of the service account gets a token")
				}
			}
		}
		if got := podSpec(find(t, list, "DaemonSet", ""))["automountServiceAccountToken"]; got != events {
			t.Errorf("with %q the driver gets a token: %v", v, got)
		}
	}
}
