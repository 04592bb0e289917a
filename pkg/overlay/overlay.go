package overlay

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

// Errors of this package, wrapped with the directory at hand. Errors of the system pass
// through, with what to do about them.
var (
	// ErrMounted says that an overlay is mounted there already, or that another one uses the
	// same upper directory.
	ErrMounted = errors.New("an overlay is mounted already")
	// ErrNotMounted says that no overlay is mounted there.
	ErrNotMounted = errors.New("no overlay is mounted there")
	// ErrForeign says that the overlay that is mounted there is not one of this package.
	ErrForeign = errors.New("the overlay is not that of a writable image")
	// ErrUpper says that overlayfs cannot keep changes in the upper directory.
	ErrUpper = errors.New("unusable upper directory")
	// ErrBusy says that somebody uses the overlay that was to be unmounted.
	ErrBusy = errors.New("the file system is in use")
)

const (
	// Source is the source of our overlays in the table of mounts.
	Source = "puzzlefs"
	fsType = "overlay"
)

// Dirs are the directories of a writable mount. The paths are absolute, clean and without
// symlinks.
type Dirs struct {
	// Dir is where the overlay is mounted.
	Dir string
	// Lower has the read-only tree, Upper what differs from it. Work is overlayfs' own.
	Lower, Upper, Work string

	fresh bool // the upper directory was just made
}

// Config says what to mount.
type Config struct {
	// Dirs must exist, and the tree be mounted on Lower; [MakeDirs] makes them.
	Dirs Dirs
	// Tree names the tree on Lower, in up to 255 bytes, or is "". It is remembered with the work
	// directory, for as long as that exists.
	Tree string
	// Dev and Suid let device files and set-user-ID bits work, which they do not by default.
	// NoExec keeps programs from being run, NoAtime access times from being written.
	Dev, Suid, NoExec, NoAtime bool
}

func (c *Config) attributes() int {
	attrs := 0
	if !c.Dev {
		attrs |= unix.MOUNT_ATTR_NODEV
	}
	if !c.Suid {
		attrs |= unix.MOUNT_ATTR_NOSUID
	}
	if c.NoExec {
		attrs |= unix.MOUNT_ATTR_NOEXEC
	}
	if c.NoAtime {
		attrs |= unix.MOUNT_ATTR_NOATIME
	}
	return attrs
}

// Mount mounts an overlay. It fails with ErrMounted, ErrUpper or what the system says, and
// nothing is mounted then.
func Mount(cfg Config) (*Overlay, error) {
	o, err := mount(&cfg, layersByDescriptor)
	if err != nil {
		return nil, fmt.Errorf("mount an overlay on %s: %w", cfg.Dirs.Dir, err)
	}
	return o, nil
}

