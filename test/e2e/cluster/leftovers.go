package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"golang.org/x/sys/unix"
)

// dirPrefix is how the names of clusters' directories begin.
const dirPrefix = "puzzlefs-e2e-"

// makeDir makes a cluster's directory in parent, and removes those of clusters whose process was killed
// before it could do that. A directory is locked as long as its process lives.
func makeDir(parent string) (string, error) {
	guard, err := lock(filepath.Join(parent, dirPrefix+"lock"), os.O_CREATE, unix.LOCK_EX)
	if err != nil {
		return "", err
	}
	defer guard.Close()
	old, err := filepath.Glob(filepath.Join(parent, dirPrefix+"*[0-9]"))
	if err != nil {
		return "", err
	}
	for _, dir := range old {
		held, err := lock(dir, unix.O_DIRECTORY, unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, os.ErrNotExist) {
			continue // it lives, or has removed its own meanwhile
		}
		if err == nil {
			err = removeLab(dir)
			held.Close()
		}
		if err != nil {
			// Its processes may be on their way still. The next run tries again.
			fmt.Fprintf(os.Stderr, "cluster: remove what an earlier one has left: %v\n", err)
		}
	}
	dir, err := os.MkdirTemp(parent, dirPrefix)
	if err != nil {
		return "", err
	}
	// Programs in containers are not root on the node, and pass through here.
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	held, err := lock(dir, unix.O_DIRECTORY, unix.LOCK_EX)
	if err != nil {
		return "", err
	}
	defer held.Close()
	// A copy that nothing closes, not even the garbage collector, keeps it locked until the process ends.
	if _, err := unix.FcntlInt(held.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		return "", fmt.Errorf("lock %s: %w", dir, err)
	}
	return dir, nil
}

// lock opens a file or directory that is not a symbolic link, with more flags for that, and locks it.
func lock(path string, flags, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|flags, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// removeLab removes the directory and the cgroup of a lab whose processes have ended. A directory in which
// something is mounted stays: the namespaces should have taken that with them, so it may be this machine's.
func removeLab(dir string) error {
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return err
	}
	for _, m := range table {
		if m.Point == dir || strings.HasPrefix(m.Point, dir+"/") {
			return fmt.Errorf("%s is still mounted: unmount it and remove %s", m.Point, dir)
		}
	}
	return errors.Join(outsideCgroup(filepath.Base(dir)).remove(), os.RemoveAll(dir))
}
