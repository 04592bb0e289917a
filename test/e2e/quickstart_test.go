package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/cluster"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/record"
)

// testQuickstart runs the session that docs/quickstart.cast is the recording of, with the programs that people
// type, and demands the same recording: what README.md shows is what happens. The session installs and removes the driver.
func (s *suite) testQuickstart(t *testing.T) {
	if !s.settings.ownCluster() {
		s.skip(t, "the quick start is recorded on a cluster of the suite's own, with two nodes and no driver; run make e2e without KUBECONFIG")
	}
	must(t, s.release.remove(t.Context()))
	var said strings.Builder
	files, err := record.Quickstart(t.Context(), record.Config{
		Source:     root,
		Program:    s.settings.program,
		Kubeconfig: s.kubeconfig,
		Path:       []string{s.settings.kube, s.settings.node},
		Address:    cluster.Address,
		Progress:   &said,
	})
	if err != nil {
		t.Fatalf("%v\nso far:\n%s", err, said.String())
	}
	for name, got := range map[string][]byte{record.CastFile: files.Cast, record.SVGFile: files.SVG} {
		want, err := os.ReadFile(filepath.Join(root, name))
		must(t, err)
		if diff := cmp.Diff(strings.SplitAfter(string(want), "\n"), strings.SplitAfter(string(got), "\n")); diff != "" {
			t.Errorf("%s is not what the quick start gives now; look at the difference, and run make docs if it is right (- committed, + now):\n%s", name, diff)
		}
	}
	if t.Failed() {
		t.Logf("the session as it was:\n%s", said.String())
	}
}

// root is that of the source tree.
const root = "../.."
