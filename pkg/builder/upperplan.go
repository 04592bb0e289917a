package builder

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// placing is what an upper directory's name becomes in the tree of the image.
type placing struct {
	// path is the number that the base gives to the path; 0 if it has none. The path is that
	// before directories above were renamed.
	path uint64
	// base is the number of the base's directory that a directory is in the place of; 0 if
	// there is none. merged says that it shows what that has.
	base   uint64
	merged bool
	// data is whose content a file has that was copied up without it.
	data *format.Inode
	// inode is the new one. The names of one file share it.
	inode *format.Inode
	// read says that the content of the file is to be read for this name, readBelow that there
	// are such files in the directory or below it.
	read, readBelow bool
}

// upperPlan decides which number each name of an upper directory gets, and what is in the
// directories. All of it happens in memory, on the base's metadata.
//
// A number says which content an inode has for every name that leads to it, also for those
// in directories that the overlay knows nothing of. So a name can keep the number that its
// path has in the base only if no name that is not in the upper directory leads to that: the
// other names of a hard link that was broken, or of a file in a directory that was renamed.
type upperPlan struct {
	ctx  context.Context
	base *baseTree
	root *upperNode
	tree *tree
	// unchanged has, by number, the inodes of the base that names lead to which the upper
	// directory does not have.
	unchanged map[uint64]unchanged
	// taken has the numbers of the base that nodes have.
	taken map[uint64]*upperNode
	// whiteouts are the numbers that are deleted.
	whiteouts map[uint64]bool
	// indexed are the names of files that are all that is left of hard links in the base.
	indexed map[fileID][]*upperNode
	order   []fileID // of indexed
	links   map[fileID]*upperNode
	nextIno uint64
}

// unchanged is an inode of the base, and how many names lead to it that stay as they are.
type unchanged struct {
	inode *format.Inode
	names int
}

