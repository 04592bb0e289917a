package builder

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// Names with a meaning in the layers of container images, from the OCI image specification.
const (
	whiteoutPrefix = ".wh."
	// whiteoutMeta begins names that layers of old had for themselves, and whiteoutOpaque.
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// maxSymlinks bounds how many symlinks one path may lead over, as the kernel does, and how
// many hard links from one to the next may stand before what they link to.
const maxSymlinks = 40

// layer is the tree of one archive before it is laid over those below it. It is complete
// before that begins, since a whiteout hides what is below wherever in the archive it stands.
type layer struct {
	t *memTree
	// root is this layer's, below the root of what it goes over.
	root, below *node
	// whiteouts says that names beginning with .wh. are whiteouts.
	whiteouts bool
	// hides has, for directories of this layer, what they hide of those below.
	hides map[*node]*hidden
	// waiting are hard links to what has not come yet.
	waiting []hardLink
}

// hidden is what a directory hides of the one below it.
type hidden struct {
	all   bool
	names map[string]struct{}
}

// hides reports whether a name of the directory below is hidden.
func (h *hidden) hides(name string) bool {
	if h == nil {
		return false
	}
	_, ok := h.names[name]
	return ok || h.all
}

// hardLink is a further name of a file, as the archive says it.
type hardLink struct {
	dir          *node
	name         string
	entry        string // for messages
	target       []string
	targetInText string
}

// newLayer returns an empty layer that is to go over below.
func newLayer(t *memTree, below *node, whiteouts bool) (*layer, error) {
	root, err := t.newDir()
	if err != nil {
		return nil, err
	}
	return &layer{t: t, root: root, below: below, whiteouts: whiteouts, hides: make(map[*node]*hidden)}, nil
}

// splitName returns the elements of a name in an archive. A slash at the beginning is the
// root of the tree.
func splitName(name string) ([]string, error) {
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
		case part == "..":
			if len(parts) == 0 {
				return nil, fmt.Errorf("it leads out of the tree: %w", ErrArchive)
			}
			parts = parts[:len(parts)-1]
		case len(part) > format.MaxNameLen:
			return nil, fmt.Errorf("it has an element of %d bytes, at most %d are possible: %w", len(part), format.MaxNameLen, ErrArchive)
		case strings.IndexByte(part, 0) >= 0:
			return nil, fmt.Errorf("there is a NUL in it: %w", ErrArchive)
		case len(parts) == maxDepth:
			return nil, fmt.Errorf("it is deeper than %d directories: %w", maxDepth, format.ErrTooLarge)
		default:
			parts = append(parts, part)
		}
	}
	return parts, nil
}

// place is a directory in the layer and the one that it goes over. Either may be nil.
type place struct{ here, below *node }

// child returns what name leads to, in the layer or else below it. What is no directory
// hides what is below.
func (l *layer) child(p place, name string) (here, below *node) {
	if p.here != nil {
		here = p.here.children[name]
	}
	if here != nil && here.kind != format.KindDir {
		return here, nil
	}
	if p.below != nil && !l.hides[p.here].hides(name) {
		below = p.below.children[name]
	}
	return here, below
}

// dir returns the directory that parts lead to, over symlinks as a container runtime goes,
// and never out of the tree. With make it is made in the layer where it is missing, in the
// place of what is no directory.
func (l *layer) dir(parts []string, make bool) (place, error) {
	at := []place{{l.root, l.below}}
	hops := 0
	for len(parts) > 0 {
		name := parts[0]
		parts = parts[1:]
		switch name {
		case "", ".":
			continue
		case "..": // of a symlink
			at = at[:max(1, len(at)-1)]
			continue
		}
		p := at[len(at)-1]
		here, below := l.child(p, name)
		found := here
		if found == nil {
			found = below
		}
		if found != nil && found.kind == format.KindSymlink {
			if hops++; hops > maxSymlinks {
				return place{}, fmt.Errorf("its directory leads over more than %d symlinks: %w", maxSymlinks, ErrArchive)
			}
			if found.target[0] == '/' {
				at = at[:1]
			}
			parts = slices.Concat(strings.Split(string(found.target), "/"), parts)
			continue
		}
		if len(at) > maxDepth {
			return place{}, fmt.Errorf("it is deeper than %d directories: %w", maxDepth, format.ErrTooLarge)
		}
		if here != nil && here.kind != format.KindDir {
			here = nil
		}
		if here == nil && make {
			var err error
			if here, err = l.t.newDir(); err != nil {
				return place{}, err
			}
			if err := l.link(p.here, name, here); err != nil {
				return place{}, err
			}
		}
		if below != nil && below.kind != format.KindDir {
			below = nil
		}
		at = append(at, place{here, below})
	}
	return at[len(at)-1], nil
}

// add puts a file into the layer, in the place of an earlier one. A directory that is
// there already is only described anew.
func (l *layer) add(parts []string, n *node) error {
	if len(parts) == 0 {
		if n.kind != format.KindDir {
			return fmt.Errorf("the root of the tree is a directory: %w", ErrArchive)
		}
		l.root.describe(n)
		return nil
	}
	p, err := l.dir(parts[:len(parts)-1], true)
	if err != nil {
		return err
	}
	name := parts[len(parts)-1]
	if old := p.here.children[name]; old != nil && old.kind == format.KindDir && n.kind == format.KindDir {
		old.describe(n)
		return nil
	}
	return l.link(p.here, name, n)
}

