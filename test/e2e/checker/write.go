package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// attempt is a change that is tried. What it changes, undo changes back.
type attempt struct {
	name string
	do   func() error
	undo func() error
}

func tryWrites(c *call) error {
	name := c.flags.String("file", "", "the existing `file` to change, relative to DIR (default: the first that is found)")
	args, err := c.parse()
	if err != nil {
		return err
	}
	dir := args[0]
	file := filepath.Join(dir, *name)
	if *name == "" {
		if file, err = firstFile(dir); err != nil {
			return err
		}
	}
	list, err := attempts(dir, file)
	if err != nil {
		return err
	}
	allowed := 0
	for _, a := range list {
		err := a.do()
		if errors.Is(err, unix.EROFS) {
			fmt.Fprintf(c.stdout, "%s: EROFS\n", a.name)
			continue
		}
		allowed++
		if err != nil {
			fmt.Fprintf(c.stdout, "%s: %s\n", a.name, errorName(err))
			continue
		}
		fmt.Fprintf(c.stdout, "%s: no error\n", a.name)
		if err := a.undo(); err != nil {
			return fmt.Errorf("undo %s: %w", a.name, err)
		}
	}
	if allowed > 0 {
		return fmt.Errorf("%d of %d changes below %s were not refused with EROFS", allowed, len(list), dir)
	}
	return nil
}

// attempts returns every kind of change to a file below dir, and to dir.
func attempts(dir, file string) ([]attempt, error) {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: file, Err: err}
	}
	fresh := filepath.Join(dir, ".checker-was-here")
	nothing := func() error { return nil }
	remove := func() error { return os.Remove(fresh) }
	// opened opens a file and does no more.
	opened := func(name string, flags int) func() error {
		return func() error {
			fd, err := unix.Open(name, flags|unix.O_CLOEXEC, 0o644)
			if err != nil {
				return err
			}
			return unix.Close(fd)
		}
	}
	return []attempt{
		{"create", opened(fresh, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY), remove},
		{"mkdir", func() error { return unix.Mkdir(fresh, 0o755) }, remove},
		{"mkfifo", func() error { return unix.Mkfifo(fresh, 0o644) }, remove},
		{"symlink", func() error { return unix.Symlink("target", fresh) }, remove},
		{"link", func() error { return unix.Link(file, fresh) }, remove},
		{"rename", func() error { return unix.Rename(file, fresh) }, func() error { return unix.Rename(fresh, file) }},
		// A file that is there is moved back by the above before it could be lost here: what is
		// unlinked where that is allowed is a second name.
		{"unlink", func() error { return unlinkSpare(file, fresh) }, nothing},
		{"rmdir", func() error { return rmdirSpare(dir, fresh) }, nothing},
		{"write", opened(file, unix.O_WRONLY), nothing},
		{"append", opened(file, unix.O_WRONLY|unix.O_APPEND), nothing},
		{"truncate", func() error { return unix.Truncate(file, st.Size) }, nothing},
		{"chown", func() error { return unix.Lchown(file, int(st.Uid), int(st.Gid)) }, nothing},
		// After what clears set-id bits.
		{"chmod", func() error { return unix.Chmod(file, st.Mode&0o7777) }, nothing},
		{"utimes", func() error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{st.Atim, st.Mtim}, 0)
		}, nothing},
		{
			"setxattr", func() error { return unix.Setxattr(file, "user.checker", []byte("x"), 0) },
			func() error { return unix.Removexattr(file, "user.checker") },
		},
		{"removexattr", func() error { return removeSpare(file) }, nothing},
	}, nil
}

// unlinkSpare unlinks a file, or a link to it that is made first where one can be made.
func unlinkSpare(file, spare string) error {
	if err := unix.Link(file, spare); err == nil {
		file = spare
	} else if !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("not tried, as no spare name could be made for %s: %w", file, err)
	}
	return unix.Unlink(file)
}

// rmdirSpare removes dir, or a directory that is made in it first where one can be made.
func rmdirSpare(dir, spare string) error {
	if err := unix.Mkdir(spare, 0o755); err == nil {
		return unix.Rmdir(spare)
	} else if !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("not tried, as no spare directory could be made: %w", err)
	}
	// The directory itself may be a mount point, which is busy before it is read-only.
	sub, err := firstDirectory(dir)
	if err != nil {
		return err
	}
	return unix.Rmdir(sub)
}

// removeSpare removes an attribute that is set first where one can be set.
func removeSpare(file string) error {
	const key = "user.checker-spare"
	if err := unix.Setxattr(file, key, []byte("x"), 0); err != nil && !errors.Is(err, unix.EROFS) {
		return fmt.Errorf("not tried, as no spare attribute could be set: %w", err)
	}
	return unix.Removexattr(file, key)
}

// firstFile returns the first regular file below dir.
func firstFile(dir string) (string, error) {
	return first(dir, "regular file", func(d fs.DirEntry) bool { return d.Type().IsRegular() })
}

// firstDirectory returns the first directory below dir.
func firstDirectory(dir string) (string, error) {
	return first(dir, "directory", fs.DirEntry.IsDir)
}

func first(dir, what string, wanted func(fs.DirEntry) bool) (string, error) {
	var found string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrPermission) && path != dir {
			return fs.SkipDir // another user's
		}
		if err != nil || path == dir || !wanted(d) {
			return err
		}
		found = path
		return fs.SkipAll
	})
	if err == nil && found == "" {
		err = fmt.Errorf("there is no %s below %s", what, dir)
	}
	return found, err
}

// errorName names a system call's error as C does, and tells any other.
func errorName(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		if name := unix.ErrnoName(errno); name != "" {
			return name
		}
	}
	return err.Error()
}
