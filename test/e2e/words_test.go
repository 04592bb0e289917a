package e2e_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"
)

// words is the feature of what the driver says to people.
func (o *observation) words() features.Feature {
	return features.New("words").
		Setup(o.provoke).
		Assess("of events are sentences that say what to do", o.events).
		Assess("of kubelet's events repeat nothing", o.kubeletEvents).
		Assess("are what kubectl shows", o.shown).
		Assess("of logs are one line for each failed request", o.logs).
		Assess("tell nobody a password", o.secrets).
		Feature()
}

// refusal is a volume that the driver refuses, and what the pod is told.
type refusal struct {
	pod    string
	volume corev1.Volume
	reason string
	cure   string // a regular expression: what says what to do
	p      *pod
}

// provoke starts a pod for each refusal, side by side, and one that is served.
func (o *observation) provoke(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s := o.s
	s.driver(ctx, t)
	o.nodes = s.mustNodes(ctx, t)
	o.namespace = s.namespace(ctx, t, "words", restrictedPods)
	img, other := o.newImage(ctx, t, "observe/words:v1"), o.newImage(ctx, t, "observe/other-words:v1")
	hidden := s.private.pushTree(ctx, t, textTree(t, "hidden"), "observe/hidden:v1")
	o.pushContainerImage(ctx, t, "observe/container:v1")
	s.dockerSecret(ctx, t, o.namespace, credentials, s.private.user, s.private.password, s.private.host())
	s.dockerSecret(ctx, t, o.namespace, wrongCredentials, s.private.user, wrongPassword, s.private.host())
	container := image{Ref: s.open.ref("observe/container:v1"), Digest: o.container}
	away := image{Ref: "127.0.0.1:1/observe/away:v1", Digest: img.Digest}

	o.refusals = []refusal{
		{
			pod: "no-digest", volume: inline("data", map[string]string{"image": img.Ref}),
			reason: "DigestRefused", cure: `this node wants volumeAttributes\.digest`,
		},
		{
			pod: "other-digest", volume: inline("data", img.attributes("digest", other.Verity)),
			reason: "DigestRefused", cure: `correct the digest or the tag`,
		},
		{
			pod: "no-manifest", volume: inline("data", img.attributes("digest", "sha256:"+strings.Repeat("1", 64))),
			reason: "ImageNotFound", cure: `tag v1 holds ` + img.Digest + ` now`,
		},
		{
			pod: "no-repository", volume: inline("data", image{Ref: s.open.ref("observe/nothing:v1"), Digest: img.Digest}.attributes()),
			reason: "ImageNotFound", cure: `check the name, or push the image first`,
		},
		{
			pod: "no-directory", volume: inline("data", img.attributes("subPath", "missing")),
			reason: "ImageNotFound", cure: `the image has no such directory`,
		},
		{
			pod: "container-image", volume: inline("data", container.attributes()),
			reason: "ImageUnusable", cure: `build a PuzzleFS image from it with csi-puzzlefs build`,
		},
		{
			pod: "attribute", volume: inline("data", img.attributes("imgae", "x")),
			reason: "InvalidVolume", cure: `did you mean image\?`,
		},
		{
			pod: "no-secret", volume: inline("data", hidden.attributes()),
			reason: "RegistryDenied", cure: `by a nodePublishSecretRef`,
		},
		{
			pod: "wrong-secret", volume: inlineWithSecret("data", hidden.attributes(), wrongCredentials),
			reason: "RegistryDenied", cure: `give credentials for ` + regexp.QuoteMeta(s.private.host()),
		},
		{
			pod: "registry-down", volume: inline("data", away.attributes()),
			reason: "RegistryUnavailable", cure: `check the network, or try again later`,
		},
	}
	for i := range o.refusals {
		r := &o.refusals[i]
		r.p = s.start(ctx, t, s.reader(o.namespace, r.pod, r.volume))
	}
	o.served = s.start(ctx, t, s.reader(o.namespace, "served", inlineWithSecret("data", hidden.attributes(), credentials)))
	return ctx
}

// pushContainerImage pushes an ordinary container image to the open registry.
func (o *observation) pushContainerImage(ctx context.Context, t *testing.T, as string) {
	t.Helper()
	img, err := random.Image(1000, 1)
	must(t, err)
	addr, stop := o.s.open.forward(ctx, t)
	defer stop()
	to, err := name.NewTag(addr+"/"+as, name.Insecure)
	must(t, err)
	must(t, remote.Write(to, img, remote.WithContext(ctx)))
	digest, err := img.Digest()
	must(t, err)
	o.container = digest.String()
}

