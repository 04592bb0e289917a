package e2e_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"
)

// testFailures tests what a pod's author is told, and that pods start once the cause is gone.
func (s *suite) testFailures(t *testing.T) {
	f := &failures{s: s}
	s.Test(t,
		features.New("a volume that does not come").
			Setup(f.prepare).
			Assess("is explained by the pod's events, comes by itself once the cause is gone, and leaves nothing", f.explained).
			Feature(),
		features.New("content that goes bad on the node").
			Setup(f.prepare).
			Assess("is an error and an event, and is fetched again for the next pod", f.corrupt).
			Feature())
}

// failures is what the features of this part share.
type failures struct {
	s         *suite
	namespace string
	node      string
}

func (f *failures) prepare(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	f.s.driver(ctx, t)
	f.namespace = f.s.namespace(ctx, t, "failures", restrictedPods)
	nodes, err := f.s.nodes(ctx)
	must(t, err)
	f.node = nodes[0]
	return ctx
}

// failing is a volume that does not come.
type failing struct {
	name   string
	volume corev1.Volume
	// code and reason are those of the answer and of the event of the driver; "" where kubelet does not
	// come to ask it.
	code, reason string
	// says is the sentence with its cure, a regular expression.
	says string
	// text is in the file text of the volume once the cause is gone; "" where nothing outside the pod
	// can remove it.
	text string
}

// explained starts all pods at once, because kubelet tries again ever more rarely.
func (f *failures) explained(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s := f.s
	lateTree := textTree(t, "late\n")
	here := s.open.pushTree(ctx, t, textTree(t, "here\n"), "failures/app:v1")
	late := s.open.pushTree(ctx, t, lateTree, "failures/elsewhere:v1") // pushed to other names below
	secret := s.private.pushTree(ctx, t, textTree(t, "secret\n"), "failures/secret:v1")
	s.dockerSecret(ctx, t, f.namespace, "wrong", s.private.user, "not the password", s.private.host())

	s.open.stop(ctx, t)
	t.Cleanup(func() { s.open.start(context.WithoutCancel(ctx), t) })
	down := failing{
		"down", inline("data", here.attributes()), "Unavailable", "RegistryUnavailable",
		`resolve \S+: cannot reach http://\S+: dial tcp \S+: connection refused: check the network, or try again later`, "here\n",
	}
	downPod := f.start(ctx, t, down)
	f.explains(ctx, t, down, downPod)
	s.open.start(ctx, t)

	all := f.table(here, late, secret)
	pods := make([]*pod, len(all))
	for i, bad := range all {
		pods[i] = f.start(ctx, t, bad)
	}
	for i, bad := range all {
		f.explains(ctx, t, bad, pods[i])
	}
	s.open.pushTree(ctx, t, lateTree, "failures/app:v2")
	s.open.pushTree(ctx, t, lateTree, "failures/absent:v1")
	s.dockerSecret(ctx, t, f.namespace, "not-there-yet", s.private.user, s.private.password, s.private.host())
	f.correctSecret(ctx, t, "wrong")

	// What cannot be cured goes, while the others wait for kubelet's next try.
	for i, bad := range all {
		if bad.text == "" {
			pods[i].delete(ctx, t)
		}
	}
	for i, bad := range append(all, down) {
		if bad.text == "" {
			continue
		}
		p := append(pods, downPod)[i]
		p.waitReady(ctx, t)
		if got := p.exec(ctx, t, "cat", "/data/text"); got != bad.text {
			t.Errorf("pod %s reads %q, want %q", p, got, bad.text)
		}
		p.delete(ctx, t)
	}
	s.agent(f.node).waitClean(ctx, t)
	return ctx
}

