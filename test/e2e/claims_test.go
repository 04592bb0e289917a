package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"
	"sigs.k8s.io/yaml"
)

// testClaims tests the files of examples/ that are for pods, PersistentVolumes, and a Deployment that is
// rolled to another image.
func (s *suite) testClaims(t *testing.T) {
	c := &claims{s: s}
	s.Test(t,
		features.New("examples").
			Setup(c.prepare).
			Assess("do what they say", c.podExamples).
			Feature(),
		features.New("a PersistentVolume").
			Setup(c.prepare).
			Assess("is read by many pods on all nodes", c.manyReaders).
			Feature(),
		features.New("a Deployment").
			Setup(c.prepare).
			Assess("rolls to another image, pod by pod", c.rollout).
			Feature())
}

// claims is what the steps of this part share.
type claims struct {
	s         *suite
	namespace string
}

func (c *claims) prepare(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	c.s.driver(ctx, t)
	c.namespace = c.s.namespace(ctx, t, "claims", restrictedPods)
	nodes, err := c.s.nodes(ctx)
	must(t, err)
	for _, node := range nodes {
		c.s.agent(node).waitClean(ctx, t)
	}
	return ctx
}

// sitePages is how many files the image of a site has, all with the same text.
const sitePages = 40

// pushSite pushes an image of which every file says which version it is.
func (c *claims) pushSite(ctx context.Context, t *testing.T, version string) image {
	t.Helper()
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755)) // pods of any user read it
	for i := range sitePages {
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("page-%02d", i)), []byte(version+"\n"), 0o644))
	}
	return c.s.open.pushTree(ctx, t, dir, "site:"+version)
}

// rollout rolls the Deployment of examples/deployment.yaml. A container beside the server reads all the time, and
// ends when what it reads changes: kubelet tells that by its restarts.
func (c *claims) rollout(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s := c.s
	v1, v2 := c.pushSite(ctx, t, "v1"), c.pushSite(ctx, t, "v2")
	d := new(appsv1.Deployment)
	text := example(t, "deployment.yaml", map[string]string{exampleSite: v1.Ref, exampleDigest: v1.Digest})
	must(t, yaml.UnmarshalStrict(text, d))
	spec := &d.Spec.Template.Spec
	watcher := *spec.Containers[0].DeepCopy()
	watcher.Name, watcher.Ports, watcher.ReadinessProbe = "watcher", nil, nil
	watcher.Command = []string{"sh", "-c", `first=$(cat /site/page-00)
while [ "$(cat /site/page-* | sort | uniq -c | tr -s ' ')" = " $0 $first" ]; do sleep 1; done
cat /site/page-* | sort | uniq -c > /dev/termination-log
exit 1`, fmt.Sprint(sitePages)}
	spec.Containers = append(spec.Containers, watcher)
	grace := int64(1)
	spec.TerminationGracePeriodSeconds = &grace
	deployments := s.client.AppsV1().Deployments(c.namespace)
	d, err := deployments.Create(ctx, d, metav1.CreateOptions{})
	must(t, err)
	c.awaitRolled(ctx, t, d.Name)
	c.allRead(ctx, t, "v1")

	rolling, cancel := context.WithCancel(ctx)
	defer cancel()
	least := *d.Spec.Replicas - d.Spec.Strategy.RollingUpdate.MaxUnavailable.IntVal
	watched := c.watchRollout(rolling, t, d.Name, least)
	c.setImage(ctx, t, d.Name, v2)
	c.awaitRolled(ctx, t, d.Name)
	cancel()
	if err := <-watched; err != nil {
		t.Error(err)
	}
	c.allRead(ctx, t, "v2")

	nodes, err := s.nodes(ctx)
	must(t, err)
	for _, node := range nodes {
		c.awaitNoImage(ctx, t, node, v1)
	}
	must(t, deployments.Delete(ctx, d.Name, metav1.DeleteOptions{}))
	for _, node := range nodes {
		s.agent(node).waitClean(ctx, t)
	}
	return ctx
}