func (o *observation) events(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	o.served.waitReady(ctx, t)
	pulled := o.served.waitEvent(ctx, t, "ImagePulled", "^Pulled ")
	if pulled.Type != corev1.EventTypeNormal {
		t.Errorf("the event %s is of type %s", pulled.Reason, pulled.Type)
	}
	for _, r := range o.refusals {
		e := r.p.waitEvent(ctx, t, r.reason, r.cure)
		if e.Type != corev1.EventTypeWarning || e.Source.Component != "csi-puzzlefs" || e.Source.Host == "" {
			t.Errorf("the event %s of %s is a %s of %+v, want a Warning of csi-puzzlefs on its node", e.Reason, r.pod, e.Type, e.Source)
		}
	}
	all, err := o.s.client.CoreV1().Events(o.namespace).List(ctx, metav1.ListOptions{})
	must(t, err)
	read := 0
	for _, e := range all.Items {
		if e.Source.Component != "csi-puzzlefs" {
			continue
		}
		read++
		t.Logf("%s: %s: %s", e.InvolvedObject.Name, e.Reason, e.Message)
		for _, problem := range misread(e.Message) {
			t.Errorf("the event %s of %s %s: %s", e.Reason, e.InvolvedObject.Name, problem, e.Message)
		}
	}
	if read <= len(o.refusals) {
		t.Errorf("the driver wrote %d events, want one for each of %d refusals and a pull at least", read, len(o.refusals))
	}
	return ctx
}

// misread returns what keeps a text from being read as a sentence by a person who knows no Go.
func misread(text string) []string {
	var problems []string
	if first, _ := utf8.DecodeRuneInString(text); !unicode.IsUpper(first) {
		problems = append(problems, "does not begin with a capital")
	}
	if !strings.HasSuffix(text, ".") {
		problems = append(problems, "does not end with a full stop")
	}
	// What a registry answered is its own, and quoted.
	if n := strings.Count(regexp.MustCompile(`"[^"]*"`).ReplaceAllString(text, ""), ": "); n > 4 {
		problems = append(problems, fmt.Sprintf("is a stack of %d errors", n))
	}
	for _, not := range []string{"%!", "<nil>", "&{", "map[", "0xc0", "\n", "  ", "rpc error", "context deadline exceeded", "context canceled", "NodePublishVolume"} {
		if strings.Contains(text, not) {
			problems = append(problems, fmt.Sprintf("says %q", not))
		}
	}
	return problems
}

func (o *observation) kubeletEvents(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	for _, r := range o.refusals {
		e := r.p.waitEvent(ctx, t, "FailedMount", r.cure)
		if n := strings.Count(e.Message, "rpc error"); n != 1 {
			t.Errorf("the event of kubelet for %s has %d codes, want the one that kubelet writes: %s", r.pod, n, e.Message)
		}
		_, ours, found := strings.Cut(e.Message, " desc = NodePublishVolume: ")
		if !found {
			t.Errorf("the event of kubelet for %s does not say what failed: %s", r.pod, e.Message)
			continue
		}
		t.Logf("%s: %s", r.pod, e.Message)
		// It is not kubelet's habit to write whole sentences.
		for _, problem := range misread(strings.ToUpper(ours[:1]) + ours[1:] + ".") {
			t.Errorf("the event of kubelet for %s %s: %s", r.pod, problem, e.Message)
		}
	}
	return ctx
}

func (o *observation) shown(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s := o.s
	if _, err := s.tryKubectl(ctx, "version", "--client"); err != nil {
		s.skip(t, "kubectl describe: put kubectl in PATH: %v", err)
	}
	for _, r := range o.refusals {
		text := s.kubectl(ctx, t, "-n", o.namespace, "describe", "pod", r.pod)
		if line := regexp.MustCompile(`(?m)^\s*Warning\s+` + r.reason + `\s.*csi-puzzlefs.*` + r.cure + `.*$`).FindString(text); line == "" {
			t.Errorf("kubectl describe of %s does not show the reason %s with the cure %q:\n%s", r.pod, r.reason, r.cure, text)
		}
	}
	events := s.kubectl(ctx, t, "-n", o.namespace, "get", "events", "--field-selector", "type=Warning")
	for _, r := range o.refusals {
		if !regexp.MustCompile(`(?m)\s` + r.reason + `\s+pod/` + r.pod + `\s.*` + r.cure).MatchString(events) {
			t.Errorf("kubectl get events does not show %s of %s:\n%s", r.reason, r.pod, events)
		}
	}
	// As docs/quickstart.md has it.
	nodes := s.kubectl(ctx, t, "get", "csinodes", "-o", "custom-columns=NODE:.metadata.name,DRIVERS:.spec.drivers[*].name")
	for _, node := range o.nodes {
		if !slices.ContainsFunc(lines(nodes), func(line string) bool {
			words := strings.Fields(line)
			return len(words) == 2 && words[0] == node && slices.Contains(strings.Split(words[1], ","), driverName)
		}) {
			t.Errorf("kubectl get csinodes does not show the driver on %s:\n%s", node, nodes)
		}
	}
	return ctx
}

