package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"
)

// testInstall tests what an administrator does: install, change, remove, install again.
func (s *suite) testInstall(t *testing.T) {
	i := &installation{s: s, namespace: s.namespace(t.Context(), t, "install", restrictedPods)}
	s.Test(t, i.byHelm(), i.byKubectl(), i.again())
}

// installation is what the features of the part share.
type installation struct {
	s         *suite
	namespace string // of readers
	nodes     []string
	kept      image // which all nodes have pulled
	fresh     image // which the first has
}

// mirrored is a registry that is not there, but for what the driver is told about it.
const mirrored = "models.example.com"

func (i *installation) byHelm() features.Feature {
	return features.New("helm").
		Setup(i.prepare).
		Assess("installs the driver on every node", i.install).
		Assess("passes the chart's own test", i.helmTest).
		Assess("upgrades drivers only as they are replaced", i.upgrade).
		Assess("refuses what a new policy does not allow", i.refuse).
		Assess("tells running drivers a changed text of hosts", i.hosts).
		Assess("leaves nothing but images", i.uninstall).
		Feature()
}

func (i *installation) byKubectl() features.Feature {
	return features.New("kubectl apply -k").
		Assess("installs the driver on every node", i.apply).
		Assess("leaves nothing but images", i.unapply).
		Feature()
}

func (i *installation) again() features.Feature {
	return features.New("another installation").
		Assess("finds the images of those before it", i.reinstall).
		Feature()
}

func (i *installation) prepare(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	must(t, i.s.release.remove(ctx))
	i.s.release.waitNoObjects(ctx, t)
	i.nodes = i.s.mustNodes(ctx, t)
	i.kept = i.s.open.pushTree(ctx, t, textTree(t, "kept"), "install/kept:v1")
	i.fresh = i.s.open.pushTree(ctx, t, textTree(t, "fresh"), "install/fresh:v1")
	return ctx
}

// on starts a reader of an image on a node.
func (i *installation) on(ctx context.Context, t *testing.T, node string, img image) *pod {
	t.Helper()
	p := i.s.reader(i.namespace, "", inline("data", img.attributes()))
	p.GenerateName = "reader-"
	p.Spec.NodeSelector = map[string]string{corev1.LabelHostname: node}
	return i.s.start(ctx, t, p)
}

// reads checks that pods, which on has started, read what is in the image of textTree, and deletes them.
func (i *installation) reads(ctx context.Context, t *testing.T, text string, pods ...*pod) {
	t.Helper()
	for _, p := range pods {
		p.waitReady(ctx, t)
		if got := p.exec(ctx, t, "cat", "/data/text"); got != text {
			t.Errorf("pod %s reads %q, want %q", p, got, text)
		}
	}
	for _, p := range pods {
		p.delete(ctx, t)
	}
}

// everywhere starts a reader of an image on every node.
func (i *installation) everywhere(ctx context.Context, t *testing.T, img image) []*pod {
	t.Helper()
	var pods []*pod
	for _, node := range i.nodes {
		pods = append(pods, i.on(ctx, t, node, img))
	}
	return pods
}

// values are the suite's, and what helm test needs to mount a volume.
func (i *installation) values(changes ...map[string]any) map[string]any {
	return i.s.values(append([]map[string]any{
		{"test": map[string]any{"volume": map[string]any{"image": i.kept.Ref, "digest": i.kept.Digest}}},
	}, changes...)...)
}

func (i *installation) install(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	i.s.release.install(ctx, t, i.values())
	i.installed(ctx, t)
	i.reads(ctx, t, "kept", i.everywhere(ctx, t, i.kept)...)
	return ctx
}

