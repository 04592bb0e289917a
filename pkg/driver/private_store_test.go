package driver_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
)

// TestPrivateImageEvicted: eviction takes with the blobs what was known of who may see them.
func TestPrivateImageEvicted(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, other := makeImage(t, "secret\n", 10), makeImage(t, "other\n", 10)
	ref, otherRef := reg.push(t, im, "private/app", "1"), reg.push(t, other, "other", "1")
	n.cfg.StoreQuota = 1 << 20 // room for one of them
	n.start()
	digest := im.digest.String()

	// Once the registry gave the image to everybody.
	open := n.request("open", ref, digest)
	n.publish(open)
	n.unpublish(open)
	again := n.request("again", ref, digest)
	reg.set(func(r *testRegistry) { r.password = "hunter2" })
	n.publish(again) // the node has it, and was given it
	n.unpublish(again)

	secret := dockerSecret(reg.host, "hunter2")
	evict := func(pod string) {
		t.Helper()
		req := n.request(pod, otherRef, other.digest.String())
		req.Secrets = secret
		n.publish(req)
		n.unpublish(req)
		if _, err := os.Stat(filepath.Join(n.dir, "state/store/blobs/sha256", im.chunks[0].Hex())); !os.IsNotExist(err) {
			t.Fatalf("the image was to be evicted: %v", err)
		}
	}
	evict("evict1")
	n.refused(n.request("a", ref, digest), codes.Unauthenticated, reg.host)

	// Now it comes with a pod's secret, and is that pod's alone, before eviction and after.
	for i := range 2 {
		reg.requests()
		owner := n.request(fmt.Sprint("owner", i), ref, digest)
		owner.Secrets = secret
		n.publish(owner)
		n.shows(owner.TargetPath, im)
		if fetched := strings.Join(reg.requests(), "\n"); !strings.Contains(fetched, im.chunks[0].Hex()) {
			t.Errorf("what was evicted was not fetched again:\n%s", fetched)
		}
		n.refused(n.request("b", ref, digest), codes.Unauthenticated, reg.host)
		n.unpublish(owner)
		n.refused(n.request("c", ref, digest), codes.Unauthenticated, reg.host)
		evict(fmt.Sprint("evict", i+2))
		n.refused(n.request("d", ref, digest), codes.Unauthenticated, reg.host)
	}
	n.nothingLeft()
}

// TestPrivateImageMirrors: a mirror that wants credentials is no way around the registry's,
// be the image on the node or not. One that asks for none speaks for its registry.
func TestPrivateImageMirrors(t *testing.T) {
	const name = "registry.invalid:5000"
	upstream, mirror, n := newRegistry(t), newRegistry(t), newNode(t)
	im := makeImage(t, "secret\n", 2)
	for _, reg := range []*testRegistry{upstream, mirror} {
		reg.push(t, im, "private/app", "1")
	}
	upstream.set(func(r *testRegistry) { r.password = "upstream" })
	mirror.set(func(r *testRegistry) { r.password = "mirror" })
	certs := filepath.Join(n.dir, "certs.d")
	if err := os.MkdirAll(filepath.Join(certs, "registry.invalid_5000_"), 0o755); err != nil {
		t.Fatal(err)
	}
	hosts := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", upstream.host, mirror.host)
	if err := os.WriteFile(filepath.Join(certs, "registry.invalid_5000_", "hosts.toml"), []byte(hosts), 0o644); err != nil {
		t.Fatal(err)
	}
	n.cfg.Registry.CertsDir = certs
	n.start()
	ref, digest := name+"/private/app:1", im.digest.String()

	none := func(pod string) {
		t.Helper()
		n.refused(n.request(pod, ref, digest), codes.Unauthenticated)
		wrong := n.request(pod+"-wrong", ref, digest)
		wrong.Secrets = dockerSecret(mirror.host, "upstream")
		n.refused(wrong, codes.Unauthenticated)
	}
	none("before")
	for host, password := range map[string]string{upstream.host: "upstream", mirror.host: "mirror"} {
		req := n.request("owner-"+password, ref, digest)
		req.Secrets = dockerSecret(host, password)
		n.publish(req)
		n.shows(req.TargetPath, im)
		none("beside-" + password)
		n.unpublish(req)
		none("after-" + password)
	}
	// The mirror is down: the registry itself decides. Both are: nobody does.
	mirror.set(func(r *testRegistry) { r.down = true })
	owner := n.request("owner", ref, digest)
	owner.Secrets = dockerSecret(upstream.host, "upstream")
	n.publish(owner)
	n.refused(n.request("nobody", ref, digest), codes.Unauthenticated)
	upstream.set(func(r *testRegistry) { r.down = true })
	second := n.request("second", ref, digest)
	second.Secrets = dockerSecret(upstream.host, "upstream")
	n.refused(second, codes.Unavailable)
	n.shows(owner.TargetPath, im)
	n.unpublish(owner)

	mirror.set(func(r *testRegistry) { r.down, r.password = false, "" })
	free := n.request("free", ref, digest)
	n.publish(free)
	n.shows(free.TargetPath, im)
	n.unpublish(free)
	n.nothingLeft()
}
