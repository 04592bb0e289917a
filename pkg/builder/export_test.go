package builder

import (
	"testing"

	"golang.org/x/sys/unix"
)

// SpoolBlocks returns the disk space of the content of a tree, in bytes.
func SpoolBlocks(t testing.TB, tree *Tree) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(tree.spool.f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}