// installed checks what an installation is.
func (i *installation) installed(ctx context.Context, t *testing.T) {
	t.Helper()
	client := i.s.client.StorageV1()
	d, err := client.CSIDrivers().Get(ctx, driverName, metav1.GetOptions{})
	must(t, err)
	if *d.Spec.AttachRequired || !*d.Spec.PodInfoOnMount || *d.Spec.FSGroupPolicy != storagev1.NoneFSGroupPolicy ||
		!slices.Equal(d.Spec.VolumeLifecycleModes, []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecycleEphemeral, storagev1.VolumeLifecyclePersistent}) {
		t.Errorf("CSIDriver %s is not as docs/architecture.md has it: %+v", driverName, d.Spec)
	}
	if pods := i.s.pods(ctx, t, i.s.release.namespace, driverSelector); len(pods) != len(i.nodes) {
		t.Errorf("there are %d drivers for the nodes %v", len(pods), i.nodes)
	}
	for _, node := range i.nodes {
		i.s.driverPod(ctx, t, node)
		n, err := client.CSINodes().Get(ctx, node, metav1.GetOptions{})
		must(t, err)
		at := slices.IndexFunc(n.Spec.Drivers, func(d storagev1.CSINodeDriver) bool { return d.Name == driverName })
		if at < 0 || n.Spec.Drivers[at].NodeID != node || n.Spec.Drivers[at].Allocatable != nil {
			t.Errorf("CSINode %s has %+v, want %s with the node's name and no limit", node, n.Spec.Drivers, driverName)
		}
		want := []string{"plugins/csi.puzzlefs.io", "plugins/csi.puzzlefs.io/csi.sock", "plugins_registry/csi.puzzlefs.io-reg.sock"}
		if got := i.s.agent(node).pluginFiles(ctx, t); !slices.Equal(got, want) {
			t.Errorf("kubelet's directories on %s have %q of the driver, want %q", node, got, want)
		}
	}
}

func (i *installation) helmTest(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	logs := i.s.release.test(ctx, t)
	t.Logf("helm test --logs:\n%s", logs)
	for _, want := range []string{
		strings.TrimPrefix(i.kept.Verity, "verity:"), i.kept.Digest,
	} {
		if !regexp.MustCompile(`(?m) image manifest digest: ` + want + `$`).MatchString(logs) {
			t.Errorf("helm test read another image than was pushed: its log has no digest %s:\n%s", want, logs)
		}
	}
	return ctx
}

// upgrade upgrades the release, and replaces the driver on the first node only.
func (i *installation) upgrade(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	before := map[string]types.UID{}
	for _, node := range i.nodes {
		before[node] = i.s.driverPod(ctx, t, node).UID
	}
	i.s.release.upgrade(ctx, t, i.changed("https://"+i.s.private.host()))
	must(t, i.s.awaitDriver(ctx))
	newFlags := []string{
		"--log-level=debug", "--slow-pull=7s",
		"--allowed-registries=" + i.s.open.ref("install/allowed"), "--allowed-registries=" + mirrored,
	}
	has := func(node string) bool {
		args := i.s.driverPod(ctx, t, node).Spec.Containers[0].Args
		count := 0
		for _, flag := range newFlags {
			if slices.Contains(args, flag) {
				count++
			}
		}
		if count != 0 && count != len(newFlags) {
			t.Errorf("the driver on %s has some of the flags %q: %q", node, newFlags, args)
		}
		return count > 0
	}
	for _, node := range i.nodes {
		if i.s.driverPod(ctx, t, node).UID != before[node] || has(node) {
			t.Errorf("the upgrade touched the driver on %s, want it to run until its pod is deleted", node)
		}
	}
	first := i.nodes[0]
	i.s.pod(i.s.release.namespace, i.s.driverPod(ctx, t, first).Name).delete(ctx, t)
	must(t, i.s.awaitDriver(ctx))
	if !has(first) {
		t.Errorf("the new driver on %s has not the new flags", first)
	}
	for _, node := range i.nodes[1:] {
		if i.s.driverPod(ctx, t, node).UID != before[node] {
			t.Errorf("the driver on %s went with that on %s", node, first)
		}
	}
	return ctx
}

