package e2e_test

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/sample"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/tree"
)

// testVolumes tests what a pod sees in a volume.
func (s *suite) testVolumes(t *testing.T) {
	var namespace string
	f := features.New("inline volume").
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			s.driver(ctx, t)
			namespace = s.namespace(ctx, t, "volumes", privilegedPods)
			return ctx
		}).
		Assess("shows the tree that the image was made of", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			dir := s.sampleTree(t, 1)
			want, err := tree.Describe(dir)
			must(t, err)
			img := s.open.pushTree(ctx, t, dir, "volumes/sample:v1")
			p := s.start(ctx, t, s.rootReader(namespace, "content", inline("data", img.attributes())))
			p.waitReady(ctx, t)
			got, err := tree.Parse(strings.NewReader(p.exec(ctx, t, "checker", "tree", "/data")))
			must(t, err)
			if diff := tree.Diff(want, got); diff != "" {
				t.Errorf("the pod does not see what the image was made of (- source, + pod):\n%s", diff)
			}
			return ctx
		})
	s.Test(t, f.Feature())
}

// sampleTree makes a directory with everything that an image can hold. Trees of different seeds differ in
// the contents of their files.
func (s *suite) sampleTree(t testing.TB, seed uint64) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "sample")
	omitted, err := sample.Make(dir, sample.Config{Seed: seed})
	must(t, err)
	for _, what := range omitted {
		t.Logf("the sample tree is without what this machine does not allow: %s", what)
	}
	return dir
}
