package builder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// ErrUpper says that a directory makes no sense as the upper directory of an overlay mount of
// the base image. It is wrapped with the path at fault.
var ErrUpper = errors.New("not an upper directory of an overlay over this base image")

// UpperXattrs says which extended attributes of an upper directory are the overlay's own.
type UpperXattrs int

// The kinds of overlay mounts.
const (
	// UpperXattrsAuto finds out by what there is.
	UpperXattrsAuto UpperXattrs = iota
	// UpperXattrsTrusted are trusted.overlay.*, those of mounts that root makes.
	UpperXattrsTrusted
	// UpperXattrsUser are user.overlay.*, those of mounts with the option userxattr.
	UpperXattrsUser
)

// The prefixes of the overlay's attributes, and what stands between prefix and name of an
// attribute that only looks like one, so that an overlay can hold another's directories.
const (
	overlayTrusted = "trusted.overlay."
	overlayUser    = "user.overlay."
	overlayEscape  = "overlay."
)

// upperNode is a name in an upper directory.
type upperNode struct {
	name   string
	parent *upperNode // nil for the root
	attr
	details
	children []*upperNode // sorted by name
	whiteout bool
	// excluded says that the build shall not know of it.
	excluded bool
	marks    overlayMarks
	at       placing
}

// overlayMarks are the overlay's own attributes of a name, as far as they have a meaning for
// somebody who is not the overlay.
type overlayMarks struct {
	opaque   string // "y" or "x"; "" for none
	redirect string
	metacopy bool
	whiteout bool
	nlink    string
	origin   []byte
}

// path returns where the node is in the tree, for messages.
func (n *upperNode) path() string {
	var names []string
	for ; n.parent != nil; n = n.parent {
		names = append(names, n.name)
	}
	slices.Reverse(names)
	return "/" + strings.Join(names, "/")
}

// wrong returns an error about the node.
func (n *upperNode) wrong(format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", quote(n.path()), fmt.Sprintf(format, args...), ErrUpper)
}

// present reports whether the name is there in the tree that the overlay shows.
func (n *upperNode) present() bool { return !n.whiteout && !n.excluded }

// readUpper reads the names and attributes of an upper directory, no content. It returns the
// directory as well, open, which the caller closes.
func readUpper(ctx context.Context, cfg *Config, found func(names int)) (_ *upperNode, dir *hostDir, err error) {
	path := cfg.Upper
	if cfg.UpperDir != nil {
		path = procPath(int(cfg.UpperDir.Fd()))
	}
	if dir, err = openRoot(path, cfg.Upper); err != nil {
		return nil, nil, err
	}
	root := new(upperNode)
	if root.attr, root.details, err = dir.self(); err != nil {
		return nil, dir, err
	}
	s := &upperScan{ctx: ctx, found: found, minimal: &cfg.Minimal}
	if err := s.list(dir, root, nil); err != nil {
		return nil, dir, err
	}
	prefix, err := s.prefix(cfg.UpperXattrs)
	if err != nil {
		return nil, dir, err
	}
	if err := root.interpretRoot(prefix); err != nil {
		return nil, dir, err
	}
	if !cfg.Minimal.isZero() {
		root.minimize(&cfg.Minimal)
	}
	return root, dir, nil
}

// upperScan is one reading of an upper directory.
type upperScan struct {
	ctx     context.Context
	found   func(names int)
	names   int
	minimal *Minimal
	// trusted and user are paths of names with attributes of that prefix which are not
	// escaped; "" where there are none.
	trusted, user string
}

