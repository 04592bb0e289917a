package e2e_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/tree"
)

// testTakeover tests what survives when the driver's process ends and another takes its place: promise_test.go
// says what that is.
func (s *suite) testTakeover(t *testing.T) {
	s.Test(t,
		s.disrupted("driver killed", func(ctx context.Context, t *testing.T, nodes []string) {
			s.agent(nodes[0]).killDriver(ctx, t)
		}),
		s.disrupted("driver pod deleted", func(ctx context.Context, t *testing.T, _ []string) {
			s.replaceDriver(ctx, t)
		}),
		s.disrupted("driver upgraded, OnDelete", func(ctx context.Context, t *testing.T, nodes []string) {
			s.roll(ctx, t, nodes, "OnDelete")
		}),
		s.disrupted("driver rolled to another build, RollingUpdate", func(ctx context.Context, t *testing.T, nodes []string) {
			s.roll(ctx, t, nodes, "RollingUpdate")
		}),
		s.driverAway(),
	)
}

// roll is helm upgrade to the build of the driver that is not installed, and returns when all drivers are of it.
func (s *suite) roll(ctx context.Context, t *testing.T, nodes []string, strategy appsv1.DaemonSetUpdateStrategyType) {
	t.Helper()
	set, err := s.driverSet(ctx)
	must(t, err)
	build := s.settings.next
	if set.Spec.Template.Spec.Containers[0].Image == build.String() {
		build = s.settings.driver
	}
	before, pods := s.builds(ctx, t, nodes), s.driverPods(ctx, t)
	s.release.upgrade(ctx, t, s.values(map[string]any{
		"image":     map[string]any{"repository": build.repository, "tag": build.tag},
		"daemonSet": map[string]any{"updateStrategy": map[string]any{"type": string(strategy)}},
	}))
	if strategy == appsv1.OnDeleteDaemonSetStrategyType {
		s.waitRollout(ctx, t, strategy, 0)
		if diff := cmp.Diff(pods, s.driverPods(ctx, t)); diff != "" {
			t.Errorf("helm upgrade replaced drivers that nobody deleted (- before, + after):\n%s", diff)
		}
		s.replaceDriver(ctx, t)
	}
	s.waitRollout(ctx, t, strategy, len(nodes))
	must(t, s.awaitDriver(ctx))
	after := s.builds(ctx, t, nodes)
	t.Logf("the drivers were %v and are %v", before, after)
	for _, node := range nodes {
		if before[node] == after[node] {
			t.Errorf("the driver on %s is still of the build %s", node, before[node])
		}
	}
}

// builds returns which build of the driver says on which node that it runs there.
func (s *suite) builds(ctx context.Context, t testing.TB, nodes []string) map[string]string {
	t.Helper()
	builds := map[string]string{}
	for _, node := range nodes {
		m, err := s.driverMetrics(ctx, node)
		must(t, err)
		for name := range m {
			if strings.HasPrefix(name, "puzzlefs_build_info") {
				builds[node] = name
			}
		}
	}
	return builds
}