// table returns volumes that do not come. late is in the registry under another name, secret in the
// private one.
func (f *failures) table(here, late, secret image) []failing {
	host, private := f.s.open.host(), f.s.private.host()
	repository := regexp.QuoteMeta(host) + "/failures/app"
	unsafe := inline("data", here.attributes())
	unsafe.CSI.ReadOnly = nil
	return []failing{
		{
			"wrong-digest", inline("data", here.attributes("digest", late.Digest)), "NotFound", "ImageNotFound",
			fmt.Sprintf("there is no manifest %s in repository %s: tag v1 holds %s now", late.Digest, repository, here.Digest), "late\n",
		},
		{
			"missing-image", inline("data", late.attributes("image", host+"/failures/absent:v1")), "NotFound", "ImageNotFound",
			// The registry answers the same for a repository that it does not have.
			fmt.Sprintf("there is no manifest %s in repository %s/failures/absent: nor is there a tag v1: check the name, or push the image first", late.Digest, regexp.QuoteMeta(host)), "late\n",
		},
		{
			"missing-tag", inline("data", map[string]string{"image": host + "/failures/app:v2", "digest": late.Verity}), "NotFound", "ImageNotFound",
			"there is no tag v2 in repository " + repository + ": check the tag, or push the image first", "late\n",
		},
		{
			"missing-secret", inlineWithSecret("data", secret.attributes(), "not-there-yet"), "", "",
			`MountVolume.SetUp failed for volume "data" : .*secrets? "not-there-yet" not found`, "secret\n",
		},
		{
			"wrong-secret", inlineWithSecret("data", secret.attributes(), "wrong"), "Unauthenticated", "RegistryDenied",
			`answered 401 Unauthorized.*: give credentials for ` + regexp.QuoteMeta(private) + `, .*nodePublishSecretRef`, "secret\n",
		},
		{
			"no-secret", inline("data", secret.attributes()), "Unauthenticated", "RegistryDenied",
			`answered 401 Unauthorized.*: give credentials for ` + regexp.QuoteMeta(private) + `, .*nodePublishSecretRef`, "",
		},
		{
			"unknown-host", inline("data", here.attributes("image", "nobody."+suiteNamespace+".svc:5000/app:v1")), "Unavailable", "RegistryUnavailable",
			`cannot reach \S+: lookup nobody\.\S+ .*no such host: check the name of the registry, or the name server`, "",
		},
		{
			"unknown-authority", inline("data", secret.attributes("image", strings.Replace(secret.Ref, ".svc:", ".svc.cluster.local:", 1))),
			"Unavailable", "RegistryUnavailable",
			`certificate signed by unknown authority: put the CA's certificate into the certs directory as \S+/ca\.crt, or name it in hosts\.toml`, "",
		},
		{
			"unknown-attribute", inline("data", here.attributes("imgae", "x")), "InvalidArgument", "InvalidVolume",
			`"imgae" is not known; did you mean image\? \(valid are image, digest, pullPolicy, subPath, mode, mtime\)`, "",
		},
		{
			"bare-digest", inline("data", here.attributes("digest", strings.TrimPrefix(here.Digest, "sha256:"))), "InvalidArgument", "InvalidVolume",
			`say which digest it is: sha256:<64 hex> \(of the OCI image manifest\) or verity:<64 hex>`, "",
		},
		{
			"no-digest", inline("data", map[string]string{"image": here.Ref}), "InvalidArgument", "DigestRefused",
			`no digest; a tag can change under a running pod, so this node wants volumeAttributes\.digest`, "",
		},
		{
			"up", inline("data", here.attributes("subPath", "a/../b")), "InvalidArgument", "InvalidVolume",
			`read attribute subPath "a/\.\./b": \.\. is not allowed; name the directory from the image's root`, "",
		},
		{
			"missing-path", inline("data", here.attributes("subPath", "missing")), "NotFound", "ImageNotFound",
			`find subPath "missing": the image has no such directory`, "",
		},
		{
			"writable", unsafe, "InvalidArgument", "InvalidVolume",
			`PuzzleFS volumes are read-only; set readOnly: true on the pod's csi volume`, "",
		},
	}
}

func (f *failures) start(ctx context.Context, t *testing.T, bad failing) *pod {
	t.Helper()
	return f.s.start(ctx, t, on(f.node, f.s.reader(f.namespace, bad.name, bad.volume)))
}

// explains waits until the pod's events say why its volume does not come: kubelet's, and the driver's.
func (f *failures) explains(ctx context.Context, t *testing.T, bad failing, p *pod) {
	t.Helper()
	if bad.reason == "" {
		p.waitEvent(ctx, t, "FailedMount", bad.says)
		return
	}
	// In the driver's own event it is a sentence, and begins with a capital.
	if e := p.waitEvent(ctx, t, bad.reason, "(?i)"+bad.says); !regexp.MustCompile(`^[A-Z].*\.$`).MatchString(e.Message) {
		t.Errorf("the event for %s is no sentence: %s", p, e.Message)
	}
	p.waitEvent(ctx, t, "FailedMount", fmt.Sprintf(`^MountVolume\.SetUp failed for volume "data" : rpc error: code = %s desc = .*%s`, bad.code, bad.says))
	if now := p.get(ctx, t); podReady(now) {
		t.Errorf("pod %s runs without its volume: %s", p, podState(now))
	}
}

