package e2e_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"
)

// testNode tests what happens around the driver: kubelet and whole nodes end and start again, and so does the
// driver, in the middle of its work.
func (s *suite) testNode(t *testing.T) {
	nodes, err := s.nodes(t.Context())
	must(t, err)
	last := nodes[len(nodes)-1]
	s.Test(t, s.crashes(last))
	t.Run("machines", func(t *testing.T) {
		s.machine(t, last, "restarts of kubelet and of nodes") // or skips
		s.Test(t, s.kubeletRestarted(last))
		for _, node := range slices.Backward(nodes) { // that of the registries in the end
			s.Test(t, s.rebooted(node))
		}
	})
}

// waitNodeReady waits until kubelet on a node has said, after a time, that the node is ready. What Kubernetes
// believed before that counts for nothing: it takes most of a minute to miss a node.
func (s *suite) waitNodeReady(ctx context.Context, t testing.TB, node string, after time.Time) {
	t.Helper()
	mustAwait(ctx, t, slowPatience, "node "+node+" to be ready again", func(ctx context.Context) (bool, string, error) {
		n, err := s.client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
		if err != nil {
			return false, "", err
		}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady {
				return c.Status == corev1.ConditionTrue && c.LastHeartbeatTime.After(after) && !tainted(n.Spec.Taints),
					fmt.Sprintf("%s since %v, said at %v: %s", c.Status, c.LastTransitionTime, c.LastHeartbeatTime, c.Message), nil
			}
		}
		return false, "no condition", nil
	})
}

// kubeletRestarted is the feature of a kubelet that ends and starts again while pods run, come and go.
func (s *suite) kubeletRestarted(node string) features.Feature {
	var (
		namespace, dir, names string
		img                   image
		busy, idle, leaving   *pod
		driver, left          *corev1.Pod
	)
	return features.New("kubelet restarted").
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			s.driver(ctx, t)
			namespace = s.namespace(ctx, t, "kubelet", restrictedPods)
			dir = s.contentTree(t, 11, 8<<20)
			img = s.open.pushTree(ctx, t, dir, "node/content:v1")
			busy = s.start(ctx, t, s.steady(namespace, "busy", node, img))
			idle = s.start(ctx, t, on(node, s.reader(namespace, "idle", inline("data", img.attributes()))))
			leaving = s.start(ctx, t, on(node, s.reader(namespace, "leaving", inline("data", img.attributes()))))
			busy.waitReading(ctx, t)
			idle.waitReady(ctx, t)
			leaving.waitReady(ctx, t)
			names = idle.exec(ctx, t, "ls", "-A", "/data")
			return ctx
		}).
		Assess("starts and ends pods that came and went meanwhile", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			driver, left = s.driverPod(ctx, t, node), leaving.get(ctx, t)
			must(t, s.client.CoreV1().Pods(namespace).Delete(ctx, "leaving", metav1.DeleteOptions{}))
			began := time.Now()
			must(t, s.machine(t, node, "restart of kubelet").RestartKubelet(ctx))
			next := s.start(ctx, t, on(node, s.reader(namespace, "next", inline("data", img.attributes()))))
			s.waitNodeReady(ctx, t, node, began)
			s.checkVolume(ctx, t, next, dir)
			must(t, leaving.remove(ctx))
			s.agent(node).waitGone(ctx, t, left)
			return ctx
		}).
		Assess("leaves running pods, their volumes and the driver alone", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			r := busy.waitMore(ctx, t)
			t.Logf("the reader: %v", r)
			if r.failed() > 0 || len(r.Stuck) > 0 {
				t.Errorf("a restart of kubelet reached a running pod: %v", r)
			}
			if got := idle.exec(ctx, t, "ls", "-A", "/data"); got != names {
				t.Errorf("the pod sees other names in its volume than before: %q, want %q", got, names)
			}
			for _, p := range []*pod{busy, idle} {
				if n := restarts(p.get(ctx, t)); n > 0 {
					t.Errorf("the container of pod %s was started again, %d times", p, n)
				}
			}
			if now := s.driverPod(ctx, t, node); now.UID != driver.UID || restarts(now) != restarts(driver) {
				t.Errorf("the driver was started again: %s, %s before", podState(now), podState(driver))
			}
			must(t, s.awaitDriver(ctx))
			s.waitMetrics(ctx, t, node, "kubelet registered the driver", func(m metrics) bool {
				return m["puzzlefs_kubelet_registered"] == 1
			})
			s.agent(node).waitReconciled(ctx, t)
			return ctx
		}).
		Feature()
}