// planUpper plans the new layer, whose inodes it adds to t.
func planUpper(ctx context.Context, base *baseTree, root *upperNode, t *tree) (*upperPlan, error) {
	p := &upperPlan{
		ctx: ctx, base: base, root: root, tree: t,
		unchanged: make(map[uint64]unchanged),
		taken:     map[uint64]*upperNode{format.RootIno: root},
		whiteouts: make(map[uint64]bool),
		indexed:   make(map[fileID][]*upperNode),
		links:     make(map[fileID]*upperNode),
		nextIno:   base.nextIno(),
	}
	if i := base.find(format.RootIno); i == nil || i.Kind != format.KindDir {
		return nil, fmt.Errorf("the base image has no root directory: %w", format.ErrCorrupt)
	}
	root.at = placing{path: format.RootIno, base: format.RootIno, merged: true}
	root.at.inode = t.add(newInode(format.RootIno, &root.attr, root.details))
	for _, step := range []func(*upperNode) error{p.locate, p.keep, p.resolveIndexed, p.number, p.list} {
		if err := step(root); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// locate finds, for all below a directory, what of the base it is in the place of.
func (p *upperPlan) locate(dir *upperNode) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	below, err := p.base.live(dir.at.base)
	if err != nil {
		return err
	}
	for _, c := range dir.children {
		if c.excluded {
			continue
		}
		c.at.path = below[c.name]
		switch {
		case c.whiteout:
		case c.kind == format.KindDir:
			if err := p.locateDir(dir, c); err != nil {
				return err
			}
			if err := p.locate(c); err != nil {
				return err
			}
		case c.marks.metacopy:
			if err := p.locateData(dir, c); err != nil {
				return err
			}
		}
		if c.present() && c.marks.nlink != "" && c.kind != format.KindDir {
			if p.indexed[c.id] == nil {
				p.order = append(p.order, c.id)
			}
			p.indexed[c.id] = append(p.indexed[c.id], c)
		}
	}
	return nil
}

// locateDir does so for one directory.
func (p *upperPlan) locateDir(parent, c *upperNode) error {
	at := c.at.path
	if c.marks.opaque != "y" && c.marks.redirect != "" {
		var err error
		if at, err = p.redirect(parent, c); err != nil {
			return err
		}
		if p.base.find(at).Kind != format.KindDir {
			return c.wrong("it was renamed from %q, which is no directory in the base image", c.marks.redirect)
		}
		c.at.merged = true
	} else {
		if i := p.base.find(at); i == nil || i.Kind != format.KindDir {
			return nil // new, or in the place of what is no directory
		}
		// A directory that the parent does not show has nothing of the base.
		c.at.merged = parent.at.merged && c.marks.opaque != "y"
	}
	c.at.base = at
	if !c.at.merged {
		return nil
	}
	if other := p.taken[at]; other != nil {
		return c.wrong("it and %s are the same directory of the base image", quote(other.path()))
	}
	p.taken[at] = c
	return nil
}

// locateData finds the content of a file that was copied up without it.
func (p *upperPlan) locateData(parent, c *upperNode) error {
	at := c.at.path
	if c.marks.redirect != "" {
		var err error
		if at, err = p.redirect(parent, c); err != nil {
			return err
		}
	} else if !parent.at.merged {
		at = 0
	}
	i := p.base.find(at)
	switch {
	case i == nil || i.Kind != format.KindFile:
		return c.wrong("its content is not here (metacopy), and the base image has no file for it")
	case i.Size() != uint64(c.size):
		return c.wrong("its content is not here (metacopy), and the base image's has %d bytes instead of %d", i.Size(), c.size)
	}
	c.at.data = i
	return nil
}

// redirect returns the number of what a node was renamed from: a name in the directory of the
// base that the parent is, or a path from the base's root. Neither symlinks nor other
// renames have a part in it.
func (p *upperPlan) redirect(parent, c *upperNode) (uint64, error) {
	ino := parent.at.base
	names := []string{c.marks.redirect}
	if rest, ok := strings.CutPrefix(c.marks.redirect, "/"); ok {
		ino, names = format.RootIno, strings.Split(rest, "/")
	} else if !parent.at.merged {
		return 0, c.wrong("it was renamed from %q beside it, but its directory is not in the base image", c.marks.redirect)
	}
	for _, name := range names {
		if name == "" || name == "." || name == ".." || strings.Contains(name, "/") {
			return 0, c.wrong("it was renamed from %q, which is neither a name nor a path from the root", c.marks.redirect)
		}
		below, err := p.base.live(ino)
		if err != nil {
			return 0, err
		}
		if ino = below[name]; ino == 0 {
			return 0, c.wrong("it was renamed from %q, which is not in the base image", c.marks.redirect)
		}
	}
	return ino, nil
}

// kept is a name of the base that the upper directory does not have, on the way down. Only
// messages look at where it is.
type kept struct {
	ino  uint64
	up   *kept
	node *upperNode // where up is nil
	name []byte
}

func (k *kept) path() string {
	names := []string{string(k.name)}
	for ; k.up != nil; k = k.up {
		names = append(names, string(k.up.name))
	}
	slices.Reverse(names)
	return strings.TrimSuffix(k.node.path(), "/") + "/" + strings.Join(names, "/")
}

// keep counts the names of the base that stay as they are, in a directory and all below it.
func (p *upperPlan) keep(dir *upperNode) error {
	if dir.at.merged {
		for _, e := range p.base.entries(dir.at.base) {
			if c := dir.child(string(e.Name)); c != nil && !c.excluded {
				continue
			}
			if err := p.keepAll(kept{ino: e.Ino, node: dir, name: e.Name}); err != nil {
				return err
			}
		}
	}
	for _, c := range dir.children {
		if c.present() && c.kind == format.KindDir {
			if err := p.keep(c); err != nil {
				return err
			}
		}
	}
	return nil
}

// keepAll counts a name and those below it.
func (p *upperPlan) keepAll(first kept) error {
	queue, err := p.keepName(nil, first)
	for err == nil && len(queue) > 0 {
		k := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		if err := p.ctx.Err(); err != nil {
			return err
		}
		for _, e := range p.base.entries(k.ino) {
			if queue, err = p.keepName(queue, kept{ino: e.Ino, up: k, name: e.Name}); err != nil {
				return err
			}
		}
	}
	return err
}

// keepName counts a name. A directory is appended to the queue of those to be looked into.
func (p *upperPlan) keepName(queue []*kept, k kept) ([]*kept, error) {
	found := p.unchanged[k.ino]
	if found.inode == nil {
		if found.inode = p.base.find(k.ino); found.inode == nil {
			return queue, nil
		}
	}
	found.names++
	p.unchanged[k.ino] = found
	if found.inode.Kind != format.KindDir {
		return queue, nil
	}
	if other := p.taken[k.ino]; other != nil {
		return queue, other.wrong("it is a directory of the base image that is still there as %s", quote(k.path()))
	}
	if found.names > 1 {
		return queue, fmt.Errorf("the base image's directory %s has several names: %w", quote(k.path()), format.ErrCorrupt)
	}
	return append(queue, &kept{ino: k.ino, up: k.up, node: k.node, name: k.name}), nil
}

// child returns the child of a name, or nil.
func (n *upperNode) child(name string) *upperNode {
	i, ok := slices.BinarySearchFunc(n.children, name, func(c *upperNode, name string) int { return cmp.Compare(c.name, name) })
	if !ok {
		return nil
	}
	return n.children[i]
}

// number makes the inodes of what is in a directory, then of what is below it.
func (p *upperPlan) number(dir *upperNode) error {
	for _, c := range dir.children {
		if !c.present() {
			continue
		}
		if err := p.makeInode(c); err != nil {
			return err
		}
	}
	for _, c := range dir.children {
		if !c.present() || c.kind != format.KindDir {
			dir.at.readBelow = dir.at.readBelow || c.at.read
			continue
		}
		if !c.at.merged && p.taken[c.at.base] != c {
			// What the base has here lives on elsewhere, so nothing here is in its place.
			c.at.base = 0
			for _, below := range c.children {
				below.at.path = 0
			}
		}
		if err := p.number(c); err != nil {
			return err
		}
		dir.at.readBelow = dir.at.readBelow || c.at.readBelow
	}
	return nil
}

// makeInode makes the inode of a name, unless it is a further link.
func (p *upperPlan) makeInode(c *upperNode) error {
	if first := p.links[c.id]; c.kind != format.KindDir && first != nil {
		if first.at.data != c.at.data {
			return c.wrong("it and %s are one file, but have not the same content in the base image", quote(first.path()))
		}
		c.at.inode = first.at.inode
		return nil
	}
	p.links[c.id] = c
	i := newInode(p.claim(c), &c.attr, c.details)
	if c.at.data != nil {
		i.Chunks = slices.Clone(c.at.data.Chunks)
	}
	c.at.inode = p.tree.add(i)
	c.at.read = c.kind == format.KindFile && c.at.data == nil && c.size > 0
	return nil
}

// claim returns the number for a node.
func (p *upperPlan) claim(c *upperNode) uint64 {
	want := c.at.path
	switch {
	case c.at.merged:
		return c.at.base // it has it already
	case c.kind != format.KindDir && p.indexed[c.id] != nil && p.indexed[c.id][0].at.base != 0:
		return p.indexed[c.id][0].at.base
	case want == 0 || p.taken[want] != nil || p.unchanged[want].names > 0:
		return p.next()
	}
	p.taken[want] = c
	return want
}

func (p *upperPlan) next() uint64 {
	p.nextIno++
	return p.nextIno - 1
}

// list fills in what is in a directory, and in those below it: first the names of the base
// that are gone, then those that are there, in order.
func (p *upperPlan) list(dir *upperNode) error {
	inode := dir.at.inode
	for _, c := range dir.children {
		if c.present() {
			inode.Entries = append(inode.Entries, format.DirEntry{Ino: c.at.inode.Ino, Name: []byte(c.name)})
		}
	}
	var gone []format.DirEntry
	for _, e := range p.base.entries(dir.at.base) {
		c := dir.child(string(e.Name))
		covered := c != nil && !c.excluded
		switch {
		case covered && c.present():
		case p.base.find(e.Ino) == nil:
			gone = append(gone, e) // in the base already
		case dir.at.merged && !covered:
			inode.Entries = append(inode.Entries, e)
		default:
			gone = append(gone, format.DirEntry{Ino: p.whiteout(e.Ino), Name: e.Name})
		}
	}
	slices.SortFunc(inode.Entries, func(a, b format.DirEntry) int { return slices.Compare(a.Name, b.Name) })
	inode.Entries = append(gone, inode.Entries...)
	for _, c := range dir.children {
		if c.present() && c.kind == format.KindDir {
			if err := p.list(c); err != nil {
				return err
			}
		}
	}
	return nil
}

// whiteout returns the number of a whiteout for a name that the base gives a number: that
// number, unless something that is present has it.
func (p *upperPlan) whiteout(ino uint64) uint64 {
	if p.unchanged[ino].names > 0 || p.taken[ino] != nil {
		ino = p.next()
	}
	if !p.whiteouts[ino] {
		p.whiteouts[ino] = true
		p.tree.add(format.Inode{Ino: ino, Kind: format.KindWhiteout, Perm: 0o644})
	}
	return ino
}
