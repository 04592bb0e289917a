package e2e_test

import (
	"context"
	"fmt"
	"path"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
)

// oneMount tests that volumes of one image share a mount, on the node and in the driver's memory.
func (v *volumes) oneMount(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	a := v.s.agent(v.node)
	a.waitClean(ctx, t)
	device := func(p *pod) string { return strings.TrimSpace(p.exec(ctx, t, "stat", "-c", "%d", "/data")) }
	count := func(want float64, name string, labels ...string) {
		t.Helper()
		if got := a.metric(ctx, t, name, labels...); got != want {
			t.Errorf("%s %v is %v, want %v", name, labels, got, want)
		}
	}
	one := v.start(ctx, t, v.s.reader("", "one", inline("data", v.image.attributes())))
	one.waitReady(ctx, t)
	memory := a.metric(ctx, t, "puzzlefs_metadata_memory_bytes")
	two := v.start(ctx, t, v.s.reader("", "two", inline("data", v.image.attributes())))
	two.waitReady(ctx, t)
	count(1, "puzzlefs_mounts")
	count(2, "puzzlefs_volumes", "state", "published")
	count(memory, "puzzlefs_metadata_memory_bytes")
	if a, b := device(one), device(two); a != b {
		t.Errorf("two pods with one image have volumes of devices %s and %s", a, b)
	}
	v.mounted(ctx, t, map[string]int{v.image.Digest: 2})

	other := v.start(ctx, t, v.s.reader("", "other", inline("data", v.changed.attributes())))
	other.waitReady(ctx, t)
	count(2, "puzzlefs_mounts")
	if a, b := device(one), device(other); a == b {
		t.Errorf("pods with two images have volumes of one device, %s", a)
	}
	v.mounted(ctx, t, map[string]int{v.image.Digest: 2, v.changed.Digest: 1})

	one.delete(ctx, t)
	other.delete(ctx, t)
	v.mounted(ctx, t, map[string]int{v.image.Digest: 1})
	if got := two.exec(ctx, t, "cat", "/data/hello.txt"); got != "hello\n" {
		t.Errorf("the volume of the pod that is left has %q in hello.txt", got)
	}
	two.delete(ctx, t)
	v.mounted(ctx, t, nil)
	count(0, "puzzlefs_mounts")
	return ctx
}

// mounted compares the mounts of the driver on the node with how many volumes each image should have, by
// its digest: they are binds of one mount, below the driver's state directory.
func (v *volumes) mounted(ctx context.Context, t *testing.T, want map[string]int) {
	t.Helper()
	states, devices, volumes := map[string]int{}, map[string]map[string]bool{}, map[string]int{}
	for _, m := range v.s.agent(v.node).driverMounts(ctx, t) {
		if devices[m.Source] == nil {
			devices[m.Source] = map[string]bool{}
		}
		devices[m.Source][m.Device] = true
		if path.Dir(m.Point) == v.s.settings.stateDir+"/mounts" {
			states[m.Source]++
		} else {
			volumes[m.Source]++
		}
	}
	if fmt.Sprint(volumes) != fmt.Sprint(want) { // maps are printed in the order of their keys
		t.Errorf("the driver has volumes of %v, want %v", volumes, want)
	}
	for digest := range devices {
		if states[digest] != 1 || len(devices[digest]) != 1 {
			t.Errorf("image %s is mounted %d times, as devices %v; want one mount", digest, states[digest], devices[digest])
		}
	}
}

// thirtyPods has many pods come and go at once.
func (v *volumes) thirtyPods(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	nodes, err := v.s.nodes(ctx)
	must(t, err)
	var sum string
	for _, e := range v.tree.Entries {
		if e.Path == "/large" {
			sum = e.SHA256
		}
	}
	pods := make([]*pod, 30)
	for i := range pods {
		spec := v.s.reader(v.namespace, fmt.Sprintf("many-%02d", i), inline("data", v.image.attributes()))
		spec.Spec.Containers[0].Command = []string{"sh", "-c", "sha256sum /data/large && exec sleep infinity"}
		pods[i] = v.s.start(ctx, t, on(nodes[i%len(nodes)], spec))
	}
	want := sum + "  /data/large\n"
	for _, p := range pods {
		p.waitReady(ctx, t)
		mustAwait(ctx, t, patience, "what "+p.String()+" read", func(ctx context.Context) (bool, string, error) {
			got := p.logs(ctx, t, "")
			if got != "" && got != want {
				return false, "", stop(fmt.Errorf("it is %q, want %q", got, want))
			}
			return got == want, podState(p.get(ctx, t)), nil
		})
	}
	for _, node := range nodes {
		if got := v.s.agent(node).metric(ctx, t, "puzzlefs_mounts"); got != 1 {
			t.Errorf("the driver on %s has %v mounts for 30 pods with one image, want 1", node, got)
		}
	}
	removed, removing := errgroup.WithContext(ctx)
	for _, p := range pods {
		removed.Go(func() error { return p.remove(removing) })
	}
	must(t, removed.Wait())
	for _, node := range nodes {
		v.s.agent(node).waitClean(ctx, t)
	}
	return ctx
}

// pullPolicy tests when the registry is asked.
func (v *volumes) pullPolicy(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	img := v.s.open.pushTree(ctx, t, textTree(t, "policy\n"), "volumes/policy:v1")
	reader := func(name, policy string) *pod {
		return v.start(ctx, t, v.s.reader("", name, inline("data", img.attributes("pullPolicy", policy))))
	}
	a := v.s.agent(v.node)
	never := reader("never", "Never")
	never.waitEvent(ctx, t, "ImageNotFound", `^Find image \S+: it is not whole on this node, and pullPolicy is Never; use IfNotPresent: not found\.$`)
	reader("if-not-present", "IfNotPresent").waitReady(ctx, t)
	never.waitReady(ctx, t) // without anybody's help
	asked := a.metric(ctx, t, "puzzlefs_pulls_total", "result", "present")
	reader("always", "Always").waitReady(ctx, t)
	if now := a.metric(ctx, t, "puzzlefs_pulls_total", "result", "present"); now != asked+1 {
		t.Errorf("the registry agreed %v times to what is on the node, and %v times after a volume with pullPolicy Always; want one more", asked, now)
	}

	v.s.open.stop(ctx, t)
	t.Cleanup(func() { v.s.open.start(context.WithoutCancel(ctx), t) })
	late := reader("late", "Always")
	reader("present", "IfNotPresent").waitReady(ctx, t)
	reader("still-never", "Never").waitReady(ctx, t)
	late.waitEvent(ctx, t, "RegistryUnavailable", `^Resolve \S+: cannot reach `)
	v.s.open.start(ctx, t)
	late.waitReady(ctx, t)
	return ctx
}
