package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
)

// reader returns a pod that does nothing but have the volumes, for checker and shell to be run in: each is
// mounted at / and its name. It obeys the restricted Pod Security Standard. It is the caller's to change
// before start.
func (s *suite) reader(namespace, name string, volumes ...corev1.Volume) *corev1.Pod {
	yes, no, user, grace := true, false, int64(65532), int64(1)
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": "reader"}},
		Spec: corev1.PodSpec{
			AutomountServiceAccountToken:  &no,
			EnableServiceLinks:            &no,
			TerminationGracePeriodSeconds: &grace, // sleep as process 1 does not hear SIGTERM
			SecurityContext: &corev1.PodSecurityContext{
				RunAsNonRoot: &yes, RunAsUser: &user, RunAsGroup: &user,
				SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			},
			Containers: []corev1.Container{{
				Name: "reader", Image: s.settings.tools.String(), ImagePullPolicy: corev1.PullIfNotPresent,
				Command: []string{"sleep", "infinity"},
				SecurityContext: &corev1.SecurityContext{
					AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
					Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
				},
				Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{
					corev1.ResourceCPU: resource.MustParse("1m"), corev1.ResourceMemory: resource.MustParse("8Mi"),
				}},
			}},
			Volumes: volumes,
		},
	}
	for _, v := range volumes {
		p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts,
			corev1.VolumeMount{Name: v.Name, MountPath: "/" + v.Name})
	}
	return p
}

// rootReader is a reader whose user is root and may read all of a sample tree: files of others, which takes
// DAC_READ_SEARCH, and attributes trusted.*, which takes SYS_ADMIN. It needs a privileged namespace.
func (s *suite) rootReader(namespace, name string, volumes ...corev1.Volume) *corev1.Pod {
	p := s.reader(namespace, name, volumes...)
	root, no := int64(0), false
	p.Spec.SecurityContext.RunAsNonRoot = &no
	p.Spec.SecurityContext.RunAsUser, p.Spec.SecurityContext.RunAsGroup = &root, &root
	p.Spec.Containers[0].SecurityContext.Capabilities.Add = []corev1.Capability{"DAC_READ_SEARCH", "SYS_ADMIN"}
	return p
}

// inline returns an inline volume of our driver.
func inline(name string, attributes map[string]string) corev1.Volume {
	yes := true
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{
		Driver: driverName, ReadOnly: &yes, VolumeAttributes: attributes,
	}}}
}

// inlineWithSecret is inline with the name of a secret in the pod's namespace.
func inlineWithSecret(name string, attributes map[string]string, secret string) corev1.Volume {
	v := inline(name, attributes)
	v.CSI.NodePublishSecretRef = &corev1.LocalObjectReference{Name: secret}
	return v
}

// on has the scheduler put a pod on a node, and returns it.
func on(node string, p *corev1.Pod) *corev1.Pod {
	p.Spec.NodeSelector = map[string]string{corev1.LabelHostname: node}
	return p
}

// pod is a pod in the cluster.
type pod struct {
	s               *suite
	namespace, name string
}

// start creates a pod. When the test ends the pod is described if the test failed, and deleted: all pods of a
// test together, and then it waits for their end.
func (s *suite) start(ctx context.Context, t *testing.T, p *corev1.Pod) *pod {
	t.Helper()
	made, err := s.client.CoreV1().Pods(p.Namespace).Create(ctx, p, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create pod %s/%s: %v", p.Namespace, p.Name, err)
	}
	h := s.pod(made.Namespace, made.Name)
	if _, more := s.started[t]; !more {
		// What is registered first runs last.
		t.Cleanup(func() { s.awaitEnds(context.WithoutCancel(ctx), t) })
	}
	s.started[t] = append(s.started[t], h)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		if t.Failed() {
			t.Log(s.describe(ctx, h.namespace, h.name))
			if s.settings.keep {
				return
			}
		}
		if _, err := h.askToEnd(ctx); err != nil {
			t.Error(err)
		}
	})
	return h
}

