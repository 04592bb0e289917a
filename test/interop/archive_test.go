package interop_test

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/reftest"
	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// An image that we build from an archive is the one that the reference builds from the
// directory, blob for blob, deltas too, and the reference mounts and extracts it.
func TestArchives(t *testing.T) {
	reference := reftest.Binary(t)
	for _, tree := range trees() {
		if tree.name == "over 100,000 inodes" || tree.name == "sockets and set-id bits" {
			continue // the one only takes long; tar has no sockets
		}
		t.Run(tree.name, func(t *testing.T) {
			dir, work := t.TempDir(), t.TempDir()
			tree.make(t, dir)
			theirs, ours := filepath.Join(work, "theirs"), filepath.Join(work, "ours")
			check := func(tag, base string) {
				t.Helper()
				want := refBuild(t, reference, dir, theirs, tag, base, false)
				if got := buildArchive(t, packed(t, dir), ours, tag, base); got.Verity.String() != want {
					t.Errorf("%s: digest %s, the reference's is %s", tag, got.Verity, want)
				}
				sameBlobs(t, theirs, ours)
			}
			check("one", "")
			readBoth(t, reference, theirs, ours, "one")
			if diff := testtree.Diff(fromDir(t, dir), mount(t, ours, "one")); diff != "" {
				t.Errorf("it mounts as another tree than it was built from:\n%s", diff)
			}
			if tree.change != nil {
				tree.change(t, dir)
				check("two", "one")
			}
		})
	}
}

// packed returns a directory as a tar archive.
func packed(t *testing.T, dir string) []byte {
	t.Helper()
	var out, stderr bytes.Buffer
	cmd := exec.Command("tar", "--format=posix", "--xattrs", "--xattrs-include=*", "-C", dir, "-c", ".")
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("tar: %v\n%s", err, stderr.Bytes())
	}
	return out.Bytes()
}

func buildArchive(t *testing.T, archive []byte, layout, tag, base string) *builder.Result {
	t.Helper()
	tree, err := builder.ReadTar(t.Context(), bytes.NewReader(archive), builder.ReadConfig{Name: "archive", WorkDir: t.TempDir()})
	must(t, err)
	defer tree.Close()
	s, err := store.Open(store.Config{Dir: layout, Create: true})
	must(t, err)
	defer s.Close()
	r, err := builder.Build(t.Context(), builder.Config{Tree: tree, Store: s, Tag: tag, Base: base})
	must(t, err)
	return r
}
