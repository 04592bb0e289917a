package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Where a node has what it does not have of its own.
const (
	// kubeDir and programsDir have the programs.
	kubeDir     = "/opt/kube"
	programsDir = "/opt/node"
)

// mountOne mounts a file system; the error says which.
func mountOne(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
	return nil
}

// bind shows a file or directory, and what is mounted below it, at another place, made if it is not there,
// read-only if said so.
func bind(source, target string, readOnly bool) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(target, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(target), 0o755); err == nil {
		err = os.WriteFile(target, nil, 0o644)
	}
	if err != nil && !errors.Is(err, unix.EROFS) {
		return err
	}
	if err := mountOne(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil || !readOnly {
		return err
	}
	// Another call than mount, which would leave what is mounted below writable.
	if err := unix.MountSetattr(unix.AT_FDCWD, target, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fmt.Errorf("make %s read-only: %w", target, err)
	}
	return nil
}

// mountSystem mounts at root what the kernel shows of this process's namespaces.
func mountSystem(root string) error {
	// Asked of what is mounted at / now, which this may cover.
	cgroups, err := hierarchies()
	if err != nil {
		return err
	}
	if err := mountOne("proc", filepath.Join(root, "proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := mountOne("sysfs", filepath.Join(root, "sys"), "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	return mountCgroups(root, cgroups)
}

// own are the directories that a node has for itself, by their modes. What is in them stays when
// the node is rebooted.
func own() map[string]os.FileMode {
	return map[string]os.FileMode{
		"etc": 0o755, "var": 0o755, "opt": 0o755, "home": 0o755, "mnt": 0o755, "srv": 0o755, "media": 0o755,
		"root": 0o700, "tmp": 0o777 | os.ModeSticky,
		// Mount points.
		"proc": 0o755, "sys": 0o755, "dev": 0o755, "run": 0o755,
	}
}

// configuration is what a node has of this machine's /etc, where it is there: what programs and
// libraries look into.
func configuration() []string {
	return []string{
		"passwd", "group", "nsswitch.conf", "protocols", "services", "ethertypes",
		"ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "ssl", "ca-certificates", "pki",
	}
}

// makeRoot makes a node's root directory with mounts for this process's namespaces, and changes
// to it. Nothing of this machine is writable in it but /dev.
func (s *nodeSpec) makeRoot() error {
	// Nothing that is mounted here is seen outside, and nothing mounted outside is seen here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	in := func(name string) string { return filepath.Join(s.Root, name) }
	if err := os.MkdirAll(s.Root, 0o755); err != nil {
		return err
	}
	if err := mountOne(s.Root, s.Root, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	for name, mode := range own() {
		if err := os.MkdirAll(in(name), 0o755); err != nil {
			return err
		}
		if err := os.Chmod(in(name), mode); err != nil {
			return err
		}
	}
	if err := s.bindMachine(); err != nil {
		return err
	}
	if err := mountOne("tmpfs", in("run"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return err
	}
	if err := mountSystem(s.Root); err != nil {
		return err
	}
	for source, target := range map[string]string{s.Kube: kubeDir, s.Programs: programsDir} {
		source, err := filepath.EvalSymlinks(source)
		if err != nil {
			return err
		}
		if err := bind(source, in(target), true); err != nil {
			return err
		}
	}
	return s.pivot()
}

// bindMachine shows the programs and libraries of this machine, and its devices.
func (s *nodeSpec) bindMachine() error {
	in := func(name string) string { return filepath.Join(s.Root, name) }
	for _, name := range []string{"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		info, err := os.Lstat("/" + name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			if err := bind("/"+name, in(name), true); err != nil {
				return err
			}
			continue
		}
		target, err := os.Readlink("/" + name)
		if err != nil {
			return err
		}
		if err := os.Symlink(target, in(name)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	for _, name := range configuration() {
		if err := bind("/etc/"+name, in("etc/"+name), true); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return bind("/dev", in("dev"), false)
}

// pivot makes the node's root directory this process's root, of which nothing else is seen. It is shared,
// as systemd makes it: kubelet relies on that.
func (s *nodeSpec) pivot() error {
	if err := os.Chdir(s.Root); err != nil {
		return err
	}
	// Both at one place: the old root is then mounted over the new one, and off again.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root to %s: %w", s.Root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	return nil
}