// changed are the values of the upgrade. server is where the mirrored registry is said to be.
func (i *installation) changed(server string) map[string]any {
	return i.values(map[string]any{
		"log":    map[string]any{"level": "debug"},
		"events": map[string]any{"slowPull": "7s"},
		"policy": map[string]any{"allowedRegistries": []any{i.s.open.ref("install/allowed"), mirrored}},
		"registries": map[string]any{"hosts": map[string]any{
			mirrored: map[string]any{"hostsToml": fmt.Sprintf("server = %q\n", server)},
		}},
	})
}

func (i *installation) refuse(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	refused := i.on(ctx, t, i.nodes[0], i.kept)
	var others []*pod
	for _, node := range i.nodes[1:] {
		others = append(others, i.on(ctx, t, node, i.kept)) // whose drivers are older than the policy
	}
	event := refused.waitEvent(ctx, t, "PolicyDenied", "^Check image "+regexp.QuoteMeta(i.s.open.ref("install/kept")))
	want := fmt.Sprintf("this node allows images from %s, %s only (the driver's --allowed-registries); use an image from there, or ask the administrator",
		i.s.open.ref("install/allowed"), mirrored)
	if !strings.Contains(event.Message, want) {
		t.Errorf("the event says %q, want it to say %q", event.Message, want)
	}
	if got := refused.get(ctx, t); podReady(got) {
		t.Errorf("the pod whose image is not allowed is %s", podState(got))
	}
	i.reads(ctx, t, "kept", others...)
	return ctx
}

func (i *installation) hosts(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	driver := i.s.driverPod(ctx, t, i.nodes[0])
	img := i.kept
	img.Ref = mirrored + "/install/kept:v1"
	p := i.on(ctx, t, i.nodes[0], img)
	p.waitEvent(ctx, t, "RegistryUnavailable", "put the CA's certificate into the certs directory as "+mirrored+"/ca.crt")

	i.s.release.upgrade(ctx, t, i.changed("http://"+i.s.open.host()))
	// Kubelet brings a ConfigMap to a pod within a minute or two, or when the pod changes.
	must(t, i.annotate(ctx, driver.Name))
	i.reads(ctx, t, "kept", p)
	if now := i.s.driverPod(ctx, t, i.nodes[0]); now.UID != driver.UID || restarts(now) != restarts(driver) {
		t.Errorf("the driver on %s was restarted, want it to read the new text while it runs", i.nodes[0])
	}
	return ctx
}

// annotate gives a pod of the driver another annotation, so that kubelet looks at it.
func (i *installation) annotate(ctx context.Context, name string) error {
	_, err := i.s.client.CoreV1().Pods(i.s.release.namespace).Patch(ctx, name, types.MergePatchType,
		[]byte(`{"metadata":{"annotations":{"e2e.csi-puzzlefs.io/looked-at":"yes"}}}`), metav1.PatchOptions{})
	return err
}

func (i *installation) uninstall(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	r := i.s.release
	r.uninstall(ctx, t)
	// docs/quickstart.md has the namespace removed too, and with it what helm test left.
	r.waitNoObjects(ctx, t, "Namespace /"+r.namespace,
		"Pod "+r.namespace+"/csi-puzzlefs-test-ready", "Pod "+r.namespace+"/csi-puzzlefs-test-volume")
	must(t, i.s.removeNamespace(ctx, r.namespace))
	i.nothingLeft(ctx, t, i.kept)
	return ctx
}

// nothingLeft waits until nothing is left of an installation but the state directories, with images in them.
func (i *installation) nothingLeft(ctx context.Context, t *testing.T, images ...image) {
	t.Helper()
	i.s.release.waitNoObjects(ctx, t)
	for n, node := range i.nodes {
		a := i.s.agent(node)
		a.waitUninstalled(ctx, t)
		files := a.stateFiles(ctx, t)
		for _, img := range images {
			blob := "sha256/" + strings.TrimPrefix(img.Digest, "sha256:")
			there := slices.ContainsFunc(files, func(f string) bool { return strings.HasSuffix(f, blob) })
			if want := img == i.kept || n == 0; there != want {
				t.Errorf("the state directory of %s has the manifest of %s: %v, want %v: %q", node, img.Ref, there, want, files)
			}
		}
	}
}