// awaitEnds waits for the end of the pods that a test has started.
func (s *suite) awaitEnds(ctx context.Context, t *testing.T) {
	t.Helper()
	pods := s.started[t]
	delete(s.started, t)
	if t.Failed() && s.settings.keep {
		return
	}
	for _, p := range pods {
		if err := p.remove(ctx); err != nil {
			t.Error(err)
		}
	}
}

// pod returns a pod that is there, such as one of a Deployment. It is not deleted with the test.
func (s *suite) pod(namespace, name string) *pod { return &pod{s: s, namespace: namespace, name: name} }

// pods returns the pods that a label selector finds, by name.
func (s *suite) pods(ctx context.Context, t testing.TB, namespace, selector string) []corev1.Pod {
	t.Helper()
	list, err := s.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	must(t, err)
	return list.Items
}

func (p *pod) String() string { return p.namespace + "/" + p.name }

// get returns the pod as it is now.
func (p *pod) get(ctx context.Context, t testing.TB) *corev1.Pod {
	t.Helper()
	got, err := p.s.client.CoreV1().Pods(p.namespace).Get(ctx, p.name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("get pod %s: %v", p, err)
	}
	return got
}

// waitReady waits until the pod is ready. It is patient enough for several of kubelet's attempts.
func (p *pod) waitReady(ctx context.Context, t testing.TB) {
	t.Helper()
	if err := p.awaitReady(ctx); err != nil {
		t.Fatalf("%v\n%s", err, p.eventsText(context.WithoutCancel(ctx)))
	}
}

func (p *pod) awaitReady(ctx context.Context) error {
	return await(ctx, slowPatience, "pod "+p.String()+" to be ready", func(ctx context.Context) (bool, string, error) {
		got, err := p.s.client.CoreV1().Pods(p.namespace).Get(ctx, p.name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return false, "", stop(err)
		case err != nil:
			return false, "", err
		case got.Status.Phase == corev1.PodFailed || got.Status.Phase == corev1.PodSucceeded:
			return false, "", stop(errors.New("it has ended: " + podState(got)))
		}
		return podReady(got), podState(got), nil
	})
}

// podReady says whether all containers of a pod are.
func podReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil
		}
	}
	return false
}

// podState says in a line what a pod does.
func podState(p *corev1.Pod) string {
	words := []string{string(p.Status.Phase)}
	if p.DeletionTimestamp != nil {
		words = append(words, "being deleted")
	}
	if p.Status.Message != "" {
		words = append(words, p.Status.Message)
	}
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		words = append(words, c.Name+" "+containerState(c))
	}
	if p.Spec.NodeName != "" {
		words = append(words, "on "+p.Spec.NodeName)
	}
	return strings.Join(words, ", ")
}

func containerState(c corev1.ContainerStatus) string {
	var text string
	switch {
	case c.State.Running != nil:
		text = "runs"
	case c.State.Waiting != nil:
		text = "waits: " + c.State.Waiting.Reason + " " + c.State.Waiting.Message
	case c.State.Terminated != nil:
		text = fmt.Sprintf("ended with %d: %s %s", c.State.Terminated.ExitCode, c.State.Terminated.Reason, tail(c.State.Terminated.Message, 5))
	default:
		text = "is not there yet"
	}
	if !c.Ready {
		text += " (not ready)"
	}
	if c.RestartCount > 0 {
		text += fmt.Sprintf(" after %d restarts", c.RestartCount)
	}
	return text
}

// exec runs a command in the pod's first container and returns its stdout.
func (p *pod) exec(ctx context.Context, t testing.TB, command ...string) string {
	t.Helper()
	out, err := p.try(ctx, command...)
	must(t, err)
	return out
}

// try is exec for commands that may fail.
func (p *pod) try(ctx context.Context, command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return p.s.execIn(ctx, p.namespace, p.name, "", nil, command...)
}

// execWith is exec with something to read from stdin.
func (p *pod) execWith(ctx context.Context, t testing.TB, stdin io.Reader, command ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := p.s.execIn(ctx, p.namespace, p.name, "", stdin, command...)
	must(t, err)
	return out
}

// tryIn is try for one of several containers.
func (p *pod) tryIn(ctx context.Context, container string, command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return p.s.execIn(ctx, p.namespace, p.name, container, nil, command...)
}

