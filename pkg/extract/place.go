package extract

import (
	"errors"
	"os"
	"slices"
	"strings"
)

// place is a name in a directory. It stands for a path, which is made only where it is
// needed: of a tree as deep as a hostile image can make it, all paths together are larger
// than the memory.
type place struct {
	parent *directory // nil: the place is the target, and name the path that the caller gave
	name   string
}

// below returns the path from the target.
func (p place) below() string {
	var names []string
	for ; p.parent != nil; p = p.parent.place {
		names = append(names, p.name)
	}
	slices.Reverse(names)
	return strings.Join(names, "/")
}

// String returns the path from where the caller is, for messages.
func (p place) String() string {
	target := p
	for target.parent != nil {
		target = target.parent.place
	}
	if p.parent == nil {
		return target.name
	}
	return target.name + "/" + p.below()
}

// error says what failed here.
func (p place) error(op string, err error) error {
	// A file knows its name, but not the path.
	if e := new(os.PathError); errors.As(err, &e) {
		err = e.Err
	}
	return &os.PathError{Op: op, Path: p.String(), Err: err}
}
