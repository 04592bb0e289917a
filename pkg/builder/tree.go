package builder

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// node is a file of a tree in memory. Several names may lead to one node, unless it is a
// directory.
type node struct {
	attr
	details
	off      int64 // of the content in the spool
	children map[string]*node
	// implied is set for a directory that no archive describes, which is there because of
	// what is in it.
	implied bool
}

// memTree makes nodes and counts what they take.
type memTree struct {
	spool *spool
	// made is the number of the last node, room how many bytes of metadata may still come.
	made uint64
	room int64
}

const (
	// maxDepth bounds how deep directories may be nested; the kernel reaches half of it with
	// one path.
	maxDepth = 4096
	// inodeCost and entryCost are about what an inode and a name take of a rootfs blob besides
	// what is of variable length, in bytes.
	inodeCost, entryCost = 128, 32
)

func newMemTree(s *spool) *memTree { return &memTree{spool: s, room: format.MaxRootfsSize} }

// charge takes room for metadata of n bytes. Memory is bounded by it: a tree that
// does not fit into the rootfs blob of an image need not be read to its end.
func (t *memTree) charge(n int) error {
	if t.room -= int64(n); t.room < 0 {
		return fmt.Errorf("there is more metadata than the %d bytes that an image can hold: %w", format.MaxRootfsSize, format.ErrTooLarge)
	}
	return nil
}

// newNode returns a node that no name leads to yet.
func (t *memTree) newNode(a attr, det details) (*node, error) {
	cost := inodeCost + len(det.target)
	for _, x := range det.xattrs {
		cost += entryCost + len(x.Key) + len(x.Val)
	}
	if err := t.charge(cost); err != nil {
		return nil, err
	}
	t.made++
	a.id, a.links = fileID{ino: t.made}, 0
	n := &node{attr: a, details: det}
	if a.kind == format.KindDir {
		n.children = make(map[string]*node)
	}
	return n, nil
}

// newDir returns a directory that no archive describes.
func (t *memTree) newDir() (*node, error) {
	n, err := t.newNode(attr{kind: format.KindDir, perm: 0o755}, details{})
	if err == nil {
		n.implied = true
	}
	return n, err
}

// link gives n a name in dir, and takes it from what had it.
func (t *memTree) link(dir *node, name string, n *node) error {
	if err := t.charge(entryCost + len(name)); err != nil {
		return err
	}
	n.links++
	t.move(dir, name, n)
	return nil
}

// move lets a name that n has elsewhere, and is given up there, be in dir.
func (t *memTree) move(dir *node, name string, n *node) {
	t.unlink(dir, name)
	dir.children[name] = n
}

// unlink removes a name, if it is there, and what only it leads to.
func (t *memTree) unlink(dir *node, name string) {
	n, ok := dir.children[name]
	if !ok {
		return
	}
	delete(dir.children, name)
	if n.links--; n.links > 0 {
		return
	}
	if n.size >= spoolBlock {
		t.spool.drop(n.off, n.size)
	}
	for child := range n.children {
		t.unlink(n, child)
	}
}

// describe makes dir what a later entry says of it. What is in it stays.
func (n *node) describe(as *node) {
	as.id, as.links = n.id, n.links
	n.attr, n.details, n.implied = as.attr, as.details, as.implied
}

// memDir is a directory of a tree in memory, open for the walker. It knows its path only by
// those above it: all directories down to one are open at once, and if each had its own path,
// an archive of one megabyte could ask for gigabytes.
type memDir struct {
	n      *node
	parent *memDir // nil for the root
	name   string
	spool  *spool
}

var _ directory = (*memDir)(nil)

func (d *memDir) path() string {
	var names []string
	for ; d.parent != nil; d = d.parent {
		names = append(names, d.name)
	}
	slices.Reverse(names)
	return "/" + strings.Join(names, "/")
}

func (d *memDir) close() error { return nil }

func (d *memDir) self() (attr, details, error) { return d.n.attr, d.n.details, nil }

func (d *memDir) names() ([]string, error) { return slices.Sorted(maps.Keys(d.n.children)), nil }

func (d *memDir) stat(name string) (attr, error) { return d.n.children[name].attr, nil }

func (d *memDir) open(name string, a *attr) (io.ReadCloser, error) {
	return d.spool.open(d.n.children[name].off, a.size), nil
}

func (d *memDir) details(name string, _ *attr, _ io.ReadCloser) (details, error) {
	return d.n.children[name].details, nil
}

func (d *memDir) soon([]child) {}

func (d *memDir) enter(name string, _ *attr) (directory, error) {
	return &memDir{n: d.n.children[name], parent: d, name: name, spool: d.spool}, nil
}