// overlay is what deploy/kubernetes/README.md has people write: the cluster's name of the image, more
// arguments, and here a description of the registry too.
const overlay = `apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - base
images:
  - name: registry.example.com/csi-puzzlefs
    newName: %[1]s
    newTag: %[2]q
configMapGenerator:
  - name: registry-hosts
    namespace: csi-puzzlefs
    files: [hosts.toml]
patches:
  - target: {kind: Namespace, name: csi-puzzlefs}
    patch: |-
      - {op: add, path: /metadata/labels/%[4]s, value: "true"}
  - target: {kind: DaemonSet, name: csi-puzzlefs}
    patch: |-
      - {op: add, path: /spec/template/spec/containers/0/args/-, value: --store-reserve=1Mi}
      - {op: add, path: /spec/template/spec/containers/0/args/-, value: --certs-dir=/etc/csi-puzzlefs/certs.d}
      - {op: add, path: /spec/template/spec/containers/0/volumeMounts/-, value: {name: hosts, mountPath: /etc/csi-puzzlefs/certs.d}}
      - op: add
        path: /spec/template/spec/volumes/-
        value: {name: hosts, configMap: {name: registry-hosts, items: [{key: hosts.toml, path: "%[3]s/hosts.toml"}]}}
`

func (i *installation) apply(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	i.applyOverlay(ctx, t)
	must(t, i.s.awaitDriver(ctx))
	i.installed(ctx, t)
	i.reads(ctx, t, "fresh", i.on(ctx, t, i.nodes[0], i.fresh))
	return ctx
}

// overlayDir is where the overlay lies, for as long as the suite runs.
func (i *installation) overlayDir() string { return filepath.Join(i.s.dir, "overlay") }

func (i *installation) applyOverlay(ctx context.Context, t *testing.T) {
	t.Helper()
	if i.s.settings.kubeletDir != "/var/lib/kubelet" || i.s.settings.stateDir != "/var/lib/csi-puzzlefs" {
		i.s.skip(t, "kubectl apply -k of deploy/kubernetes, which is for kubelet's usual directory, not for %s", i.s.settings.kubeletDir)
	}
	if _, err := i.s.tryKubectl(ctx, "version", "--client"); err != nil {
		i.s.skip(t, "kubectl apply -k: put kubectl in PATH: %v", err)
	}
	must(t, os.CopyFS(filepath.Join(i.overlayDir(), "base"), os.DirFS(filepath.Join("..", "..", "deploy", "kubernetes"))))
	for name, text := range map[string]string{
		"hosts.toml": i.s.open.hostsToml(),
		"kustomization.yaml": fmt.Sprintf(overlay, i.s.settings.driver.repository, i.s.settings.driver.tag, i.s.open.host(),
			strings.ReplaceAll(suiteLabel, "/", "~1")),
	} {
		must(t, os.WriteFile(filepath.Join(i.overlayDir(), name), []byte(text), 0o644))
	}
	t.Log(i.s.kubectl(ctx, t, "apply", "-k", i.overlayDir()))
}

func (i *installation) unapply(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	t.Log(i.s.kubectl(ctx, t, "delete", "-k", i.overlayDir()))
	i.nothingLeft(ctx, t, i.kept, i.fresh)
	return ctx
}

// reinstall installs the driver as the parts after this one find it.
func (i *installation) reinstall(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	i.s.open.stop(ctx, t)
	t.Cleanup(func() { i.s.open.start(context.WithoutCancel(ctx), t) })
	i.s.driver(ctx, t)
	fresh := i.on(ctx, t, i.nodes[0], i.fresh)
	i.reads(ctx, t, "kept", i.everywhere(ctx, t, i.kept)...)
	i.reads(ctx, t, "fresh", fresh)
	return ctx
}
