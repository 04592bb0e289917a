package driver

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// target is the directory of a pod that a volume appears at.
type target struct {
	// given is the path in the request.
	given string
	// real is given with the symlinks of its parent resolved, as mountinfo shows it. A
	// kubelet root is often a symlink; the last element never is one that we follow.
	real string
}

// checkTarget refuses paths that no orchestrator sends. Its errors wrap ErrInvalid.
func checkTarget(p string) error {
	switch {
	case p == "":
		return fmt.Errorf("read request: no target path: %w", ErrInvalid)
	case !filepath.IsAbs(p), filepath.Clean(p) != p, p == "/", strings.ContainsRune(p, 0):
		return fmt.Errorf("read request: target path %q; want an absolute path below /, without ., .., double or trailing slashes: %w", p, ErrInvalid)
	case len(p) >= unix.PathMax:
		return fmt.Errorf("read request: target path of %d bytes, Linux takes %d: %w", len(p), unix.PathMax-1, ErrInvalid)
	}
	return nil
}

// resolveTarget finds out where p really is. It does not touch p itself, on which a dead
// or hung mount may sit. It fails with fs.ErrNotExist when the parent is missing.
func resolveTarget(p string) (target, error) {
	if err := checkTarget(p); err != nil {
		return target{}, err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(p))
	if err != nil {
		return target{given: p, real: p}, fmt.Errorf("resolve the parent directory of target path %s (the orchestrator makes it): %w", p, err)
	}
	return target{given: p, real: filepath.Join(parent, filepath.Base(p))}, nil
}

// openParent opens the directory that holds t, so that what is done to t by name cannot be
// led elsewhere. The caller closes it.
func (t target) openParent() (*os.File, error) {
	dir := filepath.Dir(t.real)
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// make creates the target directory and reports whether it did; an existing directory is
// fine. Nothing may be mounted on t.
func (t target) make() (created bool, err error) {
	parent, err := t.openParent()
	if err != nil {
		return false, err
	}
	defer parent.Close()
	err = unix.Mkdirat(int(parent.Fd()), filepath.Base(t.real), 0o750)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("make target directory %s: %w", t.given, err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(parent.Fd()), filepath.Base(t.real), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, fmt.Errorf("look at target path %s: %w", t.given, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return false, fmt.Errorf("make target directory %s: there is something else; remove it: %w", t.given, ErrInvalid)
	}
	return false, nil
}

// remove removes the empty directory or the ordinary file at t. It is content when there
// is none, and never removes anything that holds something. Nothing may be mounted on t.
func (t target) remove() error {
	parent, err := t.openParent()
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	name := filepath.Base(t.real)
	err = unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR)
	if errors.Is(err, unix.ENOTDIR) {
		var st unix.Stat_t
		if err := unix.Fstatat(int(parent.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("look at target path %s: %w", t.given, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return fmt.Errorf("remove target %s: it is neither a directory nor an ordinary file; remove it by hand", t.given)
		}
		err = unix.Unlinkat(int(parent.Fd()), name, 0)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove target %s (it is not emptied for you): %w", t.given, err)
	}
	return nil
}

// locks allows one operation per target path at a time. The zero value is ready.
type locks struct {
	mu   sync.Mutex // guards held
	held map[string]struct{}
}

// try takes the lock of path, or fails with ErrBusy at once: kubelet asks again, and
// waiting for an operation that waits for a pull would only pile up calls.
func (l *locks) try(path string) (unlock func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, busy := l.held[path]; busy {
		return nil, fmt.Errorf("lock target %s: another call works on it: %w", path, ErrBusy)
	}
	if l.held == nil {
		l.held = map[string]struct{}{}
	}
	l.held[path] = struct{}{}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.held, path)
	}, nil
}
