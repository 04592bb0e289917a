package deploy_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// driverOf renders the chart and returns the DaemonSet's pod spec and the driver's container.
func driverOf(t *testing.T, text string) (spec, driver map[string]any) {
	t.Helper()
	spec = podSpec(find(t, objects(t, mustRender(t, values(t, text))), "DaemonSet", ""))
	if driver = container(spec, "driver"); driver == nil {
		t.Fatalf("no container named driver in %v", spec)
	}
	return spec, driver
}

// TestArguments says which value becomes which argument of the driver.
func TestArguments(t *testing.T) {
	tests := []struct {
		name, values string
		want         []string
		not          []string // what no argument begins with
	}{
		{
			"defaults", ``,
			[]string{
				"--endpoint=unix:///var/lib/kubelet/plugins/csi.puzzlefs.io/csi.sock", "--node-id=$(NODE_NAME)",
				"--state-dir=/var/lib/csi-puzzlefs", "--kubelet-root-dir=/var/lib/kubelet", "--http-endpoint=:9809",
				"--log-level=info", "--log-format=json", "--pod-events=true", "--slow-pull=30s",
				"--require-digest=true", "--metadata-memory=256Mi", "--content-cache=64Mi", "--mount-options=nodev,nosuid", "--store-reserve=20%",
			},
			[]string{"--register", "--pprof", "--allowed-registries", "--signature-key", "--max-", "--store-quota", "--certs-dir", "--docker-config"},
		},
		{
			"kubelet elsewhere", `kubeletRootDir: /data/kubelet`,
			[]string{"--endpoint=unix:///data/kubelet/plugins/csi.puzzlefs.io/csi.sock", "--kubelet-root-dir=/data/kubelet"},
			nil,
		},
		{"state elsewhere", `stateDir: /data/puzzlefs`, []string{"--state-dir=/data/puzzlefs"}, nil},
		{"port", `http: {port: 9000, pprof: true}`, []string{"--http-endpoint=:9000", "--pprof"}, nil},
		{"log", `log: {level: warn, format: text}`, []string{"--log-level=warn", "--log-format=text"}, nil},
		{"events", `events: {enabled: false, slowPull: 2m}`, []string{"--pod-events=false", "--slow-pull=2m"}, nil},
		{"tags", `policy: {requireDigest: false}`, []string{"--require-digest=false"}, nil},
		{
			"registries", `policy: {allowedRegistries: [a.example.com, "b.example.com:5000/x"]}`,
			[]string{"--allowed-registries=a.example.com", "--allowed-registries=b.example.com:5000/x"},
			nil,
		},
		{
			"keys", `policy: {signatureKeys: {a.pem: "-----BEGIN PUBLIC KEY-----", b.pem: "-----BEGIN PUBLIC KEY-----"}}`,
			[]string{"--signature-key=/etc/csi-puzzlefs/keys/a.pem", "--signature-key=/etc/csi-puzzlefs/keys/b.pem"},
			nil,
		},
		{"limits", `policy: {maxImageSize: 20Gi, maxInodes: 10000000}`, []string{"--max-image-size=20Gi", "--max-inodes=10000000"}, nil},
		{"limit in bytes", `policy: {maxImageSize: 21474836480}`, []string{"--max-image-size=21474836480"}, nil},
		{"memory", `memory: {metadata: 1Gi, contentCache: 100000000}`, []string{"--metadata-memory=1Gi", "--content-cache=100000000"}, nil},
		{"mount options", `policy: {mountOptions: [nodev, suid, noexec]}`, []string{"--mount-options=nodev,suid,noexec"}, nil},
		{"store", `store: {quota: 1.5Ti, reserve: 5Gi}`, []string{"--store-quota=1.5Ti", "--store-reserve=5Gi"}, nil},
		{"store in bytes", `store: {quota: 200000000000, reserve: 0}`, []string{"--store-quota=200000000000", "--store-reserve=0"}, nil},
		{"certificates", `registries: {hostPath: /etc/containerd/certs.d}`, []string{"--certs-dir=/etc/csi-puzzlefs/certs.d"}, nil},
		{"credentials", `registries: {dockerConfigSecret: s}`, []string{"--docker-config=/etc/csi-puzzlefs/docker/config.json"}, nil},
		{"registrar", `registrar: {enabled: true}`, []string{"--register=false", "--kubelet-root-dir=/var/lib/kubelet"}, nil},
		{"more", `extraArgs: [--log-level=debug]`, []string{"--log-level=debug"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, driver := driverOf(t, tt.values)
			args := stringsAt(driver, "args")
			if args[0] != "driver" {
				t.Errorf("the command is %q", args[0])
			}
			for _, want := range tt.want {
				if !slices.Contains(args, want) {
					t.Errorf("no argument %s in %q", want, args)
				}
			}
			for _, not := range tt.not {
				if slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, not) }) {
					t.Errorf("an argument %s in %q", not, args)
				}
			}
		})
	}
}