// logLine is a line of the driver's log: what docs/operations.md says is in it.
type logLine struct {
	Time    time.Time `json:"time"`
	Level   string    `json:"level"`
	Msg     string    `json:"msg"`
	Method  string    `json:"method"`
	Request string    `json:"request"`
	Pod     string    `json:"pod"`
	Volume  string    `json:"volume"`
	Code    string    `json:"code"`
	Error   string    `json:"error"`
	Took    int64     `json:"took"`
}

// logs compares the logs with the metrics: each failed request is one line. For that kubelet must have ended
// to try.
func (o *observation) logs(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	for _, r := range o.refusals {
		must(t, o.s.client.CoreV1().Pods(o.namespace).Delete(ctx, r.pod, metav1.DeleteOptions{}))
	}
	for _, r := range o.refusals {
		r.p.delete(ctx, t)
	}
	told := map[string]int{} // lines about each pod
	for _, node := range o.nodes {
		failed := o.readLog(ctx, t, node, told)
		m := o.s.scrape(ctx, t, node)
		method := []string{"method_name", "/csi.v1.Node/NodePublishVolume"}
		want := m.sum(t, operations, method...) - m.sum(t, operations, append(method, "grpc_status_code", "OK")...)
		if float64(failed) != want {
			t.Errorf("the driver on %s refused %v volumes, and has %d lines in its log for that", node, want, failed)
		}
	}
	for _, r := range o.refusals {
		if told[o.namespace+"/"+r.pod] == 0 {
			t.Errorf("no driver has a line for the pod %s in its log", r.pod)
		}
	}
	return ctx
}

// readLog checks all lines of the log of the driver on a node, and returns how many tell of volumes that could
// not be published; told counts them by pod.
func (o *observation) readLog(ctx context.Context, t *testing.T, node string, told map[string]int) int {
	t.Helper()
	p := o.s.driverPod(ctx, t, node)
	failed, seen := 0, map[string]bool{}
	for _, text := range lines(o.s.pod(p.Namespace, p.Name).logs(ctx, t, "driver")) {
		var l logLine
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Errorf("the log of the driver on %s has a line that is not JSON: %v: %s", node, err, text)
			continue
		}
		if l.Time.IsZero() || l.Msg == "" || !slices.Contains([]string{"DEBUG", "INFO", "WARN", "ERROR"}, l.Level) || strings.Contains(text, "%!") {
			t.Errorf("the log of the driver on %s has a line without time, level or msg, or one that Go made: %s", node, text)
		}
		if l.Msg != "call failed" {
			continue
		}
		if seen[l.Request] || l.Request == "" || l.Code == "" || l.Error == "" || l.Volume == "" || l.Took <= 0 {
			t.Errorf("the line of a failed request has no id, code, error, volume or duration, or is its second one: %s", text)
		}
		seen[l.Request] = true
		if l.Method == "/csi.v1.Node/NodePublishVolume" {
			failed++
			told[l.Pod]++
		}
	}
	return failed
}

// secrets looks for the passwords, as they are and as HTTP has them, wherever the driver writes.
func (o *observation) secrets(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s := o.s
	var forms []string
	for _, password := range []string{s.private.password, wrongPassword} {
		forms = append(forms, password, base64.StdEncoding.EncodeToString([]byte(s.private.user+":"+password)))
	}
	look := func(where, text string) {
		for _, form := range forms {
			if strings.Contains(text, form) {
				t.Errorf("%s has a password in it", where)
			}
		}
	}
	events, err := s.client.CoreV1().Events("").List(ctx, metav1.ListOptions{})
	must(t, err)
	for _, e := range events.Items {
		look(fmt.Sprintf("the event %s of %s/%s", e.Reason, e.Namespace, e.InvolvedObject.Name), e.Message)
	}
	for _, node := range o.nodes {
		p := s.driverPod(ctx, t, node)
		look("the log of the driver on "+node, s.pod(p.Namespace, p.Name).logs(ctx, t, "driver"))
		look("the metrics of the driver on "+node, string(s.askDriver(ctx, t, node, "/metrics")))
		script := fmt.Sprintf("cd %s && grep -rlF", hostRoot+s.settings.stateDir)
		for _, form := range forms {
			script += fmt.Sprintf(" -e '%s'", form)
		}
		if files := s.agent(node).shell(ctx, t, script+" . || [ $? = 1 ]"); files != "" {
			t.Errorf("the state directory of %s has a password in %s", node, files)
		}
	}
	return ctx
}