// list reads what is in a directory. names are those of its path.
func (s *upperScan) list(dir directory, n *upperNode, names []string) error {
	s.note(n)
	found, err := dir.names()
	if err != nil {
		return err
	}
	n.children = make([]*upperNode, 0, len(found))
	for _, name := range found {
		if err := s.ctx.Err(); err != nil {
			return err
		}
		c := &upperNode{name: name, parent: n}
		n.children = append(n.children, c)
		if c.attr, err = dir.stat(name); err != nil {
			return err
		}
		path := append(names, name)
		switch {
		case excluded(s.minimal.Exclude, path):
			c.excluded = true
			continue
		case c.mount:
			return c.wrong("something is mounted here, which hides what the overlay has: unmount it")
		case c.kind == format.KindChr && c.major == 0 && c.minor == 0:
			c.whiteout = true
			continue
		}
		if c.details, err = dir.details(name, &c.attr, nil); err != nil {
			return err
		}
		if c.kind != format.KindDir {
			s.note(c)
			continue
		}
		if err := s.enter(dir, c, path); err != nil {
			return err
		}
	}
	s.names += len(found)
	s.found(s.names)
	return nil
}

// enter lists a subdirectory.
func (s *upperScan) enter(dir directory, c *upperNode, names []string) (err error) {
	sub, err := dir.enter(c.name, &c.attr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sub.close()) }()
	return s.list(sub, c, names)
}

// note remembers which prefixes are in use.
func (s *upperScan) note(n *upperNode) {
	for _, x := range n.xattrs {
		if ownMark(x.Key, overlayTrusted) && s.trusted == "" {
			s.trusted = n.path()
		}
		if ownMark(x.Key, overlayUser) && s.user == "" {
			s.user = n.path()
		}
	}
}

// ownMark reports whether an attribute is an overlay's own, and not one with an escape.
func ownMark(key []byte, prefix string) bool {
	name, ok := strings.CutPrefix(string(key), prefix)
	return ok && !strings.HasPrefix(name, overlayEscape)
}

// prefix returns how the overlay's attributes begin.
func (s *upperScan) prefix(want UpperXattrs) (string, error) {
	switch want {
	case UpperXattrsTrusted:
		return overlayTrusted, nil
	case UpperXattrsUser:
		return overlayUser, nil
	case UpperXattrsAuto:
	}
	switch {
	case s.trusted != "" && s.user != "":
		return "", fmt.Errorf("%s has attributes %s*, and %s has %s*: say which are the overlay's: %w",
			quote(s.trusted), overlayTrusted, quote(s.user), overlayUser, ErrUpper)
	case s.user != "":
		return overlayUser, nil
	case s.trusted == "" && !seesTrusted():
		// An opaque directory of an overlay that root mounted would look like any other.
		return "", fmt.Errorf("it has no attributes %s*, and those of an overlay that root mounted cannot be seen: say that they are the overlay's, or run as root: %w",
			overlayUser, ErrUpper)
	}
	return overlayTrusted, nil
}

// seesTrusted reports whether this process sees extended attributes that begin with trusted:
// it must be able to administer the machine, not only a user namespace.
func seesTrusted() bool {
	var caps [2]unix.CapUserData
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&header, &caps[0]); err != nil || caps[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return false
	}
	ids, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && strings.Join(strings.Fields(string(ids)), " ") == "0 0 4294967295"
}

// interpretRoot interprets the root and all below it.
func (n *upperNode) interpretRoot(prefix string) error {
	if err := n.interpret(prefix); err != nil {
		return err
	}
	if n.marks.opaque == "y" || n.marks.redirect != "" {
		return n.wrong("the root of an upper directory is neither opaque nor renamed: name the directory that the mount's option upperdir names")
	}
	return nil
}

// interpret takes the overlay's attributes from a node and those below it, and takes the
// escape from those of others.
func (n *upperNode) interpret(prefix string) error {
	if n.whiteout || n.excluded {
		return nil
	}
	kept := n.xattrs[:0]
	for _, x := range n.xattrs {
		name, ok := strings.CutPrefix(string(x.Key), prefix)
		if !ok {
			kept = append(kept, x)
			continue
		}
		if inner, escaped := strings.CutPrefix(name, overlayEscape); escaped {
			kept = append(kept, format.Xattr{Key: []byte(prefix + inner), Val: x.Val})
			continue
		}
		if err := n.mark(prefix, name, x.Val); err != nil {
			return err
		}
	}
	// Without the escape they sort otherwise.
	slices.SortFunc(kept, func(a, b format.Xattr) int { return bytes.Compare(a.Key, b.Key) })
	n.xattrs = kept
	if n.marks.whiteout {
		if n.parent == nil || n.parent.marks.opaque != "x" {
			return n.wrong("it is marked as a whiteout, but its directory is not marked to have such whiteouts (%sopaque=x)", prefix)
		}
		n.whiteout = true
	}
	for _, c := range n.children {
		if err := c.interpret(prefix); err != nil {
			return err
		}
	}
	return nil
}