func TestImage(t *testing.T) {
	digest := "sha256:" + strings.Repeat("1", 64)
	for text, want := range map[string]string{
		``:                                "registry.example.com/csi-puzzlefs:0.1.0",
		`image: {tag: v2}`:                "registry.example.com/csi-puzzlefs:v2",
		`image: {repository: r.io/a}`:     "r.io/a:0.1.0",
		`image: {digest: ` + digest + `}`: "registry.example.com/csi-puzzlefs@" + digest,
		`image: {tag: v2, digest: ` + digest + `}`: "registry.example.com/csi-puzzlefs@" + digest,
	} {
		if _, driver := driverOf(t, text); driver["image"] != want {
			t.Errorf("%s: image %v, want %s", text, driver["image"], want)
		}
	}
}

func TestMemoryLimit(t *testing.T) {
	for limit, want := range map[string]any{
		`1Gi`: "966367641", `1500Mi`: "1415577600", `2G`: "1800000000", `100000000`: "90000000", `900k`: "810000", `1Ti`: "989560464998",
		`null`: nil, `"1.5Gi"`: nil, `"1e9"`: nil,
	} {
		_, driver := driverOf(t, `resources: {limits: {memory: `+limit+`}}`)
		var got any
		for i := range listAt(driver, "env") {
			if at(driver, "env", i, "name") == "GOMEMLIMIT" {
				got = at(driver, "env", i, "value")
			}
		}
		if got != want {
			t.Errorf("with a limit of %s GOMEMLIMIT is %v, want %v", limit, got, want)
		}
	}
}

// TestPod: what makes the driver's pod one that works on every node and never takes others down.
func TestPod(t *testing.T) {
	spec, driver := driverOf(t, ``)
	if n := len(listAt(spec, "containers")); n != 1 {
		t.Errorf("%d containers, want 1", n)
	}
	for _, want := range []struct {
		path  []any
		value any
	}{
		{[]any{"priorityClassName"}, "system-node-critical"},
		{[]any{"tolerations", 0, "operator"}, "Exists"},
		{[]any{"nodeSelector", "kubernetes.io/os"}, "linux"},
		{[]any{"hostNetwork"}, false},
		{[]any{"containers", 0, "securityContext", "privileged"}, true},
		{[]any{"containers", 0, "volumeMounts", 0, "mountPath"}, "/var/lib/kubelet"},
		{[]any{"containers", 0, "volumeMounts", 0, "mountPropagation"}, "Bidirectional"},
		{[]any{"containers", 0, "startupProbe", "httpGet", "path"}, "/readyz"},
		{[]any{"containers", 0, "livenessProbe", "httpGet", "path"}, "/healthz"},
		{[]any{"containers", 0, "readinessProbe", "httpGet", "path"}, "/readyz"},
		{[]any{"containers", 0, "resources", "limits", "memory"}, "1Gi"},
	} {
		if got := at(spec, want.path...); got != want.value {
			t.Errorf("%v is %v, want %v", want.path, got, want.value)
		}
	}
	if at(driver, "resources", "limits", "cpu") != nil {
		t.Error("a CPU limit throttles the volumes of all pods")
	}
	for _, text := range []string{`hostNetwork: true`, `{hostNetwork: true, dnsPolicy: Default}`} {
		spec, _ := driverOf(t, text)
		want := "ClusterFirstWithHostNet"
		if strings.Contains(text, "dnsPolicy") {
			want = "Default"
		}
		if spec["dnsPolicy"] != want || spec["hostNetwork"] != true {
			t.Errorf("%s: dnsPolicy %v, want %s", text, spec["dnsPolicy"], want)
		}
	}
}