// disrupted is the feature of one way for the driver to end, which disrupt is: it returns when the driver is back.
// There are a pod that reads and one that does nothing on every node.
func (s *suite) disrupted(name string, disrupt func(ctx context.Context, t *testing.T, nodes []string)) features.Feature {
	var (
		namespace string
		nodes     []string
		dir       string
		img       image
		before    map[string]types.UID // the driver's pods by node
		busy      = map[string]*pod{}
		idle      = map[string]*pod{}
		names     string // in the volume
	)
	return features.New(name).
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			if s.release.deployed == "" {
				s.driver(ctx, t) // or what the feature before this one has left, so that an upgrade is one
			}
			must(t, s.awaitDriver(ctx))
			namespace = s.namespace(ctx, t, "takeover", restrictedPods)
			var err error
			nodes, err = s.nodes(ctx)
			must(t, err)
			dir = s.contentTree(t, 7, 8<<20)
			img = s.open.pushTree(ctx, t, dir, "takeover/content:v1")
			for _, node := range nodes {
				busy[node] = s.start(ctx, t, s.steady(namespace, "busy-"+node, node, img))
				idle[node] = s.start(ctx, t, on(node, s.reader(namespace, "idle-"+node, inline("data", img.attributes()))))
			}
			for _, node := range nodes {
				busy[node].waitReading(ctx, t)
				idle[node].waitReady(ctx, t)
				names = idle[node].exec(ctx, t, "ls", "-A", "/data")
			}
			before = s.driverPods(ctx, t)
			return ctx
		}).
		Assess("ends no reader otherwise than promised", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			disrupt(ctx, t, nodes)
			t.Logf("driver pods before: %v, now: %v", before, s.driverPods(ctx, t))
			for _, node := range nodes {
				promised().checkReader(t, "the reader on "+node, busy[node].waitMore(ctx, t))
				promised().checkDirectory(ctx, t, idle[node], names)
				for _, p := range []*pod{busy[node], idle[node]} {
					if n := restarts(p.get(ctx, t)); n > 0 {
						t.Errorf("the container of pod %s was started again, %d times: nobody but kubelet could, and it has no reason", p, n)
					}
				}
			}
			return ctx
		}).
		Assess("leaves nodes with the volumes of their pods, mounted again", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			for _, node := range nodes {
				s.agent(node).waitReconciled(ctx, t)
				m := s.waitMetrics(ctx, t, node, "two volumes are published", func(m metrics) bool {
					return m[`puzzlefs_volumes{state="published"}`] == 2 && m[`puzzlefs_volumes{state="pending"}`] == 0
				})
				if n := m[`puzzlefs_restores_total{result="failed"}`]; n != 0 {
					t.Errorf("the driver on %s could not mount %g volumes again", node, n)
				}
			}
			return ctx
		}).
		Assess("gives containers that start again, and new pods, a volume that works", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			for _, node := range nodes {
				s.start(ctx, t, on(node, s.reader(namespace, "new-"+node, inline("data", img.attributes()))))
			}
			for _, node := range nodes {
				promised().checkReader(t, "the reader on "+node+", in the end", busy[node].endReading(ctx, t))
				busy[node].waitReading(ctx, t)
				if r := busy[node].waitMore(ctx, t); r.failed() > 0 {
					t.Errorf("the reader on %s, started again, fails: %v", node, r)
				}
				for _, name := range []string{"busy-", "new-"} {
					s.checkVolume(ctx, t, s.pod(namespace, name+node), dir)
				}
			}
			return ctx
		}).
		Assess("leaves nothing of pods that go", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			must(t, s.removeNamespace(ctx, namespace))
			for _, node := range nodes {
				s.agent(node).waitReconciled(ctx, t)
			}
			return ctx
		}).
		Feature()
}

// checkVolume waits for a pod, and compares what it sees in its volume with what the image was made of.
func (s *suite) checkVolume(ctx context.Context, t testing.TB, p *pod, dir string) {
	t.Helper()
	p.waitReady(ctx, t)
	want, err := tree.Describe(dir)
	must(t, err)
	p.sees(ctx, t, "", "/data", want)
}

// driverPods returns the driver's pods by node.
func (s *suite) driverPods(ctx context.Context, t testing.TB) map[string]types.UID {
	t.Helper()
	pods := map[string]types.UID{}
	for _, p := range s.pods(ctx, t, s.release.namespace, driverSelector) {
		pods[p.Spec.NodeName] = p.UID
	}
	return pods
}

// driverSet returns the driver's DaemonSet.
func (s *suite) driverSet(ctx context.Context) (*appsv1.DaemonSet, error) {
	sets, err := s.client.AppsV1().DaemonSets(s.release.namespace).List(ctx, metav1.ListOptions{LabelSelector: driverSelector})
	if err != nil {
		return nil, err
	}
	if len(sets.Items) != 1 {
		return nil, fmt.Errorf("%d DaemonSets of the driver", len(sets.Items))
	}
	return &sets.Items[0], nil
}

// waitRollout is kubectl rollout status: it waits until the controller has seen the DaemonSet as it is now, with
// the update strategy, and so many of its pods are of the newest template and available.
func (s *suite) waitRollout(ctx context.Context, t testing.TB, strategy appsv1.DaemonSetUpdateStrategyType, updated int) {
	t.Helper()
	what := fmt.Sprintf("the DaemonSet of the driver to have %d new pods", updated)
	mustAwait(ctx, t, slowPatience, what, func(ctx context.Context) (bool, string, error) {
		set, err := s.driverSet(ctx)
		if err != nil {
			return false, "", err
		}
		if got := set.Spec.UpdateStrategy.Type; got != strategy {
			return false, "", stop(fmt.Errorf("its update strategy is %s, want %s", got, strategy))
		}
		status := set.Status
		return status.ObservedGeneration >= set.Generation && int(status.UpdatedNumberScheduled) == updated &&
			status.NumberAvailable == status.DesiredNumberScheduled, fmt.Sprintf("%+v", status), nil
	})
}

