package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// nodeState is what a node has on account of volumes: what it should have follows from the pods, what it has
// is in the mount tables and on its disk.
type nodeState struct {
	// Directories are kubelet's, PODUID/VOLUME; Mounted are those of them where one of our file systems
	// is, with its image.
	Directories []string
	Mounted     []string
	// Recorded are the targets of the driver's records, Odd what else is beside them: half done, or damaged.
	Recorded []string
	Odd      []string
	// Shared are the driver's mounts, one for each image, Points the directories for them, and Pinned the
	// images that it keeps.
	Shared []string
	Points []string
	Pinned []string
}

// stateWanted returns what a node is to have for the pods that are there.
func (s *suite) stateWanted(ctx context.Context, node string) (nodeState, error) {
	var want nodeState
	pods, err := s.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
	if err != nil {
		return want, fmt.Errorf("list the pods of %s: %w", node, err)
	}
	images := map[string]bool{}
	for _, p := range pods.Items {
		for _, v := range p.Spec.Volumes {
			if v.CSI == nil || v.CSI.Driver != driverName {
				continue
			}
			dir, digest := string(p.UID)+"/"+v.Name, v.CSI.VolumeAttributes["digest"]
			want.Directories = append(want.Directories, dir)
			want.Mounted = append(want.Mounted, dir+" "+digest)
			want.Recorded = append(want.Recorded, s.target(p.UID, v.Name))
			images[digest] = true
		}
	}
	for _, list := range [][]string{want.Directories, want.Mounted, want.Recorded} {
		slices.Sort(list)
	}
	for _, digest := range slices.Sorted(maps.Keys(images)) {
		_, hex, _ := strings.Cut(digest, ":")
		want.Shared = append(want.Shared, digest)
		want.Points = append(want.Points, hex)
		want.Pinned = append(want.Pinned, hex)
	}
	return want, nil
}

// target is where kubelet wants a volume of the pod with the UID.
func (s *suite) target(pod types.UID, volume string) string {
	return fmt.Sprintf("%s/pods/%s/volumes/kubernetes.io~csi/%s/mount", s.settings.kubeletDir, pod, volume)
}

// state returns what the node has.
func (a *agent) state(ctx context.Context, t testing.TB) nodeState {
	t.Helper()
	var have nodeState
	have.Directories = a.volumeDirs(ctx, t)
	slices.Sort(have.Directories)
	for _, m := range a.fuseMounts(ctx, t) {
		place := m.Point // one that kubelet did not ask for
		parts := strings.Split(place, "/")
		if n := len(parts); n >= 5 && place == a.s.target(types.UID(parts[n-5]), parts[n-2]) {
			place = parts[n-5] + "/" + parts[n-2]
		}
		have.Mounted = append(have.Mounted, place+" "+m.Source)
	}
	slices.Sort(have.Mounted)
	for _, m := range a.driverMounts(ctx, t) {
		if path.Dir(m.Point) == a.s.settings.stateDir+"/mounts" {
			have.Shared = append(have.Shared, m.Source)
		}
	}
	slices.Sort(have.Shared)
	for _, file := range a.stateFiles(ctx, t) {
		dir, name := path.Split(file)
		switch dir {
		case "volumes/":
			if path.Ext(name) != ".json" {
				have.Odd = append(have.Odd, file)
			}
		case "mounts/":
			have.Points = append(have.Points, name)
		case "pins/":
			if digest, pin, found := strings.Cut(name, "."); found && digest != "" {
				have.Pinned = append(have.Pinned, digest)
				if !strings.HasPrefix(pin, "mount-") {
					have.Odd = append(have.Odd, file)
				}
			}
		}
	}
	have.Recorded = a.records(ctx, t)
	return have
}

// records returns the targets of the driver's records.
func (a *agent) records(ctx context.Context, t testing.TB) []string {
	t.Helper()
	dir := hostRoot + a.s.settings.stateDir + "/volumes"
	var targets []string
	decoder := json.NewDecoder(strings.NewReader(a.shell(ctx, t, fmt.Sprintf(`cat %s/*.json 2>/dev/null || true`, dir))))
	for decoder.More() {
		var r struct{ RealPath string }
		if err := decoder.Decode(&r); err != nil {
			t.Fatalf("read the driver's records on %s: %v", a.node, err)
		}
		targets = append(targets, r.RealPath)
	}
	slices.Sort(targets)
	return targets
}