func TestUpdateStrategy(t *testing.T) {
	for text, want := range map[string]map[string]any{
		``: {"type": "OnDelete"},
		`daemonSet: {updateStrategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 2}}}`: {
			"type": "RollingUpdate", "rollingUpdate": map[string]any{"maxUnavailable": int64(2)},
		},
	} {
		daemonSet := find(t, objects(t, mustRender(t, values(t, text))), "DaemonSet", "")
		if diff := cmp.Diff(any(want), at(daemonSet.Object, "spec", "updateStrategy")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", text, diff)
		}
	}
}

var rolloutOfDaemonSet = regexp.MustCompile(`rollout status (ds|daemonset)`)

// TestNoRolloutToWaitFor: kubectl rollout status refuses a DaemonSet that is updated OnDelete, so
// no page may tell people to wait with it.
func TestNoRolloutToWaitFor(t *testing.T) {
	pages, err := filepath.Glob(rootDir + "/docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("%d pages in docs, %v", len(pages), err)
	}
	pages = append(pages, rootDir+"/README.md", baseDir+"/README.md", chartDir+"/templates/NOTES.txt")
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		if rolloutOfDaemonSet.Match(text) {
			t.Errorf("%s waits with kubectl rollout status for a DaemonSet that has none", filepath.Base(page))
		}
	}
}

// TestSidecars: with the registrar the driver does not register itself, with livenessprobe kubelet
// asks the sidecar.
func TestSidecars(t *testing.T) {
	spec, driver := driverOf(t, `{registrar: {enabled: true}, livenessprobeSidecar: {enabled: true}, kubeletRootDir: /data/kubelet}`)
	registrar, probe := container(spec, "node-driver-registrar"), container(spec, "liveness-probe")
	if registrar == nil || probe == nil {
		t.Fatalf("sidecars are missing: %v", spec["containers"])
	}
	if args := stringsAt(registrar, "args"); !slices.Contains(args, "--kubelet-registration-path=/data/kubelet/plugins/csi.puzzlefs.io/csi.sock") {
		t.Errorf("arguments of the registrar: %q", args)
	}
	if port := at(driver, "livenessProbe", "httpGet", "port"); port != at(probe, "ports", 0, "name") {
		t.Errorf("kubelet asks the port %v, the sidecar has %v", port, probe["ports"])
	}
	paths := map[any]any{}
	for i := range listAt(spec, "volumes") {
		paths[at(spec, "volumes", i, "name")] = at(spec, "volumes", i, "hostPath", "path")
	}
	if paths["plugin"] != "/data/kubelet/plugins/csi.puzzlefs.io" || paths["registration"] != "/data/kubelet/plugins_registry" {
		t.Errorf("the sidecars' directories are %v", paths)
	}
}

// certificates returns the files of the volume certs by their paths in it. Those of secrets, which
// are not the chart's, have no content.
func certificates(t *testing.T, list []*unstructured.Unstructured) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, volume := range listAt(podSpec(find(t, list, "DaemonSet", "")), "volumes") {
		for _, source := range listAt(volume, "projected", "sources") {
			for kind, content := range mapAt(source) {
				for _, item := range listAt(content, "items") {
					path := textAt(item, "path")
					files[path] = ""
					if kind == "configMap" {
						data := find(t, list, "ConfigMap", textAt(content, "name")).Object
						files[path] = textAt(data, "data", textAt(item, "key"))
					}
				}
			}
		}
	}
	return files
}