// correctSecret gives a secret the right password.
func (f *failures) correctSecret(ctx context.Context, t *testing.T, name string) {
	t.Helper()
	secrets, r := f.s.client.CoreV1().Secrets(f.namespace), f.s.private
	secret, err := secrets.Get(ctx, name, metav1.GetOptions{})
	must(t, err)
	secret.Data[corev1.DockerConfigJsonKey] = dockerConfig(r.user, r.password, r.host())
	_, err = secrets.Update(ctx, secret, metav1.UpdateOptions{})
	must(t, err)
}

// corrupt changes a byte of what the driver keeps, under a running pod.
func (f *failures) corrupt(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s := f.s
	dir := textTree(t, "here\n")
	// Of random bytes, and so in blobs that no other image has.
	content := make([]byte, 3<<20)
	_, err := rand.Read(content)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "file"), content, 0o644))
	sum := fmt.Sprintf("%x  /data/file\n", sha256.Sum256(content))
	img := s.open.pushTree(ctx, t, dir, "failures/corrupt:v1")
	victim := f.start(ctx, t, failing{name: "victim", volume: inline("data", img.attributes())})
	victim.waitReady(ctx, t)

	a := s.agent(f.node)
	failures := a.metric(ctx, t, "puzzlefs_verify_failures_total", "where", "read")
	a.damage(ctx, t, img)
	if out, err := victim.try(ctx, "sha256sum", "/data/file"); err == nil || !strings.Contains(err.Error(), "Input/output error") {
		t.Errorf("reading a file of which a byte was changed on the node's disk: %q, error %v; want Input/output error", out, err)
	}
	victim.waitEvent(ctx, t, "CorruptRead", fmt.Sprintf(`^Blob sha256:[0-9a-f]{64} of image %s was corrupt on node %s and is removed; `+
		`reads of files that need it fail with EIO until a volume of the image is published on this node again, which fetches it: restart the pod\.$`, img.Digest, f.node))
	if now := a.metric(ctx, t, "puzzlefs_verify_failures_total", "where", "read"); now <= failures {
		t.Errorf("puzzlefs_verify_failures_total is still %v", now)
	}
	// A new pod fetches what is gone; the old one, which has the same mount, reads it too.
	next := f.start(ctx, t, failing{name: "next", volume: inline("data", img.attributes())})
	next.waitReady(ctx, t)
	for _, p := range []*pod{next, victim} {
		if got := p.exec(ctx, t, "sha256sum", "/data/file"); got != sum {
			t.Errorf("pod %s reads %q after the image was published again, want %q", p, got, sum)
		}
	}
	return ctx
}

// damage changes a byte in the largest blob of an image that the driver on the node keeps, whose content
// nobody has read yet.
func (a *agent) damage(ctx context.Context, t testing.TB, img image) {
	t.Helper()
	blobs := hostRoot + a.s.settings.stateDir + "/store/blobs/sha256/"
	var manifest struct {
		Layers []struct {
			Digest string
			Size   int64
		}
	}
	text := a.run(ctx, t, "cat", blobs+strings.TrimPrefix(img.Digest, "sha256:"))
	if err := json.Unmarshal([]byte(text), &manifest); err != nil || len(manifest.Layers) == 0 {
		t.Fatalf("read the manifest of %s: %v: %s", img.Ref, err, text)
	}
	largest := manifest.Layers[0]
	for _, layer := range manifest.Layers {
		if layer.Size > largest.Size {
			largest = layer
		}
	}
	a.shell(ctx, t, fmt.Sprintf(`set -e
file=%s at=%d
old=$(dd if="$file" bs=1 skip=$at count=1 2>/dev/null | od -An -tu1)
printf "\\$(printf %%o $((old ^ 255)))" | dd of="$file" bs=1 seek=$at conv=notrunc`, blobs+strings.TrimPrefix(largest.Digest, "sha256:"), largest.Size/2))
}