// waitReconciled waits until the node has what its pods want and nothing else: no mount, no directory, no
// record and no pin too few or too many. Every volume answers then.
func (a *agent) waitReconciled(ctx context.Context, t testing.TB) {
	t.Helper()
	mustAwait(ctx, t, slowPatience, "node "+a.node+" to have what its pods want and no more", func(ctx context.Context) (bool, string, error) {
		want, err := a.s.stateWanted(ctx, a.node)
		if err != nil {
			return false, "", err
		}
		diff := cmp.Diff(want, a.state(ctx, t))
		return diff == "", "(- wanted, + there)\n" + diff, nil
	})
	for _, m := range a.fuseMounts(ctx, t) {
		if out, err := a.try(ctx, "stat", "-f", hostRoot+m.Point); err != nil {
			t.Errorf("a volume on %s does not answer: %s: %v: %s", a.node, m.Point, err, out)
		}
	}
}

// waitGone waits until the node has nothing left of pods that were there.
func (a *agent) waitGone(ctx context.Context, t testing.TB, gone ...*corev1.Pod) {
	t.Helper()
	mustAwait(ctx, t, patience, "node "+a.node+" to have nothing left of deleted pods", func(ctx context.Context) (bool, string, error) {
		left := a.shell(ctx, t, fmt.Sprintf("ls %s%s/pods", hostRoot, a.s.settings.kubeletDir))
		for _, p := range gone {
			if strings.Contains(left, string(p.UID)) {
				return false, p.Name + " is still in " + a.s.settings.kubeletDir + "/pods", nil
			}
		}
		return true, "", nil
	})
}

// prepareCrash returns a function that kills the driver on the node, at once, and says what the driver has left
// on its disk: volumes that are published and half published, images that are held for a pull and mounted. Another
// pod takes its place: kubelet lets a container that ends often wait longer each time, up to minutes, but not a
// new one.
func (a *agent) prepareCrash(ctx context.Context, t testing.TB) func() string {
	t.Helper()
	before, pid := a.s.driverPod(ctx, t, a.node), a.driverPID(ctx, t)
	return func() string {
		t.Helper()
		left := a.shell(ctx, t, fmt.Sprintf("kill -9 %d && cd %s%s && ls volumes pins", pid, hostRoot, a.s.settings.stateDir))
		now := int64(0)
		must(t, a.s.client.CoreV1().Pods(before.Namespace).Delete(ctx, before.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}))
		must(t, a.s.awaitDriver(ctx))
		return fmt.Sprintf("%d volumes and %d half published, %d holds and %d pins of mounts", strings.Count(left, ".json"),
			strings.Count(left, ".pending"), strings.Count(left, ".hold-"), strings.Count(left, ".mount-"))
	}
}

// metrics are the driver's, by their names with all labels, as in puzzlefs_volumes{state="published"}.
type metrics map[string]float64

// driverMetrics scrapes the driver on a node.
func (s *suite) driverMetrics(ctx context.Context, node string) (metrics, error) {
	pods, err := s.client.CoreV1().Pods(s.release.namespace).List(ctx, metav1.ListOptions{
		LabelSelector: driverSelector, FieldSelector: "spec.nodeName=" + node,
	})
	if err != nil {
		return nil, err
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp != nil {
			continue
		}
		families, err := s.scrapePod(ctx, &p)
		if err != nil {
			return nil, err
		}
		return families.flat(), nil
	}
	return nil, fmt.Errorf("scrape the driver on %s: it has none", node)
}

// flat returns counters and gauges with all their labels.
func (m families) flat() metrics {
	flat := metrics{}
	for name, family := range m {
		for _, series := range family.GetMetric() {
			var labels []string
			for _, l := range series.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			key := name
			if len(labels) > 0 {
				key += "{" + strings.Join(labels, ",") + "}"
			}
			flat[key] = series.GetCounter().GetValue() + series.GetGauge().GetValue()
		}
	}
	return flat
}

// waitMetrics scrapes the driver on a node until its metrics are as they should be.
func (s *suite) waitMetrics(ctx context.Context, t testing.TB, node, what string, good func(metrics) bool) metrics {
	t.Helper()
	var now metrics
	mustAwait(ctx, t, patience, "metrics of the driver on "+node+" that say "+what, func(ctx context.Context) (bool, string, error) {
		var err error
		if now, err = s.driverMetrics(ctx, node); err != nil {
			return false, "", err
		}
		saw := ""
		for _, name := range slices.Sorted(maps.Keys(now)) {
			if strings.HasPrefix(name, "puzzlefs_") && !strings.Contains(name, "_bucket") {
				saw += fmt.Sprintf("%s %g; ", name, now[name])
			}
		}
		return good(now), saw, nil
	})
	return now
}
