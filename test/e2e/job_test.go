package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// exampleJob is example for a Job. It asks for less of the CPU than the example does, so that several find room
// on a small node, and gets what docs/building.md has people add for registries of their own, which
// registryHosts has made.
func (s *suite) exampleJob(t testing.TB, file string, edits map[string]string) *batchv1.Job {
	t.Helper()
	j := new(batchv1.Job)
	if err := yaml.UnmarshalStrict(example(t, file, edits), j); err != nil {
		t.Fatalf("read examples/%s: %v", file, err)
	}
	pod := &j.Spec.Template.Spec
	c := &pod.Containers[0]
	c.Resources.Requests[corev1.ResourceCPU] = resource.MustParse("10m")
	c.Args = append(c.Args, "--certs-dir=/certs")
	c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "hosts", MountPath: "/certs", ReadOnly: true})
	pod.Volumes = append(pod.Volumes, corev1.Volume{Name: "hosts", VolumeSource: corev1.VolumeSource{
		ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: "registry-hosts"},
			Items: []corev1.KeyToPath{
				{Key: "open.toml", Path: s.open.host() + "/hosts.toml"},
				{Key: "private.toml", Path: s.private.host() + "/hosts.toml"},
				{Key: "private.crt", Path: s.private.host() + "/ca.crt"},
			},
		},
	}})
	return j
}

// registryHosts makes the ConfigMap that describes both registries, for the Jobs of a namespace.
func (s *suite) registryHosts(ctx context.Context, t testing.TB, namespace string) {
	t.Helper()
	_, err := s.client.CoreV1().ConfigMaps(namespace).Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "registry-hosts"},
		Data: map[string]string{
			"open.toml":    s.open.hostsToml(),
			"private.toml": s.private.hostsToml(),
			"private.crt":  string(s.private.ca),
		},
	}, metav1.CreateOptions{})
	must(t, err)
}

// job is a Job in the cluster that builds an image.
type job struct {
	s               *suite
	namespace, name string
}

// startJob starts a Job. It goes with its namespace.
func (s *suite) startJob(ctx context.Context, t testing.TB, namespace string, j *batchv1.Job) *job {
	t.Helper()
	made, err := s.client.BatchV1().Jobs(namespace).Create(ctx, j, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create Job %s/%s: %v", namespace, j.Name, err)
	}
	return &job{s: s, namespace: namespace, name: made.Name}
}

func (j *job) String() string { return j.namespace + "/" + j.name }

// ended waits until a container of the Job has ended, and returns how. An attempt of a Job that fails is
// not waited out: others follow it.
func (j *job) ended(ctx context.Context, t testing.TB) *corev1.ContainerStateTerminated {
	t.Helper()
	var state *corev1.ContainerStateTerminated
	mustAwait(ctx, t, slowPatience, "Job "+j.String()+" to end", func(ctx context.Context) (bool, string, error) {
		list, err := j.s.client.CoreV1().Pods(j.namespace).List(ctx, metav1.ListOptions{LabelSelector: "batch.kubernetes.io/job-name=" + j.name})
		if err != nil {
			return false, "", err
		}
		saw := "no pod"
		for i := range list.Items {
			p := &list.Items[i]
			saw = podState(p) + "\n" + j.s.pod(p.Namespace, p.Name).eventsText(ctx)
			for _, c := range p.Status.ContainerStatuses {
				if c.State.Terminated != nil {
					state = c.State.Terminated
					return true, "", nil
				}
			}
		}
		return false, saw, nil
	})
	return state
}

// buildResult is what docs/building.md says is in the termination message.
type buildResult struct {
	Reference   string  `json:"reference"`
	Digest      string  `json:"digest"`
	Verity      string  `json:"verity"`
	Inodes      int64   `json:"inodes"`
	Bytes       int64   `json:"bytes"`
	StoredBytes int64   `json:"storedBytes"`
	NewBytes    int64   `json:"newBytes"`
	Seconds     float64 `json:"seconds"`
}

// result waits for the Job's success, and reads its termination message: what is documented, and
// nothing else.
func (j *job) result(ctx context.Context, t testing.TB) buildResult {
	t.Helper()
	state := j.ended(ctx, t)
	if state.ExitCode != 0 {
		t.Fatalf("Job %s ended with %d: %s", j, state.ExitCode, state.Message)
	}
	var r buildResult
	decoder := json.NewDecoder(strings.NewReader(state.Message))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&r); err != nil {
		t.Fatalf("read termination message of Job %s: %v: %s", j, err, state.Message)
	}
	// All fields, in their order, and one line.
	var back bytes.Buffer
	must(t, json.NewEncoder(&back).Encode(r))
	if back.String() != state.Message {
		t.Errorf("the termination message of Job %s is %q, want %q", j, state.Message, back.String())
	}
	return r
}

// failure waits for the Job's failure and returns its termination message.
func (j *job) failure(ctx context.Context, t testing.TB) string {
	t.Helper()
	state := j.ended(ctx, t)
	if state.ExitCode != 1 {
		t.Errorf("Job %s ended with %d, want 1", j, state.ExitCode)
	}
	return state.Message
}

// image is the image that was pushed as ref, as pods name it.
func (r buildResult) image(t testing.TB, ref string) image {
	t.Helper()
	if r.Reference != ref+"@"+r.Digest || !strings.HasPrefix(r.Digest, "sha256:") || !strings.HasPrefix(r.Verity, "verity:") {
		t.Errorf("the result of the build is %+v, want the reference %s@DIGEST, a digest and a verity digest", r, ref)
	}
	return image{Ref: ref, Digest: r.Digest, Verity: r.Verity}
}

// claimDirectory makes a directory on a node, fills it by a shell script that runs in it as root, and gives
// the namespace a claim to it. Everything goes with the test.
func (s *suite) claimDirectory(ctx context.Context, t *testing.T, namespace, name, node, script string) {
	t.Helper()
	dir := fmt.Sprintf("%s/sources/%s", registryFiles, namespace)
	a := s.agent(node)
	a.shell(ctx, t, fmt.Sprintf("mkdir -p %[1]s && cd %[1]s && chmod 755 . && %[2]s", hostRoot+dir, script))
	volume := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: namespace, Labels: map[string]string{suiteLabel: "true"}},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")},
			AccessModes:                   []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			ClaimRef:                      &corev1.ObjectReference{Namespace: namespace, Name: name},
			PersistentVolumeSource:        corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: dir}},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{node}}},
			}}}},
		},
	}
	_, err := s.client.CoreV1().PersistentVolumes().Create(ctx, volume, metav1.CreateOptions{})
	must(t, err)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		if err := s.client.CoreV1().PersistentVolumes().Delete(ctx, volume.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		if _, err := a.try(ctx, "rm", "-rf", hostRoot+dir); err != nil {
			t.Error(err)
		}
	})
	none := ""
	_, err = s.client.CoreV1().PersistentVolumeClaims(namespace).Create(ctx, &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &none, VolumeName: volume.Name,
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}},
		},
	}, metav1.CreateOptions{})
	must(t, err)
}

// claimed is a volume of a claim, read-only.
func claimed(name, claim string) corev1.Volume {
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
		PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim, ReadOnly: true},
	}}
}
