package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/onsi/ginkgo/v2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/kubernetes/test/e2e/framework"
	imageutils "k8s.io/kubernetes/test/utils/image"
	"k8s.io/utils/ptr"
)

// usePodImage lets the suites' pods run one image, REGISTRY/NAME:TAG, instead of those that
// Kubernetes publishes: a cluster without a way to their registry can have it. The cases that
// apply use of these images a shell and programs that busybox has.
func usePodImage(ref string) error {
	slash, colon := strings.LastIndex(ref, "/"), strings.LastIndex(ref, ":")
	if slash < 0 || colon < slash {
		return fmt.Errorf("parse -pod-image %q: want REGISTRY/NAME:TAG", ref)
	}
	images := imageutils.GetImageConfigs()
	for _, id := range []imageutils.ImageID{imageutils.BusyBox, imageutils.Agnhost, imageutils.GlibcDnsTesting} {
		c := images[id]
		c.SetRegistry(ref[:slash])
		c.SetName(ref[slash+1 : colon])
		c.SetVersion(ref[colon+1:])
		images[id] = c
	}
	return nil
}

// refusedMount is the case that looks whether a pod is still pending when a volume of it cannot be
// mounted.
const refusedMount = "should fail to create pod by failing to mount volume"

// adaptSuites lets the pods that the suites make differ in two ways from what they ask for; see
// adapted. And it shortens a wait: to know that it may look, the case refusedMount waits for an event
// that kubelet no longer sends, for as long as a pod may take to start, which is five minutes. A
// minute has seven attempts at the mount.
func adaptSuites() {
	framework.NewFrameworkExtensions = append(framework.NewFrameworkExtensions, func(f *framework.Framework) {
		ginkgo.BeforeEach(func() {
			f.ClientSet = adaptingClient{f.ClientSet}
			if strings.HasPrefix(ginkgo.CurrentSpecReport().LeafNodeText, refusedMount) {
				f.Timeouts.PodStart = time.Minute
			}
		})
	})
}

// labelNamespaces puts a label, KEY=VALUE, on the namespaces that the suites make: whoever runs them
// finds by it what a run has left that was ended.
func labelNamespaces(label string) error {
	key, value, ok := strings.Cut(label, "=")
	if !ok || key == "" {
		return fmt.Errorf("parse -namespace-label %q: want KEY=VALUE", label)
	}
	framework.TestContext.CreateTestingNS = func(ctx context.Context, name string, client kubernetes.Interface, labels map[string]string) (*corev1.Namespace, error) {
		labels = maps.Clone(labels)
		if labels == nil {
			labels = map[string]string{}
		}
		labels[key] = value
		return framework.CreateTestingNS(ctx, name, client, labels)
	}
	return nil
}

// adapted returns a pod as a suite wants it, but:
//
// Inline volumes of our driver say readOnly: true. The suites mount them read-only in the
// containers and have no way to say it of the volume, which our driver demands, so that nobody
// takes a volume for writable who finds out only when a write fails.
//
// A container that was to run Kubernetes' image agnhost just to be there, for commands to be
// executed in, sleeps.
func adapted(pod *corev1.Pod) *corev1.Pod {
	pod = pod.DeepCopy()
	for _, v := range pod.Spec.Volumes {
		if v.CSI != nil && v.CSI.Driver == driverName && v.CSI.ReadOnly == nil {
			v.CSI.ReadOnly = ptr.To(true)
		}
	}
	for i := range pod.Spec.Containers {
		c := &pod.Spec.Containers[i]
		if len(c.Command) == 0 && slices.Equal(c.Args, []string{"pause"}) {
			c.Command, c.Args = []string{"sleep", "2147483647"}, nil
		}
	}
	return pod
}

// adaptingClient is a client that makes adapted pods. It passes everything else on.
type adaptingClient struct{ kubernetes.Interface }

func (c adaptingClient) CoreV1() corev1client.CoreV1Interface {
	return adaptingCore{c.Interface.CoreV1()}
}

type adaptingCore struct{ corev1client.CoreV1Interface }

func (c adaptingCore) Pods(namespace string) corev1client.PodInterface {
	return adaptingPods{c.CoreV1Interface.Pods(namespace)}
}

type adaptingPods struct{ corev1client.PodInterface }

func (p adaptingPods) Create(ctx context.Context, pod *corev1.Pod, opts metav1.CreateOptions) (*corev1.Pod, error) {
	return p.PodInterface.Create(ctx, adapted(pod), opts)
}