// rebooted is the feature of a node that loses its power while its pods have volumes, with no registry to ask
// when it is back.
func (s *suite) rebooted(node string) features.Feature {
	const replicas = 2
	var (
		namespace, dir          string
		img                     image
		bare, elsewhere         *pod
		leaving, vanished, once *corev1.Pod
	)
	return features.New("reboot of "+node).
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			s.driver(ctx, t)
			nodes, err := s.nodes(ctx)
			must(t, err)
			namespace = s.namespace(ctx, t, "reboot", restrictedPods)
			dir = s.contentTree(t, 12, 8<<20)
			img = s.open.pushTree(ctx, t, dir, "node/reboot:v1")
			bare = s.start(ctx, t, s.steady(namespace, "bare", node, img))
			for _, name := range []string{"leaving", "vanished"} {
				s.start(ctx, t, on(node, s.reader(namespace, name, inline("data", img.attributes()))))
			}
			s.deploy(ctx, t, "deployed", replicas, on(node, s.reader(namespace, "deployed", inline("data", img.attributes()))))
			for _, other := range nodes {
				if other != node {
					elsewhere = s.start(ctx, t, s.steady(namespace, "elsewhere", other, img))
					elsewhere.waitReading(ctx, t)
				}
			}
			bare.waitReading(ctx, t)
			for _, name := range []string{"leaving", "vanished"} {
				s.pod(namespace, name).waitReady(ctx, t)
			}
			leaving, vanished = s.pod(namespace, "leaving").get(ctx, t), s.pod(namespace, "vanished").get(ctx, t)
			once = bare.get(ctx, t)
			s.waitDeployed(ctx, t, namespace, "deployed", replicas)
			s.open.stop(ctx, t)
			return ctx
		}).
		Teardown(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			s.open.start(ctx, t)
			must(t, s.private.scale(ctx, 1))
			return ctx
		}).
		Assess("brings its pods back, with what is on its disk", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			m := s.machine(t, node, "reboot of a node")
			must(t, m.PowerOff(ctx))
			// One that Kubernetes waits for, and one that it does not.
			must(t, s.client.CoreV1().Pods(namespace).Delete(ctx, "leaving", metav1.DeleteOptions{}))
			now := int64(0)
			must(t, s.client.CoreV1().Pods(namespace).Delete(ctx, "vanished", metav1.DeleteOptions{GracePeriodSeconds: &now}))
			began := time.Now()
			must(t, m.PowerOn(ctx))
			s.waitNodeReady(ctx, t, node, began)
			must(t, s.awaitDriver(ctx))
			mustAwait(ctx, t, slowPatience, "pod "+bare.String()+" to be started again", func(ctx context.Context) (bool, string, error) {
				p, err := s.client.CoreV1().Pods(namespace).Get(ctx, bare.name, metav1.GetOptions{})
				if err != nil {
					return false, "", err
				}
				return restarts(p) > restarts(once) && podReady(p), podState(p), nil
			})
			if p := bare.get(ctx, t); p.UID != once.UID {
				t.Errorf("pod %s is another one than before", bare)
			}
			bare.waitReading(ctx, t)
			if r := bare.waitMore(ctx, t); r.failed() > 0 {
				t.Errorf("the reader in pod %s fails after the reboot: %v", bare, r)
			}
			s.checkVolume(ctx, t, bare, dir)
			s.waitDeployed(ctx, t, namespace, "deployed", replicas)
			for _, p := range s.pods(ctx, t, namespace, "app=deployed") {
				if p.DeletionTimestamp == nil {
					s.checkVolume(ctx, t, s.pod(namespace, p.Name), dir)
				}
			}
			return ctx
		}).
		Assess("fetches nothing, and leaves nothing of pods that were deleted meanwhile", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			must(t, s.pod(namespace, "leaving").remove(ctx))
			s.agent(node).waitGone(ctx, t, leaving, vanished)
			s.agent(node).waitReconciled(ctx, t)
			m, err := s.driverMetrics(ctx, node)
			must(t, err)
			for name, value := range m {
				if strings.HasPrefix(name, "puzzlefs_fetched_bytes_total") && value > 0 {
					t.Errorf("the driver says %s %g after the reboot: the images were on the node, and no registry was there", name, value)
				}
			}
			t.Logf("restores: mounted %g, failed %g", m[`puzzlefs_restores_total{result="mounted"}`], m[`puzzlefs_restores_total{result="failed"}`])
			if n := m[`puzzlefs_restores_total{result="failed"}`]; n > 0 {
				t.Errorf("the driver could not mount %g volumes again", n)
			}
			return ctx
		}).
		Assess("does not reach pods elsewhere", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			if elsewhere == nil {
				t.Log("there is no other node")
				return ctx
			}
			if r := elsewhere.waitMore(ctx, t); r.failed() > 0 {
				t.Errorf("the reader in pod %s failed: %v", elsewhere, r)
			}
			return ctx
		}).
		Feature()
}

