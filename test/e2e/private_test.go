package e2e_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"
)

// testPrivate tests images behind credentials: of a registry that speaks TLS, with a certificate of an
// authority of its own, and wants a password.
func (s *suite) testPrivate(t *testing.T) {
	v := &private{s: s}
	s.Test(t, features.New("private image").
		Setup(v.prepare).
		Assess("comes with a secret", v.withSecret).
		Assess("that is on the node is refused to pods without the right secret", v.refused).
		Assess("is given to a namespace with the secret without being fetched again", v.shared).
		Assess("is asked for at the registry each time, and stays where it is without it", v.registryDown).
		Assess("leaves no secret on the node", v.noSecrets).
		Feature())
}

// private is what the steps of this part share.
type private struct {
	s            *suite
	owner, other string // namespaces
	node         string
	image        image
	first        *pod
}

// The secrets of the other namespace: one with a wrong password, one with the right one.
const (
	guessedPassword = "a wrong guess"
	wrongSecret     = "wrong"
	rightSecret     = "right"
)

func (v *private) prepare(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s, r := v.s, v.s.private
	s.driver(ctx, t)
	nodes, err := s.nodes(ctx)
	must(t, err)
	v.node = nodes[len(nodes)-1]
	v.owner, v.other = s.namespace(ctx, t, "owner", restrictedPods), s.namespace(ctx, t, "other", restrictedPods)
	s.dockerSecret(ctx, t, v.owner, rightSecret, r.user, r.password, r.host())
	s.dockerSecret(ctx, t, v.other, rightSecret, r.user, r.password, r.host())
	s.dockerSecret(ctx, t, v.other, wrongSecret, r.user, guessedPassword, r.host())
	v.image = r.pushTree(ctx, t, textTree(t, "secret content\n"), "private/models:v1")
	v.first = v.start(ctx, t, v.owner, "first", rightSecret)
	return ctx
}

// start starts a pod; secret may be "".
func (v *private) start(ctx context.Context, t *testing.T, namespace, name, secret string, attributes ...string) *pod {
	t.Helper()
	volume := inline("data", v.image.attributes(attributes...))
	if secret != "" {
		volume = inlineWithSecret("data", v.image.attributes(attributes...), secret)
	}
	return v.s.start(ctx, t, on(v.node, v.s.reader(namespace, name, volume)))
}

// reads holds the content of a pod's volume against that of the image.
func (v *private) reads(ctx context.Context, t *testing.T, p *pod) {
	t.Helper()
	if got := p.exec(ctx, t, "cat", "/data/text"); got != "secret content\n" {
		t.Errorf("pod %s reads %q", p, got)
	}
}

func (v *private) withSecret(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	v.first.waitReady(ctx, t)
	v.reads(ctx, t, v.first)
	v.first.waitEvent(ctx, t, "ImagePulled", v.image.Digest)
	return ctx
}

// refused asks for what another namespace has on the same node.
func (v *private) refused(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	denied := fmt.Sprintf(`^Resolve %s@%s: https://%s answered 401 Unauthorized( \("UNAUTHORIZED: authentication required"\))?: no or wrong credentials, or no such repository: `+
		`give credentials for %s, by docker login, or for a pod's volume by a nodePublishSecretRef\.$`, v.image.Ref, v.image.Digest, v.s.private.host(), v.s.private.host())
	for _, c := range []struct {
		pod            *pod
		reason, answer string
	}{
		{v.start(ctx, t, v.other, "stranger", ""), "RegistryDenied", denied},
		{v.start(ctx, t, v.other, "guesser", wrongSecret), "RegistryDenied", denied},
		{v.start(ctx, t, v.other, "always", "", "pullPolicy", "Always"), "RegistryDenied", denied},
		{v.start(ctx, t, v.other, "never", "", "pullPolicy", "Never"), "ImageNotFound", "did not give it to this node without a secret yet, and pullPolicy is Never; name the secret in nodePublishSecretRef"},
		{v.start(ctx, t, v.other, "never-guesser", wrongSecret, "pullPolicy", "Never"), "RegistryDenied", denied},
	} {
		c.pod.waitEvent(ctx, t, c.reason, c.answer)
		c.pod.waitEvent(ctx, t, "FailedMount", `^MountVolume\.SetUp failed for volume "data" : rpc error: code = `)
		c.pod.delete(ctx, t)
	}
	return ctx
}

func (v *private) shared(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	a := v.s.agent(v.node)
	const fetched, pulls = "puzzlefs_fetched_bytes_total", "puzzlefs_pulls_total"
	bytes, times := a.metric(ctx, t, fetched), a.metric(ctx, t, pulls, "result", "present")
	p := v.start(ctx, t, v.other, "second", rightSecret)
	p.waitReady(ctx, t)
	v.reads(ctx, t, p)
	if now := a.metric(ctx, t, fetched); now != bytes || bytes == 0 {
		t.Errorf("%s was %v and is %v after a second namespace got the image; want it not to change", fetched, bytes, now)
	}
	if now := a.metric(ctx, t, pulls, "result", "present"); now != times+1 {
		t.Errorf("%s was %v and is %v; want the registry to be asked once", pulls, times, now)
	}
	return ctx
}

func (v *private) registryDown(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	r := v.s.private
	r.stop(ctx, t)
	t.Cleanup(func() { r.start(context.WithoutCancel(ctx), t) })
	p := v.start(ctx, t, v.other, "third", rightSecret)
	p.waitEvent(ctx, t, "RegistryUnavailable", "cannot reach https://"+r.host())
	v.reads(ctx, t, v.first)
	r.start(ctx, t)
	p.waitReady(ctx, t)
	v.reads(ctx, t, p)
	return ctx
}

// noSecrets looks for passwords in the driver's logs and in all that it keeps.
func (v *private) noSecrets(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	r, a := v.s.private, v.s.agent(v.node)
	var secrets []string
	for _, password := range []string{r.password, guessedPassword} {
		auth := base64.StdEncoding.EncodeToString([]byte(r.user + ":" + password))
		secrets = append(secrets, password, base64.StdEncoding.EncodeToString([]byte(password)), auth,
			base64.StdEncoding.EncodeToString(dockerConfig(r.user, password, r.host())))
	}
	logs := v.driverLog(ctx, t)
	state := hostRoot + v.s.settings.stateDir
	found := func(text string) []string {
		return lines(a.run(ctx, t, "sh", "-c", `grep -rlF -- "$1" "$2" || [ $? = 1 ]`, "sh", text, state))
	}
	// What is there is found: the image, which is named in a volume's record.
	if !strings.Contains(logs, v.image.Digest) || len(found(v.image.Digest)) == 0 {
		t.Fatalf("the log of the driver, or the files in %s, do not name image %s, which a running pod has", state, v.image.Digest)
	}
	for _, secret := range secrets {
		if strings.Contains(logs, secret) {
			t.Errorf("the log of the driver contains %q", secret)
		}
		if files := found(secret); len(files) > 0 {
			t.Errorf("%v contain %q", files, secret)
		}
	}
	return ctx
}

// driverLog returns all that the driver on the node has written.
func (v *private) driverLog(ctx context.Context, t *testing.T) string {
	t.Helper()
	p := v.s.driverPod(ctx, t, v.node)
	b, err := v.s.client.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{Container: "driver"}).DoRaw(ctx)
	must(t, err)
	events, err := v.s.client.CoreV1().Events(v.other).List(ctx, metav1.ListOptions{})
	must(t, err)
	var text strings.Builder
	text.Write(b)
	for _, e := range events.Items {
		text.WriteString(e.Message + "\n")
	}
	return text.String()
}
