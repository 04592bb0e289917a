package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/e2e-framework/pkg/env"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/cluster"
)

// part is a function that tests one thing that users are promised, in a file of its own.
type part struct {
	name string
	test func(t *testing.T)
}

// parts is the suite, in order. The order matters: all parts share one installation of the driver and
// the registries, because installing costs more than most of what is tested; so what may break the
// installation comes after what needs it whole, and the quick start, which installs by itself, comes
// last. Each part also runs alone, as in go test -run 'TestSuite/volumes$': what it needs from those
// before it, it makes when it is not there.
//
// The part node restarts kubelet and the machine, which takes a control of the nodes that the API server
// does not give (E2E_MACHINES). All others make do with the API server and a privileged pod.
//
//	install     helm install, kubectl apply -k, helm test, upgrade; uninstall leaves nothing
//	build-job   images built and pushed by Jobs in the cluster
//	volumes     what a pod sees in a volume, and who shares what
//	failures    what a pod's author is told, and that pods start once the cause is gone
//	private     images behind credentials
//	claims      PersistentVolumes; a Deployment rolled to a new image
//	takeover    what survives when the driver ends
//	node        kubelet and machine restarted
//	eviction    a store that is full
//	upstream    Kubernetes' own storage suite
//	security    user namespaces, Pod Security Standards
//	observe     metrics, events, logs
//	quickstart  docs/quickstart.md, as it is written
func (s *suite) parts() []part {
	return []part{
		{"install", s.testInstall},
		{"build-job", s.testBuildJob},
		{"volumes", s.testVolumes},
		{"failures", s.testFailures},
		{"private", s.testPrivate},
		{"claims", s.testClaims},
		{"takeover", s.testTakeover},
		{"node", s.testNode},
		{"eviction", s.testEviction},
		{"upstream", s.testUpstream},
		{"security", s.testSecurity},
		{"observe", s.testObserve},
		{"quickstart", s.testQuickstart},
	}
}

// TestSuite runs all parts.
func TestSuite(t *testing.T) {
	s := shared
	t.Cleanup(func() { s.failed = s.failed || t.Failed() })
	parts, err := share(s.settings.shard, s.parts())
	must(t, err)
	for _, p := range parts {
		t.Run(p.name, func(t *testing.T) {
			began := time.Now()
			p.test(t)
			// For those who watch: go test says it when all is over.
			fmt.Fprintf(os.Stderr, "e2e: %s took %.0f s\n", p.name, time.Since(began).Seconds())
		})
	}
}

// share returns the parts of a shard I/N, in their order: those after the shard before it.
func share(shard string, parts []part) ([]part, error) {
	first, second, found := strings.Cut(shard, "/")
	i, err := strconv.Atoi(first)
	n, err2 := strconv.Atoi(second)
	if !found || err != nil || err2 != nil || i < 1 || i > n {
		return nil, fmt.Errorf("read -e2e.shard %s: want I/N, I from 1 to N", shard)
	}
	from, to := (len(parts)*(i-1)+n-1)/n, (len(parts)*i+n-1)/n
	return parts[from:to], nil
}

// suite is what all parts share.
type suite struct {
	// Test runs features of e2e-framework, so that its flags -feature, -assess and -labels select.
	env.Environment

	settings   settings
	cluster    *cluster.Cluster // nil where it is not the suite's own
	kubeconfig string           // file of the cluster that is tested
	config     *rest.Config
	client     kubernetes.Interface

	open    *registry // speaks plain HTTP, to everybody
	private *registry // speaks TLS, and wants a name and a password
	release *release

	// started are the pods of tests that have not ended.
	started map[*testing.T][]*pod

	dir    string // for files, removed in the end
	dumped map[string]bool
	failed bool
}

const (
	driverName = "csi.puzzlefs.io"
	// suiteNamespace holds the registries and the agents.
	suiteNamespace = "puzzlefs-e2e"
	// suiteLabel marks every namespace that the suite makes.
	suiteLabel = "e2e.csi-puzzlefs.io/suite"
)

// begin prepares everything but the installation of the driver, which the parts ask for themselves.
func (s *suite) begin(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			s.failed = true
			if s.client != nil {
				s.dump(ctx, func(text string) { fmt.Fprintln(os.Stderr, text) })
			}
		}
	}()
	if s.settings.ownCluster() {
		if err := s.startCluster(ctx); err != nil {
			return err
		}
	}
	if s.dir, err = os.MkdirTemp("", "csi-puzzlefs-e2e-"); err != nil {
		return fmt.Errorf("make a directory for the suite: %w", err)
	}
	if err := s.connect(); err != nil {
		return err
	}
	if err := s.cleanEarlier(ctx); err != nil {
		return err
	}
	if _, err := s.makeNamespace(ctx, suiteNamespace, "", privilegedPods); err != nil {
		return err
	}
	if err := s.startAgents(ctx); err != nil {
		return err
	}
	return s.startRegistries(ctx)
}

