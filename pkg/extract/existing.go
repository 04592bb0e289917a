package extract

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// existing is what a name leads to that is there already.
type existing struct {
	fd int // O_PATH
	st unix.Statx_t
}

// identity tells an inode from all others, those included that get its number after it.
type identity struct {
	major, minor uint32
	ino          uint64
	seconds      int64 // when it was made, where the file system knows
	nanoseconds  uint32
}

// statMask is what this package asks of an inode.
const statMask = unix.STATX_BASIC_STATS | unix.STATX_BTIME

// look returns what a name leads to, or nil: always nil without Force, where the directory is
// the extraction's own from the start. Symlinks are not followed and mounts not entered.
func (x *extractor) look(at place) (*existing, error) {
	if !x.cfg.Force {
		return nil, nil //nolint:nilnil // nothing there is no error, and there is nothing else to say
	}
	fd, err := unix.Openat2(int(at.parent.f.Fd()), at.name, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, nil //nolint:nilnil // as above
	case errors.Is(err, unix.EXDEV):
		return nil, at.error("open", ErrMount)
	case err != nil:
		return nil, at.error("open", err)
	}
	old := &existing{fd: fd}
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, statMask, &old.st); err != nil {
		return nil, errors.Join(at.error("stat", err), old.close())
	}
	return old, nil
}

func (e *existing) close() error { return unix.Close(e.fd) }

// kind returns the S_IF bits.
func (e *existing) kind() uint16 { return e.st.Mode & unix.S_IFMT }

// perm returns mode & 07777.
func (e *existing) perm() uint16 { return e.st.Mode & 0o7777 }

// path returns a path to what is there, whatever becomes of its name; of a symlink it leads on.
func (e *existing) path() string { return procPath(e.fd) }

func (e *existing) identity() identity { return identityOf(&e.st) }

// explain says why what is there cannot be changed, where that is not plain from the error.
func (e *existing) explain(err error) error {
	const unchangeable = unix.STATX_ATTR_IMMUTABLE | unix.STATX_ATTR_APPEND
	if e != nil && errors.Is(err, unix.EPERM) && e.st.Attributes&unchangeable != 0 {
		return fmt.Errorf("%w (%w)", ErrImmutable, err)
	}
	return err
}

// identify returns the identity of an open file.
func identify(fd int) (identity, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, statMask, &st); err != nil {
		return identity{}, os.NewSyscallError("statx", err)
	}
	return identityOf(&st), nil
}

func identityOf(st *unix.Statx_t) identity {
	id := identity{major: st.Dev_major, minor: st.Dev_minor, ino: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 {
		id.seconds, id.nanoseconds = st.Btime.Sec, st.Btime.Nsec
	}
	return id
}

func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// access is who may do what in a directory.
type access struct {
	uid, gid   uint32
	perm       uint16
	defaultACL []byte // nil: none
}

// defaultACL is the attribute of a directory that new files inherit others from.
const defaultACL = "system.posix_acl_default"

// take makes an existing directory the extraction's own for as long as it works there: it gets
// the user who extracts as its owner, and nobody else may write to it. What others put there
// until then is what is found; afterwards they can put nothing there. New files inherit
// nothing. It leaves a directory alone that is like that already, so that who reads there can go
// on. pathFD leads to the directory; d gets a descriptor of its own.
func (x *extractor) take(d *directory, pathFD int) error {
	d.wasThere = true
	var st unix.Statx_t
	if err := unix.Statx(pathFD, "", unix.AT_EMPTY_PATH, statMask, &st); err != nil {
		return d.error("stat", err)
	}
	path := procPath(pathFD)
	before := access{uid: st.Uid, gid: st.Gid, perm: st.Mode & 0o7777}
	acl, err := readXattr(path, defaultACL)
	if err != nil {
		return d.error("get "+defaultACL, err)
	}
	before.defaultACL = acl
	explain := (&existing{fd: pathFD, st: st}).explain
	own := uint32(os.Geteuid())
	if before.uid != own {
		if !x.isRoot {
			return d.error("take", ErrOwner)
		}
		d.before = &before
		if err := unix.Fchownat(pathFD, "", int(own), -1, unix.AT_EMPTY_PATH); err != nil {
			return d.error("chown", explain(err))
		}
	}
	if perm := (before.perm | 0o700) &^ 0o022; d.before != nil || perm != before.perm {
		d.before = &before
		if err := unix.Chmod(path, uint32(perm)); err != nil {
			return errors.Join(d.error("chmod", explain(err)), d.restoreTo(path))
		}
	}
	if acl != nil {
		d.before = &before
		if err := unix.Removexattr(path, defaultACL); err != nil {
			return errors.Join(d.error("remove "+defaultACL, explain(err)), d.restoreTo(path))
		}
	}
	if d.f, err = openDir(pathFD, ".", d.place); err != nil {
		return errors.Join(err, d.restoreTo(path))
	}
	err = x.at(StepDirTaken)
	if err == nil && x.cfg.Force {
		err = x.admit(d)
	}
	if err != nil {
		return errors.Join(err, d.restore(), d.f.Close())
	}
	return nil
}

// restore gives a directory back to whom it was taken from.
func (d *directory) restore() error { return d.restoreTo(procPath(int(d.f.Fd()))) }

func (d *directory) restoreTo(path string) error {
	b := d.before
	if b == nil {
		return nil
	}
	var err error
	if b.defaultACL != nil {
		err = unix.Setxattr(path, defaultACL, b.defaultACL, 0)
	}
	// The owner last: who is not root has none to give.
	err = errors.Join(err, unix.Chmod(path, uint32(b.perm)))
	if os.Geteuid() == 0 {
		err = errors.Join(err, unix.Chown(path, int(b.uid), int(b.gid)))
		// A change of owner may clear set-id bits.
		err = errors.Join(err, unix.Chmod(path, uint32(b.perm)))
	}
	if err != nil {
		return d.error("restore", err)
	}
	d.before = nil
	return nil
}

// admit removes from a directory that was taken what a killed extraction left in it under
// temporary names. It fails with ErrStray if there is something that the image does not have:
// somebody put it there after the survey.
func (x *extractor) admit(d *directory) error {
	var strays strays
	err := x.eachUnknown(d, func(at place) error {
		if !isTempName(at.name) || unix.Unlinkat(int(d.f.Fd()), at.name, 0) != nil {
			strays.add(at)
		}
		return nil
	})
	return errors.Join(err, strays.error())
}

// isTempName says whether a name is one that giveName made.
func isTempName(name string) bool {
	random, ok := strings.CutPrefix(name, tempPrefix)
	return ok && len(random) == tempRandom && strings.Trim(random, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
}