// TestCertificates: what the ConfigMap holds is mounted where the driver looks for it.
func TestCertificates(t *testing.T) {
	want := map[string]string{
		"registry.example.com:5000/hosts.toml":  "server = \"https://registry.example.com:5000\"\n[host.\"http://mirror.example.com:8080\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
		"registry.example.com:5000/extra.toml":  "# nothing\n",
		"registry.example.com:5000/client.cert": "",
		"registry.example.com:5000/client.key":  "",
		"_default/hosts.toml":                   "[host.\"http://mirror.example.com:8080\"]\n  capabilities = [\"pull\"]\n",
	}
	if diff := cmp.Diff(want, certificates(t, objects(t, mustRender(t, everything(t))))); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

// TestSignatureKeysRestart: other keys are another pod template, as the driver reads them once.
func TestSignatureKeysRestart(t *testing.T) {
	sum := func(text string) any {
		daemonSet := find(t, objects(t, mustRender(t, values(t, text))), "DaemonSet", "")
		return at(daemonSet.Object, "spec", "template", "metadata", "annotations", "checksum/signature-keys")
	}
	none, a, b := sum(``), sum(`policy: {signatureKeys: {k: "-----BEGIN PUBLIC KEY-----a"}}`), sum(`policy: {signatureKeys: {k: "-----BEGIN PUBLIC KEY-----b"}}`)
	if none != nil || a == nil || a == b {
		t.Errorf("annotations %v, %v and %v; want none and two that differ", none, a, b)
	}
}

// TestNewerKubernetes: a field that older API servers do not know is left out there.
func TestNewerKubernetes(t *testing.T) {
	on := values(t, `csiDriver: {preventPodSchedulingIfMissing: true}`)
	for version, want := range map[string]any{"v1.30.0": nil, "v1.36.3": nil, "v1.37.0": true, "v1.38.1-eks-1": true} {
		files, err := renderFor(version, on)
		if err != nil {
			t.Fatal(err)
		}
		if got := at(find(t, objects(t, files), "CSIDriver", "").Object, "spec", "preventPodSchedulingIfMissing"); got != want {
			t.Errorf("for Kubernetes %s it is %v, want %v", version, got, want)
		}
	}
}

// TestNotes: what a person has to know after an installation is said to them.
func TestNotes(t *testing.T) {
	tests := []struct {
		name, values string
		says, not    []string
	}{
		{"defaults", ``, []string{"make image", "OnDelete", "kubectl drain", "EDIT", "pod-security.kubernetes.io/enforce=privileged --overwrite", "kind load image-archive", "helm test csi-puzzlefs"}, []string{"http.pprof"}},
		{"image", `image: {repository: r.io/a}`, nil, []string{"make image"}},
		{"rolling", `daemonSet: {updateStrategy: {type: RollingUpdate}}`, []string{"ENOTCONN"}, []string{"kubectl drain"}},
		{"pprof", `http: {pprof: true}`, []string{"http.pprof is on"}, nil},
		{"tags", `policy: {requireDigest: false}`, []string{"policy.requireDigest is off"}, nil},
		{"too old", `csiDriver: {preventPodSchedulingIfMissing: true}`, []string{"was left out"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, f := range mustRender(t, values(t, tt.values)) {
				if f.IsManifest() {
					continue
				}
				for _, want := range tt.says {
					if !strings.Contains(f.Text, want) {
						t.Errorf("NOTES.txt does not say %q:\n%s", want, f.Text)
					}
				}
				for _, not := range tt.not {
					if strings.Contains(f.Text, not) {
						t.Errorf("NOTES.txt says %q:\n%s", not, f.Text)
					}
				}
				return
			}
			t.Error("no NOTES.txt")
		})
	}
}