// link gives n a name in a directory of the layer. What it takes the name from hid what is
// below, if it is no directory; that does not come back for a directory in its place.
func (l *layer) link(dir *node, name string, n *node) error {
	if old := dir.children[name]; old != nil && old.kind != format.KindDir && n.kind == format.KindDir {
		if err := l.hide(dir, name); err != nil {
			return err
		}
	}
	return l.t.link(dir, name, n)
}

// hide lets a name of the directory below dir be hidden.
func (l *layer) hide(dir *node, name string) error {
	l.hidden(dir).names[name] = struct{}{}
	return l.t.charge(entryCost + len(name))
}

// hidden returns what dir hides, to be added to.
func (l *layer) hidden(dir *node) *hidden {
	h := l.hides[dir]
	if h == nil {
		h = &hidden{names: make(map[string]struct{})}
		l.hides[dir] = h
	}
	return h
}

// whiteout handles a name that hides something, if this layer has such names, and reports
// whether it did.
func (l *layer) whiteout(parts []string) (done bool, err error) {
	if !l.whiteouts || len(parts) == 0 {
		return false, nil
	}
	for _, part := range parts[:len(parts)-1] {
		if strings.HasPrefix(part, whiteoutMeta) {
			return true, nil
		}
	}
	name, ok := strings.CutPrefix(parts[len(parts)-1], whiteoutPrefix)
	if !ok {
		return false, nil
	}
	opaque := parts[len(parts)-1] == whiteoutOpaque
	switch {
	case !opaque && strings.HasPrefix(parts[len(parts)-1], whiteoutMeta):
		return true, nil
	case name == "" || name == "." || name == "..":
		return false, fmt.Errorf("it is a whiteout of nothing: %w", ErrArchive)
	}
	p, err := l.dir(parts[:len(parts)-1], true)
	if err != nil {
		return false, err
	}
	if opaque {
		l.hidden(p.here).all = true
		return true, nil
	}
	return true, l.hide(p.here, name)
}

// hardLink adds a further name of a file, which may be in this layer or below.
func (l *layer) hardLink(entry string, parts []string, target string) error {
	if len(parts) == 0 {
		return fmt.Errorf("the root of the tree is a directory: %w", ErrArchive)
	}
	to, err := splitName(target)
	if err != nil {
		return fmt.Errorf("it is a hard link to %s: %w", quote(target), err)
	}
	p, err := l.dir(parts[:len(parts)-1], true)
	if err != nil {
		return err
	}
	h := hardLink{dir: p.here, name: parts[len(parts)-1], entry: entry, target: to, targetInText: target}
	found, err := l.resolve(&h)
	if err != nil || found {
		return err
	}
	l.waiting = append(l.waiting, h)
	return l.t.charge(inodeCost + len(entry) + 2*len(target))
}

// resolve gives a hard link its file, if that is there.
func (l *layer) resolve(h *hardLink) (found bool, err error) {
	if len(h.target) == 0 {
		return false, fmt.Errorf("it is a hard link to a directory: %w", ErrArchive)
	}
	p, err := l.dir(h.target[:len(h.target)-1], false)
	if err != nil {
		return false, err
	}
	n, below := l.child(p, h.target[len(h.target)-1])
	if n == nil {
		n = below
	}
	switch {
	case n == nil:
		return false, nil
	case n.kind == format.KindDir:
		return false, fmt.Errorf("it is a hard link to the directory %s: %w", quote(h.targetInText), ErrArchive)
	case h.dir.children[h.name] == n:
		return true, nil
	}
	return true, l.t.link(h.dir, h.name, n)
}

// finish resolves the hard links that came before what they link to. Links to links take
// another round. An archive can make each look-up take long.
func (l *layer) finish(ctx context.Context) error {
	for round := 0; len(l.waiting) > 0; round++ {
		var still []hardLink
		for i := range l.waiting {
			if err := ctx.Err(); err != nil {
				return err
			}
			h := &l.waiting[i]
			found, err := l.resolve(h)
			if err != nil {
				return fmt.Errorf("entry %s: %w", quote(h.entry), err)
			}
			if !found {
				still = append(still, *h)
			}
		}
		if len(still) == len(l.waiting) || round == maxSymlinks {
			return fmt.Errorf("entry %s is a hard link to %s, which is not there: %w", quote(still[0].entry), quote(still[0].targetInText), ErrArchive)
		}
		l.waiting = still
	}
	return nil
}

// apply lays the layer over what is below it.
func (l *layer) apply(ctx context.Context) error {
	if err := l.finish(ctx); err != nil {
		return err
	}
	l.merge(l.below, l.root)
	return nil
}

// merge lays one directory of the layer over the one below it.
func (l *layer) merge(below, here *node) {
	if h := l.hides[here]; h != nil {
		for name := range below.children {
			if h.hides(name) {
				l.t.unlink(below, name)
			}
		}
	}
	if !here.implied {
		below.describe(here)
	}
	for name, n := range here.children {
		if old := below.children[name]; old != nil && old.kind == format.KindDir && n.kind == format.KindDir {
			l.merge(old, n)
			continue
		}
		l.t.move(below, name, n)
	}
}