// nowhere is the change of values with which no node has a driver.
func (s *suite) nowhere() map[string]any {
	return map[string]any{"nodeSelector": map[string]any{suiteLabel: "nowhere"}}
}

// driverAway is the feature of a driver that is not there for a while, and of what kubelet does meanwhile.
func (s *suite) driverAway() features.Feature {
	var (
		namespace, node, dir, names string
		img                         image
		busy, idle, leaving, next   *pod
		left                        *corev1.Pod
	)
	return features.New("driver away").
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			s.driver(ctx, t)
			namespace = s.namespace(ctx, t, "away", restrictedPods)
			nodes, err := s.nodes(ctx)
			must(t, err)
			node = nodes[len(nodes)-1]
			dir = s.contentTree(t, 8, 8<<20)
			img = s.open.pushTree(ctx, t, dir, "takeover/away:v1")
			busy = s.start(ctx, t, s.steady(namespace, "busy", node, img))
			idle = s.start(ctx, t, on(node, s.reader(namespace, "idle", inline("data", img.attributes()))))
			leaving = s.start(ctx, t, on(node, s.reader(namespace, "leaving", inline("data", img.attributes()))))
			busy.waitReading(ctx, t)
			idle.waitReady(ctx, t)
			leaving.waitReady(ctx, t)
			names = idle.exec(ctx, t, "ls", "-A", "/data")
			return ctx
		}).
		Assess("leaves volumes where they are when it ends", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			before := s.agent(node).fuseMounts(ctx, t)
			s.release.upgrade(ctx, t, s.values(s.nowhere()))
			mustAwait(ctx, t, patience, "the end of the driver", func(ctx context.Context) (bool, string, error) {
				pods := s.driverPods(ctx, t)
				return len(pods) == 0, fmt.Sprint(slices.Collect(maps.Keys(pods))), nil
			})
			if after := s.agent(node).fuseMounts(ctx, t); len(after) != len(before) || len(after) != 3 {
				t.Errorf("%d volumes were mounted on %s and %d are, without the driver; want 3: %v", len(before), node, len(after), after)
			}
			promised().checkReader(t, "the reader", busy.waitMore(ctx, t))
			promised().checkDirectory(ctx, t, idle, names)
			return ctx
		}).
		Assess("lets pods wait that come and go", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			left = leaving.get(ctx, t)
			must(t, s.client.CoreV1().Pods(namespace).Delete(ctx, "leaving", metav1.DeleteOptions{}))
			next = s.launch(ctx, t, on(node, s.reader(namespace, "next", inline("data", img.attributes()))))
			e := next.waitEvent(ctx, t, "FailedMount", "csi\\.puzzlefs\\.io")
			t.Logf("kubelet says of a new pod: %s", e.Message)
			mustAwait(ctx, t, patience, "the containers of the deleted pod to end", func(ctx context.Context) (bool, string, error) {
				out, err := s.agent(node).try(ctx, "sh", "-c", "grep -l "+string(left.UID)+" /proc/[0-9]*/cgroup 2>/dev/null || true")
				return err == nil && out == "", out, err
			})
			if !slices.Contains(s.agent(node).volumeDirs(ctx, t), string(left.UID)+"/data") {
				t.Errorf("the volume of the deleted pod is gone from %s though nobody could unpublish it", node)
			}
			if p := next.get(ctx, t); podReady(p) {
				t.Errorf("pod %s started without a driver: %s", next, podState(p))
			}
			return ctx
		}).
		Assess("puts all right when it is back", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			s.release.upgrade(ctx, t, s.values())
			must(t, s.awaitDriver(ctx))
			must(t, leaving.remove(ctx))
			s.agent(node).waitGone(ctx, t, left)
			s.checkVolume(ctx, t, next, dir)
			promised().checkReader(t, "the reader", busy.waitMore(ctx, t))
			promised().checkReader(t, "the reader, in the end", busy.endReading(ctx, t))
			s.checkVolume(ctx, t, busy, dir)
			s.agent(node).waitReconciled(ctx, t)
			return ctx
		}).
		Feature()
}
