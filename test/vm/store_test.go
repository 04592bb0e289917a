package vm_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/seal"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

func open(t *testing.T, s *sample) *store.Store {
	t.Helper()
	st, err := store.Open(store.Config{Dir: s.layout})
	must(t, err)
	t.Cleanup(func() { _ = st.Close() })
	return st
}

// check is seal.Check of the sample, with the kernel.
func check(t *testing.T, st *store.Store, s *sample) (seal.Report, error) {
	t.Helper()
	root, err := st.Resolve("v1")
	must(t, err)
	return seal.Check(t.Context(), seal.Config{Store: st, Root: root, Digest: s.digest, Mode: seal.Require})
}

// TestSealedStore: a layout whose blobs are sealed is built into, used and collected like any other.
func TestSealedStore(t *testing.T) {
	t.Parallel()
	s := build(t, t.TempDir())
	s.enable(t)
	st := open(t, s)
	manifest, err := format.ParseHex(s.oci)
	must(t, err)

	before := s.digest
	s.rebuild(t)
	if s.digest != before {
		t.Errorf("built again it has the digest %s, before %s", s.digest, before)
	}
	must(t, st.Touch(manifest))
	report, err := check(t, st, s)
	must(t, err)
	if report.Kernel != len(s.blobs(t))-1 { // all but the config
		t.Errorf("report %+v of %d blobs", report, len(s.blobs(t)))
	}

	extracted := filepath.Join(t.TempDir(), "extracted")
	run(t, "extract", s.ref, extracted)
	s.expectTree(t, extracted)

	// A new image with a new blob, and sealed ones that it shares.
	must(t, os.WriteFile(filepath.Join(s.tree, "sub", "text"), []byte("changed"), 0o644))
	s.rebuild(t)
	if _, err := check(t, st, s); !errors.Is(err, verity.ErrNotEnabled) {
		t.Errorf("Check of an image with a new blob: %v, want ErrNotEnabled", err)
	}
	s.enable(t)
	_, err = check(t, st, s)
	must(t, err)

	n := 0
	for d, err := range st.Blobs() {
		must(t, err)
		if corrupt, err := st.RemoveCorrupt(t.Context(), d); corrupt || err != nil {
			t.Errorf("RemoveCorrupt of a good blob: %t, %v", corrupt, err)
		}
		must(t, st.Remove(d))
		n++
	}
	if n == 0 {
		t.Error("no blobs")
	}
}

// TestDamagedStore: a sealed blob that was damaged on the disk counts as damaged, not as a disk that
// may work again: it is replaced when it is stored again, and removed by RemoveCorrupt.
func TestDamagedStore(t *testing.T) {
	t.Parallel()
	s := build(t, t.TempDir())
	s.enable(t)
	st := open(t, s)
	path := s.blobOf(t, "large")
	d, err := format.ParseHex(filepath.Base(path))
	must(t, err)

	damageOnDisk(t, path, 5000)
	if _, err := os.ReadFile(path); !errors.Is(err, unix.EIO) {
		t.Fatalf("read: %v, want EIO", err)
	}
	for name, read := range map[string]func() error{
		"Get":        func() error { _, err := st.Get(t.Context(), d, 1<<20); return err },
		"Verify":     func() error { return st.Verify(t.Context(), d) },
		"ReadBlobAt": func() error { _, err := st.ReadBlobAt(t.Context(), d, make([]byte, 10), 0); return err },
	} {
		if err := read(); !errors.Is(err, store.ErrDigestMismatch) || !errors.Is(err, unix.EIO) {
			t.Errorf("%s: %v, want ErrDigestMismatch because of EIO", name, err)
		}
	}
	s.rebuild(t, "--cache=none") // which reads what it stores, even where nothing changed
	must(t, st.Verify(t.Context(), d))
	s.enable(t)

	damageOnDisk(t, path, 5000)
	if corrupt, err := st.RemoveCorrupt(t.Context(), d); !corrupt || err != nil {
		t.Errorf("RemoveCorrupt: %t, %v, want that it was corrupt", corrupt, err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the blob is still there: %v", err)
	}
	s.rebuild(t)
	s.enable(t)
	_, err = check(t, st, s)
	must(t, err)
}