// deploy makes a Deployment of pods like this one, with the label app of its name. It ends with its namespace.
func (s *suite) deploy(ctx context.Context, t testing.TB, name string, replicas int32, p *corev1.Pod) {
	t.Helper()
	labels := map[string]string{"app": name}
	_, err := s.client.AppsV1().Deployments(p.Namespace).Create(ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: name},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: p.Spec},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create deployment %s/%s: %v", p.Namespace, name, err)
	}
}

// waitDeployed waits until so many pods of a Deployment are ready and no others are there.
func (s *suite) waitDeployed(ctx context.Context, t testing.TB, namespace, name string, replicas int) {
	t.Helper()
	what := fmt.Sprintf("%d pods of deployment %s/%s", replicas, namespace, name)
	mustAwait(ctx, t, slowPatience, what, func(ctx context.Context) (bool, string, error) {
		list, err := s.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + name})
		if err != nil {
			return false, "", err
		}
		ready, states := 0, []string{}
		for i := range list.Items {
			if podReady(&list.Items[i]) {
				ready++
			}
			states = append(states, podState(&list.Items[i]))
		}
		return ready == replicas && len(list.Items) == replicas, strings.Join(states, "; "), nil
	})
}

// crashes is the feature of a driver that is killed again and again while pods come and go.
func (s *suite) crashes(node string) features.Feature {
	const (
		rounds = 8
		storm  = 6 // pods of a round
	)
	var (
		namespace string
		images    []image
		dirs      []string
	)
	name := func(round, i int) string { return fmt.Sprintf("pod-%d-%d", round, i) }
	return features.New("driver killed in the middle of its work").
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			s.driver(ctx, t)
			namespace = s.namespace(ctx, t, "storm", restrictedPods)
			for i := range rounds {
				dirs = append(dirs, s.contentTree(t, uint64(20+i), 4<<20))
				images = append(images, s.open.pushTree(ctx, t, dirs[i], fmt.Sprintf("node/storm:v%d", i)))
			}
			return ctx
		}).
		Assess("publishes what is to be there in the end", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			for round := range rounds {
				crash := s.agent(node).prepareCrash(ctx, t)
				for i := range storm {
					// Some with an image that must be fetched, some with those of the pods that go.
					img := images[max(0, round-i%3)]
					s.launch(ctx, t, on(node, s.reader(namespace, name(round, i), inline("data", img.attributes()))))
					if round > 0 {
						must(t, s.client.CoreV1().Pods(namespace).Delete(ctx, name(round-1, i), metav1.DeleteOptions{}))
					}
				}
				// Another moment of the work each time.
				select {
				case <-time.After(time.Duration(round) * 400 * time.Millisecond):
				case <-ctx.Done():
				}
				t.Logf("round %d: the driver left %v", round, crash())
			}
			for i := range images {
				s.launch(ctx, t, on(node, s.reader(namespace, name(rounds, i), inline("data", images[i].attributes()))))
			}
			for i := range images {
				s.checkVolume(ctx, t, s.pod(namespace, name(rounds, i)), dirs[i])
			}
			// Those that ran before the last crash have what is promised.
			names := s.pod(namespace, name(rounds, 0)).exec(ctx, t, "ls", "-A", "/data")
			for i := range storm {
				p := s.pod(namespace, name(rounds-1, i))
				p.waitReady(ctx, t)
				promised().checkDirectory(ctx, t, p, names)
			}
			s.agent(node).waitReconciled(ctx, t)
			return ctx
		}).
		Assess("leaves nothing", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			must(t, s.removeNamespace(ctx, namespace))
			s.agent(node).waitReconciled(ctx, t)
			s.waitMetrics(ctx, t, node, "there is no volume", func(m metrics) bool {
				return m[`puzzlefs_volumes{state="published"}`] == 0 && m[`puzzlefs_volumes{state="pending"}`] == 0 && m["puzzlefs_mounts"] == 0
			})
			return ctx
		}).
		Feature()
}
