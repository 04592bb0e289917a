package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// hostRoot is where an agent has the root of its node.
const hostRoot = "/host"

// startAgents runs a pod on every node that sees all of it: its files, its mounts, its processes.
func (s *suite) startAgents(ctx context.Context) error {
	yes, no, grace, slave := true, false, int64(1), corev1.MountPropagationHostToContainer
	labels := map[string]string{"app": "agent"}
	_, err := s.client.AppsV1().DaemonSets(suiteNamespace).Create(ctx, &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: suiteNamespace, Name: "agent"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{
				HostPID:                       true,
				AutomountServiceAccountToken:  &no,
				EnableServiceLinks:            &no,
				TerminationGracePeriodSeconds: &grace,
				NodeSelector:                  map[string]string{corev1.LabelOSStable: "linux"},
				Tolerations:                   []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
				Containers: []corev1.Container{{
					Name: "agent", Image: s.settings.tools.String(), ImagePullPolicy: corev1.PullIfNotPresent,
					Command:         []string{"sleep", "infinity"},
					SecurityContext: &corev1.SecurityContext{Privileged: &yes},
					VolumeMounts:    []corev1.VolumeMount{{Name: "root", MountPath: hostRoot, MountPropagation: &slave}},
				}},
				Volumes: []corev1.Volume{{Name: "root", VolumeSource: corev1.VolumeSource{
					HostPath: &corev1.HostPathVolumeSource{Path: "/"},
				}}},
			}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("create the agents: %w", err)
	}
	nodes, err := s.nodes(ctx)
	if err != nil {
		return err
	}
	for _, node := range nodes {
		if _, err := s.agent(node).pod(ctx); err != nil {
			return err
		}
		// What is left of a run that was ended.
		if _, err := s.agent(node).try(ctx, "rm", "-rf", hostRoot+registryFiles); err != nil {
			return err
		}
	}
	return nil
}

// agent is how the suite looks at a node.
type agent struct {
	s    *suite
	node string
}

// agent returns the agent of a node.
func (s *suite) agent(node string) *agent { return &agent{s: s, node: node} }