// mark notes one of the overlay's attributes. Each has its kind of file; an unknown one may
// mean anything, and is refused.
func (n *upperNode) mark(prefix, name string, val []byte) error {
	of := format.KindUnknown // any
	switch name {
	case "opaque":
		of = format.KindDir
		n.marks.opaque = string(val)
		if n.marks.opaque != "y" && n.marks.opaque != "x" {
			return n.wrong("its attribute %s%s is %q, which nothing but y and x can be", prefix, name, val)
		}
	case "redirect":
		if n.kind != format.KindDir && n.kind != format.KindFile {
			of = format.KindFile
		}
		n.marks.redirect = string(val)
	case "metacopy":
		of = format.KindFile
		n.marks.metacopy = true
		if !validMetacopy(val) {
			return n.wrong("its attribute %s%s is of a form that this program does not know", prefix, name)
		}
	case "whiteout":
		of = format.KindFile
		n.marks.whiteout = true
		if n.kind == format.KindFile && n.size != 0 {
			return n.wrong("it is marked as a whiteout and has content")
		}
	case "nlink":
		n.marks.nlink = string(val)
	case "origin":
		n.marks.origin = val
	case "impure", "upper", "uuid", "protattr":
		// They are the overlay's notes to itself: what comes from below is in here, what belongs to
		// an entry of its index, which overlay it is, and flags that chattr sets and images do
		// not have.
	default:
		return n.wrong("it has the attribute %s%s, whose meaning this program does not know", prefix, name)
	}
	if of != format.KindUnknown && n.kind != of {
		return n.wrong("it is a %s and has the attribute %s%s of a %s", n.kind, prefix, name, of)
	}
	return nil
}

// validMetacopy reports whether the value of a metacopy attribute is one of version 0: nothing, or a
// header of version, length, flags and algorithm and then the digest of the data below.
func validMetacopy(val []byte) bool {
	return len(val) == 0 || len(val) >= 4 && val[0] == 0 && int(val[1]) == len(val) && val[2] == 0
}

// minimize applies what the user wants of what is not excluded.
func (n *upperNode) minimize(m *Minimal) {
	m.change(&n.attr, &n.details)
	// A device that is left out still takes the place of what the base has.
	n.whiteout = n.whiteout || m.drops(n.kind)
	for _, c := range n.children {
		c.minimize(m)
	}
}

// send opens the files below a directory that have content in the upper directory and hands
// them to the cutter, in the order of their numbers.
func (n *upperNode) send(w *walker, dir directory) error {
	for _, c := range n.children {
		if !c.at.read {
			continue
		}
		f, err := dir.open(c.name, &c.attr)
		if err != nil {
			return err
		}
		// What its attributes were when they were read they must still be.
		if file, ok := f.(*hostFile); !ok || file.state != c.state {
			return errors.Join(fmt.Errorf("open %s: %w", filepath.Join(dir.path(), c.name), ErrChanged), f.Close())
		}
		if err := w.send(openFile{f: f, dir: dir, name: c.name, size: c.size, inode: c.at.inode}); err != nil {
			return err
		}
	}
	for _, c := range n.children {
		if c.at.readBelow {
			if err := c.enterAndSend(w, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

func (n *upperNode) enterAndSend(w *walker, dir directory) (err error) {
	sub, err := dir.enter(n.name, &n.attr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sub.close()) }()
	return n.send(w, sub)
}
