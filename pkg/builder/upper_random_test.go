package builder_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
)

// randomChanges makes changes below a directory that depend on nothing but the seed, and on
// what the file system refuses.
type randomChanges struct {
	changer
	rnd *rand.Rand
	// links says that names of files with several may be removed or changed: with an index the
	// upper directory alone does not tell what becomes of the others.
	links bool
}

// pick returns one of the paths that are there and are ok, the root only if that is.
func (r *randomChanges) pick(paths []string, ok func(*unix.Stat_t) bool) (string, bool) {
	r.t.Helper()
	for _, i := range r.rnd.Perm(len(paths)) {
		var st unix.Stat_t
		r.must(unix.Lstat(r.path(paths[i]), &st))
		if ok(&st) {
			return paths[i], true
		}
	}
	return "", false
}

// paths returns all paths, the root first.
func (r *randomChanges) paths() []string {
	r.t.Helper()
	var paths []string
	r.must(filepath.WalkDir(r.dir, func(path string, _ os.DirEntry, err error) error {
		paths = append(paths, strings.TrimPrefix(strings.TrimPrefix(path, r.dir), "/"))
		return err
	}))
	return paths
}

func (r *randomChanges) name() string {
	return fmt.Sprintf("n%d", r.rnd.IntN(12))
}

// step makes one change.
func (r *randomChanges) step() {
	r.t.Helper()
	paths := r.paths()
	dir, _ := r.pick(paths, func(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFDIR })
	file, hasFile := r.pick(paths[1:], func(st *unix.Stat_t) bool {
		return st.Mode&unix.S_IFMT == unix.S_IFREG && (r.links || st.Nlink == 1)
	})
	old, hasOld := r.pick(paths[1:], func(st *unix.Stat_t) bool {
		return st.Mode&unix.S_IFMT != unix.S_IFREG || r.links || st.Nlink == 1
	})
	name := filepath.Join(dir, r.name())
	var st unix.Stat_t
	taken := unix.Lstat(r.path(name), &st) == nil
	var err error
	switch op := r.rnd.IntN(13); {
	case op < 2 && !taken:
		r.write(name, strings.Repeat(fmt.Sprint(r.rnd.Uint64()), 1+r.rnd.IntN(2000)))
	case op < 4 && !taken:
		r.mkdir(name)
	case op == 4 && !taken:
		r.must(os.Symlink("somewhere", r.path(name)))
	case op == 5 && hasFile:
		r.append(file, fmt.Sprint(r.rnd.Uint64()))
	case op == 6 && hasOld && r.rnd.IntN(3) == 0 && r.removable(old):
		r.remove(old)
	case op == 7 && hasFile && !taken && r.links:
		r.link(file, name)
	case op == 8 && hasFile:
		err = unix.Chmod(r.path(file), 0o600|uint32(r.rnd.IntN(64)))
	case op == 9 && hasOld:
		err = unix.Lsetxattr(r.path(old), "trusted.note", fmt.Append(nil, r.rnd.Uint32()), 0)
	case op >= 10 && hasOld && r.removable(old):
		flags := uint(0)
		if taken && r.rnd.IntN(2) == 0 {
			flags = unix.RENAME_EXCHANGE
		}
		if !taken || r.removable(name) {
			err = unix.Renameat2(unix.AT_FDCWD, r.path(old), unix.AT_FDCWD, r.path(name), flags)
		}
	}
	// What cannot be moved to where it is, or is a mount's, or has no attributes, stays.
	for _, fine := range []error{unix.EXDEV, unix.EINVAL, unix.ENOTEMPTY, unix.EEXIST, unix.EISDIR, unix.ENOTDIR, unix.EOPNOTSUPP, unix.EPERM} {
		if errors.Is(err, fine) {
			err = nil
		}
	}
	r.must(err)
}

// removable reports whether a path and all below it may be removed.
func (r *randomChanges) removable(name string) bool {
	if r.links {
		return true
	}
	fine := true
	r.must(filepath.WalkDir(r.path(name), func(path string, _ os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink > 1 {
			fine = false
		}
		return err
	}))
	return fine
}

// Some hundred changes in any order. The image is compared now and then; each time what comes
// next may go on in the same overlay, or in a new one over the new image.
func TestUpperRandom(t *testing.T) {
	for i, kind := range overlayKinds {
		t.Run(kind.name, func(t *testing.T) {
			dir := baseTree(t)
			s := newStore(t)
			build(t, builder.Config{Dir: dir, Store: s, Tag: "0"})
			lower := dir
			if kind.lower == "image" {
				lower = mountImage(t, s, "0")
			}
			o := newOverlay(t, lower, kind.options)
			r := &randomChanges{changer{t, o.dir}, rand.New(rand.NewPCG(1, uint64(i))), !o.indexed()}
			base := "0"
			for round := range 2 {
				for range 60 {
					r.step()
				}
				tag := fmt.Sprint(round + 1)
				o.mustBuild(t, s, builder.Config{Tag: tag, Base: base})
				if t.Failed() {
					t.FailNow()
				}
				if r.rnd.IntN(2) == 0 {
					base = tag
					o = newOverlay(t, mountImage(t, s, tag), kind.options)
					r.dir = o.dir
				}
			}
		})
	}
}
