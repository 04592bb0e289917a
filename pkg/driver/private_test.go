package driver_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

// dockerSecret is a kubernetes.io/dockerconfigjson secret for a registry.
func dockerSecret(host, password string) map[string]string {
	auth := base64.StdEncoding.EncodeToString([]byte("user:" + password))
	return map[string]string{".dockerconfigjson": fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, auth)}
}

// TestPrivateImage: what came with one pod's secret is not shown to another pod because it
// happens to be on the node.
func TestPrivateImage(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "secret\n", 2)
	reg.set(func(r *testRegistry) { r.password = "hunter2" })
	ref := reg.push(t, im, "private/app", "1")
	log := n.capture()
	n.start()
	digest := im.digest.String()

	n.refused(n.request("anonymous", ref, digest), codes.Unauthenticated, reg.host)
	wrong := n.request("wrong", ref, digest)
	wrong.Secrets = dockerSecret(reg.host, "letmein")
	n.refused(wrong, codes.Unauthenticated, reg.host)

	owner := n.request("owner", ref, digest)
	owner.Secrets = dockerSecret(reg.host, "hunter2")
	n.publish(owner)
	n.shows(owner.TargetPath, im)
	// Again and again, now that it is on the node and mounted.
	for range 2 {
		for _, d := range []string{digest, "verity:" + im.verity.String()} {
			n.refused(n.request("anonymous", ref, d), codes.Unauthenticated, reg.host)
			wrong.VolumeContext["digest"] = d
			n.refused(wrong, codes.Unauthenticated, reg.host)
			never := n.request("never", ref, d)
			setAttributes(never, map[string]string{"pullPolicy": "Never"})
			n.refused(never, codes.NotFound, "nodePublishSecretRef")
			never.Secrets = dockerSecret(reg.host, "letmein")
			n.refused(never, codes.Unauthenticated)
		}
	}
	// The right secret is shown to the registry each time, but nothing is fetched again.
	reg.requests()
	second := n.request("second", ref, digest)
	second.Secrets = dockerSecret(reg.host, "hunter2")
	setAttributes(second, map[string]string{"pullPolicy": "Never"})
	n.publish(second)
	asked := reg.requests()
	if len(asked) == 0 {
		t.Error("the registry was not asked")
	}
	for _, path := range asked {
		if strings.Contains(path, "/blobs/") {
			t.Errorf("fetched again: %s", path)
		}
	}
	// A published volume needs its secret no more.
	reg.set(func(r *testRegistry) { r.down = true })
	n.publish(second)
	third := n.request("third", ref, digest)
	third.Secrets = dockerSecret(reg.host, "hunter2")
	n.refused(third, codes.Unavailable)

	// Across a restart it stays private, and mounted without the secret.
	n.stop()
	n.start()
	n.shows(owner.TargetPath, im)
	reg.set(func(r *testRegistry) { r.down = false })
	n.refused(n.request("anonymous", ref, digest), codes.Unauthenticated)
	n.unpublish(owner)
	n.unpublish(second)
	n.nothingLeft()

	// Once the registry gives it to everybody, nobody is asked any more.
	reg.set(func(r *testRegistry) { r.password = "" })
	open := n.request("open", ref, digest)
	n.publish(open)
	n.unpublish(open)
	reg.set(func(r *testRegistry) { r.down = true })
	n.publish(open)
	n.unpublish(open)
	// That is so for this repository only.
	n.refused(n.request("elsewhere", strings.Replace(ref, "private/app", "other/app", 1), digest), codes.Unavailable)
	n.nothingLeft()
	n.stop()

	for _, secret := range []string{"hunter2", "letmein", base64.StdEncoding.EncodeToString([]byte("user:hunter2"))} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("the log contains the secret %q", secret)
		}
		err := filepath.WalkDir(filepath.Join(n.dir, "state"), func(path string, e os.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() || strings.Contains(path, "/blobs/") {
				return err
			}
			b, err := os.ReadFile(path)
			if strings.Contains(string(b), secret) {
				t.Errorf("%s contains the secret %q", path, secret)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// TestPrivateImageTwoSecrets: pods with different secrets that want the same image at the same
// time are both shown to the registry, and share what is fetched.
func TestPrivateImageTwoSecrets(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "secret\n", 5)
	reg.set(func(r *testRegistry) { r.password = "hunter2" })
	ref := reg.push(t, im, "private/app", "1")
	release := make(chan struct{})
	reg.set(func(r *testRegistry) {
		r.stalled = release
		r.hold = map[format.Digest]bool{im.chunks[0]: true}
	})
	n.start()
	var reqs []*csi.NodePublishVolumeRequest
	results := make(chan error, 2)
	seen := map[string]int{}
	for i, until := range []string{im.chunks[0].Hex(), "/manifests/"} {
		req := n.request(fmt.Sprint("pod", i), ref, im.digest.String())
		req.Secrets = dockerSecret(reg.host, "hunter2")
		req.Secrets[".dockerconfigjson"] += strings.Repeat(" ", i) // another secret, good as well
		reqs = append(reqs, req)
		go func() {
			_, err := n.NodePublishVolume(t.Context(), req)
			results <- err
		}()
		for found := false; !found; time.Sleep(time.Millisecond) {
			for _, path := range reg.requests() {
				found = found || strings.Contains(path, until)
				seen[path]++
			}
		}
	}
	close(release)
	for range reqs {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	for _, path := range reg.requests() {
		seen[path]++
	}
	for path, times := range seen {
		if strings.Contains(path, "/blobs/") && times > 1 {
			t.Errorf("fetched %d times: %s", times, path)
		}
	}
	for _, req := range reqs {
		n.shows(req.TargetPath, im)
		n.unpublish(req)
	}
	n.nothingLeft()
}

// TestNodeKeychain: the node's own credentials serve pods without a secret, and pods whose
// secret is for another registry.
func TestNodeKeychain(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	reg.set(func(r *testRegistry) { r.password = "node" })
	ref := reg.push(t, im, "app", "1")
	n.cfg.Registry.Credentials = func(_ context.Context, host, _ string) (registry.Credential, error) {
		if host != reg.host {
			return registry.Credential{}, nil
		}
		return registry.Credential{Username: "user", Password: "node"}, nil
	}
	n.start()
	plain := n.request("plain", ref, im.digest.String())
	n.publish(plain)
	other := n.request("other", ref, im.digest.String())
	other.Secrets = dockerSecret("registry.example", "x")
	n.publish(other)
	// A secret for this registry goes before the node's credentials.
	wrong := n.request("wrong", ref, im.digest.String())
	wrong.Secrets = dockerSecret(reg.host, "x")
	n.refused(wrong, codes.Unauthenticated)
	bad := n.request("bad", ref, im.digest.String())
	bad.Secrets = map[string]string{"password": "hunter2"}
	n.refused(bad, codes.InvalidArgument, "kubernetes.io/dockerconfigjson")
	n.unpublish(plain)
	n.unpublish(other)
	n.nothingLeft()
}