// setImage gives the pods of the Deployment another image, as kubectl edit does.
func (c *claims) setImage(ctx context.Context, t *testing.T, name string, img image) {
	t.Helper()
	deployments := c.s.client.AppsV1().Deployments(c.namespace)
	mustAwait(ctx, t, patience, "the Deployment to take another image", func(ctx context.Context) (bool, string, error) {
		d, err := deployments.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, "", err
		}
		d.Spec.Template.Spec.Volumes[0].CSI.VolumeAttributes = img.attributes()
		_, err = deployments.Update(ctx, d, metav1.UpdateOptions{})
		return err == nil, "", err // a conflict with the controller is tried again
	})
}

// awaitRolled waits until all replicas are there, of the newest template and available.
func (c *claims) awaitRolled(ctx context.Context, t *testing.T, name string) {
	t.Helper()
	mustAwait(ctx, t, slowPatience, "Deployment "+name+" to be rolled out", func(ctx context.Context) (bool, string, error) {
		d, err := c.s.client.AppsV1().Deployments(c.namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, "", err
		}
		want, st := *d.Spec.Replicas, d.Status
		return st.ObservedGeneration >= d.Generation && st.UpdatedReplicas == want && st.Replicas == want && st.AvailableReplicas == want,
			fmt.Sprintf("%d replicas, %d updated, %d available", st.Replicas, st.UpdatedReplicas, st.AvailableReplicas), nil
	})
}

// watchRollout watches the Deployment until ctx is done, and then says whether fewer than least of its
// pods were available at any time, or one of its containers was restarted.
func (c *claims) watchRollout(ctx context.Context, t *testing.T, name string, least int32) <-chan error {
	t.Helper()
	one := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()}
	changes, err := c.s.client.AppsV1().Deployments(c.namespace).Watch(ctx, one)
	must(t, err)
	pods, err := c.s.client.CoreV1().Pods(c.namespace).Watch(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=site"})
	must(t, err)
	result := make(chan error, 1)
	go func() {
		defer changes.Stop()
		defer pods.Stop()
		var errs []error
		for {
			var e watch.Event
			var open bool
			select {
			case <-ctx.Done():
				result <- errors.Join(errs...)
				return
			case e, open = <-changes.ResultChan():
			case e, open = <-pods.ResultChan():
			}
			switch o := e.Object.(type) {
			case *appsv1.Deployment:
				if o.Status.AvailableReplicas < least {
					errs = append(errs, fmt.Errorf("%d replicas were available during the rollout, want %d at least", o.Status.AvailableReplicas, least))
				}
			case *corev1.Pod:
				if restarts(o) > 0 {
					errs = append(errs, fmt.Errorf("pod %s read something else, or nothing: %s", o.Name, podState(o)))
				}
			default:
				if ctx.Err() == nil {
					result <- fmt.Errorf("watch the rollout: it ended early: open %v, %v", open, e)
					return
				}
			}
		}
	}()
	return result
}

// allRead holds all pods of the site against a version.
func (c *claims) allRead(ctx context.Context, t *testing.T, version string) {
	t.Helper()
	count := 0
	for _, p := range c.s.pods(ctx, t, c.namespace, "app.kubernetes.io/name=site") {
		if p.DeletionTimestamp != nil {
			continue
		}
		count++
		out, err := c.s.pod(p.Namespace, p.Name).tryIn(ctx, "httpd", "sh", "-c", "cat /site/page-*; wget -q -O - http://127.0.0.1:8080/page-00")
		must(t, err)
		if want := strings.Repeat(version+"\n", sitePages+1); out != want {
			t.Errorf("pod %s reads and serves %q, want %s everywhere", p.Name, out, version)
		}
		if restarts(&p) > 0 {
			t.Errorf("pod %s has been restarted: %s", p.Name, podState(&p))
		}
	}
	if count != 10 {
		t.Errorf("the Deployment has %d pods, want 10", count)
	}
}

// awaitNoImage waits until the driver on a node has no mount of an image.
func (c *claims) awaitNoImage(ctx context.Context, t *testing.T, node string, img image) {
	t.Helper()
	a := c.s.agent(node)
	mustAwait(ctx, t, patience, "the mounts of "+img.Ref+" on "+node+" to be gone", func(ctx context.Context) (bool, string, error) {
		for _, m := range a.driverMounts(ctx, t) {
			if m.Source == img.Digest {
				return false, m.Point, nil
			}
		}
		return true, "", nil
	})
}
