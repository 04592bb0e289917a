package fuse_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
)

// request matches the line that the library logs for each request.
var request = regexp.MustCompile(`message="rx \d+: ([A-Z]+)`)

// requests counts the requests of each kind that were logged.
func requests(r *records) map[string]int {
	count := map[string]int{}
	for _, line := range r.all() {
		if m := request.FindStringSubmatch(line); m != nil {
			count[m[1]]++
		}
	}
	return count
}

// TestAskedOnce reads a tree twice: the second time the kernel answers alone, apart from
// xattrs, which it never keeps.
func TestAskedOnce(t *testing.T) {
	r := &records{}
	_, dir := mount(t, golden(t, "v3-master", "segments"), func(c *fuse.Config) { c.Logger, c.Debug = r.logger(), true })
	look := func() {
		if _, err := testtree.FromDir(dir); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := os.Lstat(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("a name that is not there: %v", err)
			}
		}
	}
	look()
	first := requests(r)
	for _, op := range []string{"LOOKUP", "READDIRPLUS", "READ"} {
		if first[op] == 0 {
			t.Errorf("the first time there was no %s among %v", op, first)
		}
	}
	// The kernel needs one answer to learn that it need not ask, but may ask a few times at once.
	for _, op := range []string{"OPEN", "OPENDIR", "FLUSH", "STATX", "POLL"} {
		if first[op] > 8 {
			t.Errorf("%d times %s, which was answered ENOSYS", first[op], op)
		}
	}
	// Somebody may empty the machine's caches meanwhile, but not every time.
	const tries = 5
	for try := 1; ; try++ {
		before := requests(r)
		look()
		after := requests(r)
		asked := map[string]int{}
		for op, n := range after {
			if n > before[op] && op != "GETXATTR" && op != "LISTXATTR" && op != "FORGET" {
				asked[op] = n - before[op]
			}
		}
		if len(asked) == 0 {
			return
		}
		if try == tries {
			t.Fatalf("the kernel still asks: %v", asked)
		}
	}
}

// TestNegative looks for a name that is not there: the kernel asks once only.
func TestNegative(t *testing.T) {
	r := &records{}
	_, dir := mount(t, awkward(t), func(c *fuse.Config) { c.Logger, c.Debug = r.logger(), true })
	before := requests(r)["LOOKUP"]
	for range 100 {
		if _, err := os.Lstat(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if n := requests(r)["LOOKUP"] - before; n > 20 {
		t.Errorf("%d requests for one name that is not there", n)
	}
}

// TestQuiet reads without debugging: nothing is logged.
func TestQuiet(t *testing.T) {
	r := &records{}
	_, dir := mount(t, golden(t, "v3-master", "small"), func(c *fuse.Config) { c.Logger = r.logger() })
	if _, err := testtree.FromDir(dir); err != nil {
		t.Fatal(err)
	}
	if lines := r.all(); len(lines) != 0 {
		t.Errorf("logged: %q", lines)
	}
}