// logs returns what a container of the pod has written; container may be "" where there is one.
func (p *pod) logs(ctx context.Context, t testing.TB, container string) string {
	t.Helper()
	b, err := p.s.client.CoreV1().Pods(p.namespace).GetLogs(p.name, &corev1.PodLogOptions{Container: container}).DoRaw(ctx)
	if err != nil {
		t.Fatalf("read logs of %s: %v", p, err)
	}
	return string(b)
}

// delete deletes the pod and waits until it is gone, which takes its volumes being unmounted.
func (p *pod) delete(ctx context.Context, t testing.TB) {
	t.Helper()
	must(t, p.remove(ctx))
}

func (p *pod) remove(ctx context.Context) error {
	uid, err := p.askToEnd(ctx)
	if err != nil || uid == "" {
		return err
	}
	return await(ctx, slowPatience, "the end of pod "+p.String(), func(ctx context.Context) (bool, string, error) {
		now, err := p.s.client.CoreV1().Pods(p.namespace).Get(ctx, p.name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) || err == nil && now.UID != uid {
			return true, "", nil
		}
		if err != nil {
			return false, "", err
		}
		return false, podState(now), nil
	})
}

// askToEnd deletes the pod without waiting. It returns the pod's UID, or "" where there is none.
func (p *pod) askToEnd(ctx context.Context) (types.UID, error) {
	got, err := p.s.client.CoreV1().Pods(p.namespace).Get(ctx, p.name, metav1.GetOptions{})
	if err == nil && got.DeletionTimestamp == nil {
		err = p.s.client.CoreV1().Pods(p.namespace).Delete(ctx, p.name, metav1.DeleteOptions{})
	}
	switch {
	case apierrors.IsNotFound(err):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("delete pod %s: %w", p, err)
	}
	return got.UID, nil
}

// events returns the events of the pod, oldest first: kubelet's, the scheduler's and the driver's.
func (p *pod) events(ctx context.Context) ([]corev1.Event, error) {
	list, err := p.s.client.CoreV1().Events(p.namespace).List(ctx, metav1.ListOptions{
		FieldSelector: fields.Set{"involvedObject.kind": "Pod", "involvedObject.name": p.name}.String(),
	})
	if err != nil {
		return nil, fmt.Errorf("list events of pod %s: %w", p, err)
	}
	slices.SortStableFunc(list.Items, func(a, b corev1.Event) int { return eventTime(a).Compare(eventTime(b)) })
	return list.Items, nil
}

// waitEvent waits for an event of the pod with the reason, or any where it is "", and a message that the
// regular expression matches, and returns it.
func (p *pod) waitEvent(ctx context.Context, t testing.TB, reason, message string) corev1.Event {
	t.Helper()
	pattern := regexp.MustCompile(message)
	var found corev1.Event
	what := fmt.Sprintf("an event %s of pod %s that matches %q", reason, p, message)
	mustAwait(ctx, t, slowPatience, what, func(ctx context.Context) (bool, string, error) {
		events, err := p.events(ctx)
		if err != nil {
			return false, "", err
		}
		for _, e := range events {
			if (reason == "" || e.Reason == reason) && pattern.MatchString(e.Message) {
				found = e
				return true, "", nil
			}
		}
		return false, "\n" + eventsText(events), nil
	})
	return found
}

// dockerSecret makes a secret of type kubernetes.io/dockerconfigjson with a name and a password for hosts.
func (s *suite) dockerSecret(ctx context.Context, t *testing.T, namespace, name, user, password string, hosts ...string) {
	t.Helper()
	_, err := s.client.CoreV1().Secrets(namespace).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data:       map[string][]byte{corev1.DockerConfigJsonKey: dockerConfig(user, password, hosts...)},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create secret %s/%s: %v", namespace, name, err)
	}
}

// with returns a copy of m that has more entries, in pairs of key and value, in their place.
func with(m map[string]string, pairs ...string) map[string]string {
	out := maps.Clone(m)
	for i := 0; i+1 < len(pairs); i += 2 {
		out[pairs[i]] = pairs[i+1]
	}
	return out
}
