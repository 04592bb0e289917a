package extract

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// sharing is an inode that is there under a name of an inode of the image.
type sharing struct {
	there   identity
	inImage uint64
}

// maxStrays is how many names an error lists.
const maxStrays = 5

// strays are names that the image does not have.
type strays struct {
	first []string
	count int
}

func (s *strays) add(at place) {
	s.count++
	if len(s.first) < maxStrays {
		s.first = append(s.first, at.below())
	}
}

// error returns nil if there are none.
func (s *strays) error() error {
	if s.count == 0 {
		return nil
	}
	slices.Sort(s.first)
	list := strings.Join(s.first, ", ")
	if more := s.count - len(s.first); more > 0 {
		list += fmt.Sprintf(" and %d more", more)
	}
	return fmt.Errorf("%s: %w", list, ErrStray)
}

// survey looks at everything that is in the target, changes nothing, and fails with what would
// make the extraction fail half-way: names that the image does not have, and mounts. It also
// counts the names of inodes that have several.
func (x *extractor) survey(top *directory) error {
	x.found = make(map[sharing]uint64)
	type level struct {
		dir  *directory
		subs []string
	}
	var strays strays
	var stack []level
	defer func() {
		for _, l := range stack {
			_ = l.dir.f.Close() // it was only read from
		}
	}()
	// enter opens a directory below parent and looks at what is in it.
	enter := func(d *directory, parent int, name string) error {
		var err error
		if d.f, err = openDir(parent, name, d.place); err != nil {
			if !x.isRoot && errors.Is(err, os.ErrPermission) {
				return nil // it is looked at when it has been taken
			}
			return err
		}
		subs, err := x.surveyDir(d, &strays)
		stack = append(stack, level{d, subs})
		return err
	}
	if err := enter(&directory{place: top.place, attr: top.attr}, int(x.root.Fd()), "."); err != nil {
		return err
	}
	for len(stack) > 0 {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		l := &stack[len(stack)-1]
		if len(l.subs) == 0 {
			_ = l.dir.f.Close()
			stack = stack[:len(stack)-1]
			continue
		}
		at := place{l.dir, l.subs[0]}
		l.subs = l.subs[1:]
		attr, err := x.cfg.Image.Lookup(l.dir.attr.Ino, at.name)
		if err != nil {
			return err
		}
		if err := enter(&directory{place: at, attr: attr}, int(l.dir.f.Fd()), at.name); err != nil {
			return err
		}
	}
	return strays.error()
}

// surveyDir looks at the names in one directory and returns those of subdirectories that the
// image has, too.
func (x *extractor) surveyDir(d *directory, strays *strays) (subs []string, err error) {
	err = eachName(d, func(name string) error {
		at := place{d, name}
		attr, err := x.cfg.Image.Lookup(d.attr.Ino, name)
		if errors.Is(err, image.ErrNotExist) {
			if !isTempName(name) {
				strays.add(at)
			}
			return nil
		}
		if err != nil {
			return err
		}
		old, err := x.look(at)
		if old == nil {
			return err // gone meanwhile, or unreadable
		}
		defer old.close()
		switch {
		case old.kind() == unix.S_IFDIR && attr.Kind == format.KindDir:
			subs = append(subs, name)
		case old.kind() == unix.S_IFDIR:
			return x.surveyObstacle(at, strays)
		case attr.Nlink > 1 && attr.Kind != format.KindDir:
			x.found[sharing{old.identity(), attr.Ino}]++
		}
		return nil
	})
	return subs, err
}

// surveyObstacle adds what is in a directory that is in the way of something else.
func (x *extractor) surveyObstacle(at place, strays *strays) error {
	f, err := openDir(int(at.parent.f.Fd()), at.name, at)
	if err != nil {
		return err
	}
	d := &directory{place: at, f: f}
	err = eachName(d, func(name string) error {
		strays.add(place{d, name})
		return nil
	})
	return errors.Join(err, f.Close())
}

// eachUnknown calls fn with the names in a directory that the image does not have.
func (x *extractor) eachUnknown(d *directory, fn func(at place) error) error {
	return eachName(d, func(name string) error {
		_, err := x.cfg.Image.Lookup(d.attr.Ino, name)
		if errors.Is(err, image.ErrNotExist) {
			return fn(place{d, name})
		}
		return err
	})
}

// eachName calls fn with the names in a directory, a few at a time, as there may be many.
func eachName(d *directory, fn func(name string) error) error {
	for {
		names, err := d.f.Readdirnames(1024)
		for _, name := range names {
			if err := fn(name); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return d.error("list", err)
		}
	}
}