// pod waits for the agent's pod, of which there is another after the node was down, and returns its name.
func (a *agent) pod(ctx context.Context) (string, error) {
	var name string
	err := await(ctx, slowPatience, "the agent on "+a.node, func(ctx context.Context) (bool, string, error) {
		list, err := a.s.client.CoreV1().Pods(suiteNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app=agent"})
		if err != nil {
			return false, "", err
		}
		saw := "no pod"
		for i := range list.Items {
			if p := &list.Items[i]; p.Spec.NodeName == a.node {
				if podReady(p) {
					name = p.Name
					return true, "", nil
				}
				saw = podState(p)
			}
		}
		return false, saw, nil
	})
	return name, err
}

// try runs a command in the agent: as root, with the processes of the node, and its files below /host.
func (a *agent) try(ctx context.Context, command ...string) (string, error) {
	name, err := a.pod(ctx)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return a.s.execIn(ctx, suiteNamespace, name, "", nil, command...)
}

// run is try for commands that must not fail.
func (a *agent) run(ctx context.Context, t testing.TB, command ...string) string {
	t.Helper()
	out, err := a.try(ctx, command...)
	if err != nil {
		t.Fatalf("on %s: %v", a.node, err)
	}
	return out
}

// shell runs a script with sh -c.
func (a *agent) shell(ctx context.Context, t testing.TB, script string) string {
	t.Helper()
	return a.run(ctx, t, "sh", "-c", script)
}

// mount is a mount of a node, as checker prints it.
type mount struct {
	ID      int    `json:"id"`
	Parent  int    `json:"parent"`
	Device  string `json:"device"`     // MAJOR:MINOR: binds of one mount have the same
	Root    string `json:"root"`       // directory of the file system that is shown
	Point   string `json:"mountpoint"` // as the node names it
	Type    string `json:"fstype"`
	Source  string `json:"source"`
	Options string `json:"options"`
	Super   string `json:"superOptions"`
}

// mounts returns the mounts of the node's own mount namespace, without touching them.
func (a *agent) mounts(ctx context.Context, t testing.TB) []mount {
	t.Helper()
	// Not process 1: on nodes that are containers or namespaces it may be another one's. What is
	// mounted on the node later comes to the agent too, and goes with it.
	return a.mountsOf(ctx, t, "self", hostRoot)
}

// mountsOf returns the mounts that a process sees below a directory, named from there.
func (a *agent) mountsOf(ctx context.Context, t testing.TB, process, below string) []mount {
	t.Helper()
	args := []string{"checker", "mounts"}
	if process == "self" {
		// The process that runs checker has the agent's mounts.
		args = []string{"sh", "-c", `exec checker mounts --pid $$`}
	} else {
		args = append(args, "--pid", process)
	}
	var all, out []mount
	if err := json.Unmarshal([]byte(a.run(ctx, t, args...)), &all); err != nil {
		t.Fatalf("read the mounts of %s: %v", a.node, err)
	}
	for _, m := range all {
		if m.Point == below || strings.HasPrefix(m.Point, strings.TrimSuffix(below, "/")+"/") {
			m.Point = path.Join("/", strings.TrimPrefix(m.Point, below))
			out = append(out, m)
		}
	}
	return out
}

// fuseMounts returns the mounts of our file systems that the node has: the volumes of pods.
func (a *agent) fuseMounts(ctx context.Context, t testing.TB) []mount {
	t.Helper()
	return ours(a.mounts(ctx, t))
}

// driverMounts returns the mounts of our file systems that the driver on the node has: one for each image,
// below its state directory, and the volumes.
func (a *agent) driverMounts(ctx context.Context, t testing.TB) []mount {
	t.Helper()
	return ours(a.mountsOf(ctx, t, strconv.Itoa(a.driverPID(ctx, t)), "/"))
}

// fuseType is the type of our file systems in the mount table.
const fuseType = "fuse.puzzlefs"

func ours(all []mount) []mount {
	var out []mount
	for _, m := range all {
		if m.Type == fuseType {
			out = append(out, m)
		}
	}
	return out
}

// volumeDirs returns the directories of volumes of our driver that kubelet keeps on the node, whether
// anything is mounted there or not: PODUID/VOLUME.
func (a *agent) volumeDirs(ctx context.Context, t testing.TB) []string {
	t.Helper()
	root := hostRoot + a.s.settings.kubeletDir + "/pods"
	// One without kubelet's own file is half made or half removed, and may be ours.
	out := a.shell(ctx, t, fmt.Sprintf(`cd %s || exit
for d in */volumes/kubernetes.io~csi/*; do
	[ -d "$d" ] || continue
	if [ ! -e "$d/vol_data.json" ] || grep -q %s "$d/vol_data.json"; then echo "$d"; fi
done`, root, driverName))
	var dirs []string
	for _, line := range lines(out) {
		pod, rest, _ := strings.Cut(line, "/")
		dirs = append(dirs, pod+"/"+path.Base(rest))
	}
	return dirs
}

// stateFiles returns the paths below the driver's state directory on the node, relative to it and sorted.
// Mounts are not entered.
func (a *agent) stateFiles(ctx context.Context, t testing.TB) []string {
	t.Helper()
	dir := hostRoot + a.s.settings.stateDir
	return lines(a.shell(ctx, t, fmt.Sprintf(`[ ! -d %[1]s ] || { cd %[1]s && find . -xdev -mindepth 1 | sed 's|^\./||' | sort; }`, dir)))
}

// driverPID returns the process of the driver on the node.
func (a *agent) driverPID(ctx context.Context, t testing.TB) int {
	t.Helper()
	p := a.s.driverPod(ctx, t, a.node)
	for _, c := range p.Status.ContainerStatuses {
		_, id, found := strings.Cut(c.ContainerID, "://")
		if c.Name != "driver" || !found {
			continue
		}
		// By the container and not by the name: nodes of one machine may share their processes.
		out := a.shell(ctx, t, fmt.Sprintf(`grep -l %s /proc/[0-9]*/cgroup 2>/dev/null || true`, id))
		for _, file := range lines(out) {
			pid, err := strconv.Atoi(strings.Split(file, "/")[2])
			must(t, err)
			return pid
		}
	}
	t.Fatalf("find the driver's process on %s: %s", a.node, podState(p))
	return 0
}

// metric returns a metric of the driver on the node, the sum of its series that have these labels, in pairs
// of name and value.
func (a *agent) metric(ctx context.Context, t testing.TB, name string, labels ...string) float64 {
	t.Helper()
	return a.s.scrape(ctx, t, a.node).sum(t, name, labels...)
}

// killDriver kills the driver on the node as a crash would, and waits for kubelet to have started it
// again, and for it to be ready.
func (a *agent) killDriver(ctx context.Context, t testing.TB) {
	t.Helper()
	before := a.s.driverPod(ctx, t, a.node)
	a.run(ctx, t, "kill", "-9", strconv.Itoa(a.driverPID(ctx, t)))
	what := "the driver on " + a.node + " to be back"
	mustAwait(ctx, t, slowPatience, what, func(ctx context.Context) (bool, string, error) {
		now, err := a.s.client.CoreV1().Pods(before.Namespace).Get(ctx, before.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return false, "", stop(err)
		}
		if err != nil {
			return false, "", err
		}
		return restarts(now) > restarts(before) && podReady(now), podState(now), nil
	})
	must(t, a.s.awaitDriver(ctx))
}

func restarts(p *corev1.Pod) int32 {
	n := int32(0)
	for _, c := range p.Status.ContainerStatuses {
		n += c.RestartCount
	}
	return n
}

// waitClean waits until no volume of our driver is left on the node: no mount and no directory of
// kubelet's. Pods are gone from the API server a little earlier.
func (a *agent) waitClean(ctx context.Context, t testing.TB) {
	t.Helper()
	mustAwait(ctx, t, patience, "node "+a.node+" to have no volumes left", func(ctx context.Context) (bool, string, error) {
		mounts, dirs := a.fuseMounts(ctx, t), a.volumeDirs(ctx, t)
		return len(mounts) == 0 && len(dirs) == 0, fmt.Sprintf("mounts %v, directories %v", mounts, dirs), nil
	})
}

// lines splits text into its lines; nothing has none.
func lines(text string) []string {
	text = strings.TrimSuffix(text, "\n")
	if text == "" {
		return nil
	}
	return strings.Split(text, "\n")
}