// end undoes begin, and what the parts installed.
func (s *suite) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	var errs []error
	switch {
	case s.cluster != nil:
		s.cluster.Stop()
	case s.client != nil:
		errs = append(errs, s.cleanCluster(ctx))
	}
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// cleanCluster removes what the suite made, from a cluster that is there for longer: the registries' files
// while there is an agent to remove them, the pods, and then the driver.
func (s *suite) cleanCluster(ctx context.Context) error {
	var errs []error
	if s.open != nil {
		errs = append(errs, s.removeRegistryFiles(ctx))
	}
	errs = append(errs, s.removeNamespaces(ctx), s.release.remove(ctx))
	return errors.Join(errs...)
}

// cleanEarlier removes what a run that was ended has left.
func (s *suite) cleanEarlier(ctx context.Context) error {
	if err := s.removeNamespaces(ctx); err != nil {
		return err
	}
	if err := s.release.remove(ctx); err != nil {
		return err
	}
	_, err := s.client.StorageV1().CSIDrivers().Get(ctx, driverName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for an installed driver: %w", err)
	}
	return fmt.Errorf("the cluster of %s has a CSIDriver %s already: the suite installs and removes the driver itself; give it a cluster where nobody uses it", s.kubeconfig, driverName)
}

// startCluster starts a cluster of the suite's own, with two nodes.
func (s *suite) startCluster(ctx context.Context) error {
	images, err := filepath.Glob(filepath.Join(s.settings.images, "*.tar"))
	if err != nil {
		return err
	}
	began := time.Now()
	s.cluster, err = cluster.Start(ctx, cluster.Config{Kube: s.settings.kube, Node: s.settings.node, Images: images, Nodes: 2})
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "e2e: started a cluster in %.1f s; its logs are in %s while it runs\n", time.Since(began).Seconds(), s.cluster.LogDir())
	// Files of tests go where the cluster's are, so that nothing of them stays when the suite is killed.
	tmp := filepath.Join(filepath.Dir(s.cluster.LogDir()), "tmp")
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return fmt.Errorf("make a directory for the tests: %w", err)
	}
	if err := os.Setenv("TMPDIR", tmp); err != nil {
		return fmt.Errorf("make a directory for the tests: %w", err)
	}
	return nil
}

// connect makes the clients.
func (s *suite) connect() error {
	file, err := filepath.Abs(s.settings.kubeconfig)
	if err != nil {
		return err
	}
	if s.cluster != nil {
		file = s.cluster.Kubeconfig()
	}
	s.kubeconfig = file
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		&clientcmd.ClientConfigLoadingRules{ExplicitPath: file},
		&clientcmd.ConfigOverrides{CurrentContext: s.settings.context})
	if s.config, err = loader.ClientConfig(); err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	s.config.QPS = -1 // no limit: the suite polls, and is alone
	if s.client, err = kubernetes.NewForConfig(s.config); err != nil {
		return fmt.Errorf("make a client of %s: %w", file, err)
	}
	s.release = &release{s: s, name: "csi-puzzlefs", namespace: "csi-puzzlefs"}
	return nil
}

// skip skips the test, saying what is unrun and what would run it; with E2E_REQUIRE_ALL=1 it fails.
func (s *suite) skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if s.settings.requireAll {
		t.Fatalf("E2E_REQUIRE_ALL=1 and this would be unrun: "+format, args...)
	}
	t.Skipf("UNRUN: "+format, args...)
}

// nodes returns the names of the nodes that pods can run on, sorted as the API server does.
func (s *suite) nodes(ctx context.Context) ([]string, error) {
	list, err := s.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/os=linux"})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	var names []string
	for _, n := range list.Items {
		if !n.Spec.Unschedulable && ready(n.Status.Conditions) && !tainted(n.Spec.Taints) {
			names = append(names, n.Name)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("find a node for pods: none of %d is ready, schedulable and without taints", len(list.Items))
	}
	return names, nil
}

func ready(conditions []corev1.NodeCondition) bool {
	for _, c := range conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func tainted(taints []corev1.Taint) bool {
	for _, t := range taints {
		if t.Effect != corev1.TaintEffectPreferNoSchedule {
			return true
		}
	}
	return false
}
