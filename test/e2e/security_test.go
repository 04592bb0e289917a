package e2e_test

import (
	"context"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/tree"
)

// testSecurity tests volumes in pods that are locked in: by Pod Security Standards and user namespaces.
func (s *suite) testSecurity(t *testing.T) {
	var (
		img  image
		want tree.Tree
	)
	setup := func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
		s.driver(ctx, t)
		if img.Ref == "" {
			dir := s.sampleTree(t, 1)
			var err error
			want, err = tree.Describe(dir)
			must(t, err)
			img = s.open.pushTree(ctx, t, dir, "security/sample:v1")
		}
		return ctx
	}
	s.Test(t,
		s.podSecurityFeature(setup, &img),
		s.userNamespaceFeature(setup, &img, &want),
	)
}

// podSecurityFeature: an inline volume is what the strictest standard allows, and what it forbids is not
// needed for one.
func (s *suite) podSecurityFeature(setup features.Func, img *image) features.Feature {
	return features.New("Pod Security Standards").
		Setup(setup).
		Assess("a pod of the restricted standard reads a volume", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			namespace := s.namespace(ctx, t, "restricted", restrictedPods)
			p := s.start(ctx, t, s.reader(namespace, "restricted", inline("data", img.attributes())))
			p.waitReady(ctx, t)
			if got := strings.TrimSpace(p.exec(ctx, t, "sh", "-c", "id -u; ls /data | wc -l")); !regexp.MustCompile(`^65532\n[1-9]\d*$`).MatchString(got) {
				t.Errorf("user and number of entries: %q, want user 65532 and some", got)
			}
			return ctx
		}).
		Assess("the namespace is really restricted", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			namespace := s.namespace(ctx, t, "restricted", restrictedPods)
			_, err := s.client.CoreV1().Pods(namespace).Create(ctx, s.rootReader(namespace, "root"), metav1.CreateOptions{})
			if !apierrors.IsForbidden(err) {
				t.Errorf("a pod that runs as root: %v, want that it is forbidden", err)
			}
			return ctx
		}).Feature()
}

// userNamespaceFeature: in a user namespace, the container sees the owners that the image has, and root there
// is nobody on the node.
func (s *suite) userNamespaceFeature(setup features.Func, img *image, want *tree.Tree) features.Feature {
	return features.New("user namespaces").
		Setup(setup).
		Assess("a pod with hostUsers: false sees the tree that the image was made of", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			namespace := s.namespace(ctx, t, "userns", privilegedPods)
			no := false
			spec := s.rootReader(namespace, "mapped", inline("data", img.attributes()))
			spec.Spec.HostUsers = &no
			shared := s.rootReader(namespace, "host", inline("data", img.attributes()))
			p := s.start(ctx, t, spec)
			p.waitReady(ctx, t)
			shared.Spec.NodeName = p.get(ctx, t).Spec.NodeName
			h := s.start(ctx, t, shared)

			id, host := userMap(t, p.exec(ctx, t, "cat", "/proc/self/uid_map"))
			if id != 0 || host == 0 {
				t.Errorf("user %d of the container is %d on the node: want 0 to be somebody else", id, host)
			}
			got, err := tree.Parse(strings.NewReader(p.exec(ctx, t, "checker", "tree", "/data")))
			must(t, err)
			if diff := tree.Diff(mapped(*want), got); diff != "" {
				t.Errorf("the pod does not see what the image was made of (- source, + pod):\n%s", diff)
			}
			p.exec(ctx, t, "checker", "write", "/data")

			// One image is one mount, whoever looks through whichever mapping.
			h.waitReady(ctx, t)
			devices := map[string]bool{}
			for _, m := range s.agent(shared.Spec.NodeName).fuseMounts(ctx, t) {
				devices[m.Device] = true
			}
			if len(devices) != 1 {
				t.Errorf("a pod with and one without a user namespace have %d mounts of their image, want one shared", len(devices))
			}
			return ctx
		}).Feature()
}

// mapped returns a tree as a user namespace of 65536 users shows it: without the attributes trusted.*, which
// are for those who may administer the machine, and with nobody where an owner is none of these users.
func mapped(t tree.Tree) tree.Tree {
	const users, nobody = 65536, 65534
	t.Entries = slices.Clone(t.Entries)
	for i := range t.Entries {
		e := &t.Entries[i]
		e.Xattrs = slices.DeleteFunc(slices.Clone(e.Xattrs), func(x testtree.Xattr) bool { return strings.HasPrefix(x.Key, "trusted.") })
		if e.UID >= users {
			e.UID = nobody
		}
		if e.GID >= users {
			e.GID = nobody
		}
	}
	return t
}

// userMap reads the first line of a map of users: who somebody in the namespace is outside.
func userMap(t *testing.T, text string) (inside, outside int) {
	t.Helper()
	fields := strings.Fields(text)
	if len(fields) < 3 {
		t.Fatalf("read a map of users: %q", text)
	}
	inside, err := strconv.Atoi(fields[0])
	must(t, err)
	outside, err = strconv.Atoi(fields[1])
	must(t, err)
	return inside, outside
}