func mount(cfg *Config, layers func(fs int, d Dirs) error) (*Overlay, error) {
	if err := checkFree(cfg.Dirs); err != nil {
		return nil, err
	}
	if cfg.Dirs.fresh {
		if err := copyRoot(cfg.Dirs.Upper, cfg.Dirs.Lower); err != nil {
			return nil, err
		}
	}
	work, err := os.Open(cfg.Dirs.Work) // the overlay may hide it
	if err != nil {
		return nil, err
	}
	defer work.Close()
	if err := attach(cfg, layers); err != nil {
		return nil, err
	}
	previous, err := swapTree(work, cfg.Tree)
	if err != nil {
		return nil, errors.Join(err, unix.Unmount(cfg.Dirs.Dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	// The kernel was given paths in one form and shows them in another: nobody must find
	// other directories than those that are used.
	o, err := Find(cfg.Dirs.Dir)
	if err == nil && (o.Upper != cfg.Dirs.Upper || o.Work != cfg.Dirs.Work || !slices.Equal(o.Lower, []string{cfg.Dirs.Lower})) {
		err = fmt.Errorf("the table of mounts shows lower %q, upper %q and work directory %q: choose a path without odd characters", o.Lower, o.Upper, o.Work)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Unmount(cfg.Dirs.Dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	o.PreviousTree = previous
	return o, nil
}

// treeXattr is where the work directory has the name of the tree. Overlayfs does not show what
// is there.
const treeXattr = "trusted.puzzlefs.tree"

// swapTree remembers the name of a tree, and returns the one before, or "".
func swapTree(work *os.File, tree string) (previous string, err error) {
	if tree == "" {
		return "", nil
	}
	value := make([]byte, 256)
	n, err := unix.Fgetxattr(int(work.Fd()), treeXattr, value)
	if err != nil && !errors.Is(err, unix.ENODATA) {
		return "", fmt.Errorf("read the extended attribute %s of %s: %w", treeXattr, work.Name(), err)
	}
	previous = string(value[:max(n, 0)])
	if previous == tree {
		return previous, nil
	}
	if err := unix.Fsetxattr(int(work.Fd()), treeXattr, []byte(tree), 0); err != nil {
		return "", fmt.Errorf("set the extended attribute %s of %s: %w", treeXattr, work.Name(), err)
	}
	return previous, nil
}

// checkFree makes sure that no other overlay is there or writes to the same directories, which
// the kernel allows and which spoils both.
func checkFree(d Dirs) error {
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return err
	}
	for i := range table {
		if table[i].Type != fsType {
			continue
		}
		switch o := newOverlay(&table[i]); {
		case o.Dir == d.Dir:
			return fmt.Errorf("%w: unmount it first", ErrMounted)
		case o.Upper == d.Upper || o.Work == d.Work:
			return fmt.Errorf("%w on %s and uses %s and %s: unmount it first, or choose another upper directory", ErrMounted, o.Dir, o.Upper, o.Work)
		}
	}
	return nil
}

// attach makes the overlay and mounts it. What is made without being mounted goes away with
// the descriptors.
func attach(cfg *Config, layers func(fs int, d Dirs) error) error {
	fs, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: the kernel has no overlayfs: run modprobe overlay", err)
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: writable mounts need Linux 5.2", err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: the capability CAP_SYS_ADMIN is needed; in a container, a privileged one", err)
	case err != nil:
		return fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(fs)
	if err := configure(fs, cfg, layers); err != nil {
		return explain(fs, cfg.Dirs, err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, cfg.attributes())
	if err != nil {
		return fmt.Errorf("fsmount: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, cfg.Dirs.Dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

func configure(fs int, cfg *Config, layers func(fs int, d Dirs) error) error {
	for _, o := range [][2]string{{"source", Source}, {"redirect_dir", "on"}, {"index", "off"}} {
		if err := unix.FsconfigSetString(fs, o[0], o[1]); err != nil {
			return fmt.Errorf("set %s: %w", o[0], err)
		}
	}
	if err := layers(fs, cfg.Dirs); err != nil {
		return err
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	return nil
}

// layersByDescriptor names the directories by descriptors, so that there is nothing to escape
// and no limit to their names. Kernels before 6.13 do not take them.
func layersByDescriptor(fs int, d Dirs) error {
	for i, layer := range [][2]string{{"lowerdir+", d.Lower}, {"upperdir", d.Upper}, {"workdir", d.Work}} {
		fd, err := unix.Open(layer[1], unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", layer[1], err)
		}
		err = unix.FsconfigSetFd(fs, layer[0], fd)
		_ = unix.Close(fd) // the kernel has its own
		if err != nil && i == 0 && errors.Is(err, unix.EINVAL) {
			return layersByName(fs, d)
		}
		if err != nil {
			return fmt.Errorf("set %s to %s: %w", layer[0], layer[1], err)
		}
	}
	return nil
}

// maxString is how many bytes fsconfig(2) takes for a string.
const maxString = 255

// layersByName names the directories by their paths. Colons would divide a list of lower
// directories, so a backslash goes before them; older kernels differ in where else they look
// for backslashes.
func layersByName(fs int, d Dirs) error {
	for _, layer := range [][2]string{
		{"lowerdir", strings.ReplaceAll(d.Lower, ":", `\:`)}, {"upperdir", d.Upper}, {"workdir", d.Work},
	} {
		if len(layer[1]) > maxString || strings.Contains(strings.ReplaceAll(layer[1], `\:`, ""), `\`) {
			return fmt.Errorf("the path %s is long or has a backslash, for which overlays need Linux 6.13: choose another", layer[1])
		}
		if err := unix.FsconfigSetString(fs, layer[0], layer[1]); err != nil {
			return fmt.Errorf("set %s to %s: %w", layer[0], layer[1], err)
		}
	}
	return nil
}

// unusable names the file systems that overlayfs cannot keep changes on.
func unusable(magic int64) string {
	switch magic {
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "an overlay itself, as the root of a container is"
	case unix.FUSE_SUPER_MAGIC:
		return "a FUSE file system"
	case unix.NFS_SUPER_MAGIC:
		return "NFS"
	}
	return ""
}

// explain adds what the kernel says, and what to do, to an error.
func explain(fs int, d Dirs, err error) error {
	said := messages(fs)
	if said != "" {
		err = fmt.Errorf("%w: %s", err, said)
	}
	var st unix.Statfs_t
	if statErr := unix.Statfs(d.Upper, &st); statErr != nil {
		return err
	}
	if kind := unusable(st.Type); kind != "" {
		return fmt.Errorf("%w: %s is on %s: choose a directory on ext4, XFS, Btrfs or tmpfs for what changes: %w", ErrUpper, d.Upper, kind, err)
	}
	var upper, work unix.Stat_t
	if statErr := errors.Join(unix.Stat(d.Upper, &upper), unix.Stat(d.Work, &work)); statErr == nil && upper.Dev != work.Dev {
		return fmt.Errorf("%w: %s and %s must be on one file system: choose a directory in it, not its root: %w", ErrUpper, d.Upper, d.Work, err)
	}
	if strings.Contains(said, "upperdir") || strings.Contains(said, "workdir") {
		return fmt.Errorf("%w: %s: choose a directory on ext4, XFS, Btrfs or tmpfs for what changes: %w", ErrUpper, d.Upper, err)
	}
	return err
}

// messages returns what the kernel has to say about a file system being made.
func messages(fs int) string {
	var all []string
	for buf := make([]byte, 4096); ; {
		n, err := unix.Read(fs, buf)
		if err != nil || n <= 0 {
			return strings.Join(all, "; ")
		}
		_, text, _ := strings.Cut(strings.TrimSpace(string(buf[:n])), " ") // behind its class
		all = append(all, strings.TrimPrefix(text, "overlay: "))
	}
}
