package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// nobody is a user who owns nothing.
const nobody = 65534

// runHelper does in a process of its own what a test cannot do: be somebody else, be
// interrupted, hang, or fault on a page that the test's own process must deliver.
func runHelper(name string, args []string) int {
	helpers := map[string]func(args []string) error{
		"access":      helpAccess,
		"autounmount": helpAutoUnmount,
		"cat":         helpCat,
		"direct":      helpDirect,
		"forbidden":   func(args []string) error { return helpMount(args[0], args[1]) },
		"mmap":        helpMmap,
		"namespace":   helpNamespace,
		"nodevice":    helpNoDevice,
		"powerless":   helpPowerless,
		"user":        helpUser,
		"sleep":       helpSleep,
	}
	if err := helpers[name](args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// helpAccess prints the result of opening each path.
func helpAccess(paths []string) error {
	for _, path := range paths {
		f, err := os.Open(path)
		var errno unix.Errno
		switch {
		case err == nil:
			fmt.Println("ok")
			_ = f.Close()
		case errors.As(err, &errno):
			fmt.Println(unix.ErrnoName(errno))
		default:
			return err
		}
	}
	return nil
}

// helpCat prints a file, read through the page cache.
func helpCat(args []string) error {
	b, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(b)
	return err
}

// helpDirect reads once with O_DIRECT and prints the error. Before, it prints its thread,
// which waits in the kernel for the answer. SIGINT does not end it.
func helpDirect(args []string) error {
	runtime.LockOSThread()
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT)
	fd, err := unix.Open(args[0], unix.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	fmt.Println(unix.Gettid())
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	if _, err = unix.Read(fd, buf); err == nil {
		return errors.New("the read succeeded")
	}
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return fmt.Errorf("read did not fail as system calls do: %w", err)
	}
	fmt.Println(unix.ErrnoName(errno))
	return nil
}

// helpMmap prints a file through a mapping.
func helpMmap(args []string) error {
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(b)
	return err
}

// openLayout opens the image that LAYOUT:TAG names.
func openLayout(ref string) (*image.Image, error) {
	dir, tag, err := store.SplitRef(ref)
	if err != nil {
		return nil, err
	}
	s, err := store.Open(store.Config{Dir: dir})
	if err != nil {
		return nil, err
	}
	root, err := s.Resolve(tag)
	if err != nil {
		return nil, err
	}
	return image.Open(context.Background(), image.Config{Source: s, Root: root})
}

// helpMount tries to mount an image, and prints the error.
func helpMount(ref, dir string) error {
	img, err := openLayout(ref)
	if err != nil {
		return err
	}
	s, err := fuse.Mount(fuse.Config{Image: img, Dir: dir})
	if err == nil {
		return errors.Join(errors.New("mounted, against all expectation"), s.Detach())
	}
	fmt.Println(err)
	return nil
}

// helpAutoUnmount mounts an image, says so, and serves it until it is killed.
func helpAutoUnmount(args []string) error {
	img, err := openLayout(args[0])
	if err != nil {
		return err
	}
	s, err := fuse.Mount(fuse.Config{Image: img, Dir: args[1], FSName: "autounmount", AutoUnmount: true})
	if err != nil {
		return err
	}
	fmt.Println("mounted")
	s.Wait()
	return errors.New("unmounted")
}

// helpNoDevice is to be run with a mount table of its own. It tries to mount where there is
// no /dev/fuse.
func helpNoDevice(args []string) error {
	if err := unix.Mount("none", "/dev", "tmpfs", 0, ""); err != nil {
		return err
	}
	return helpMount(args[0], args[1])
}

// helpPowerless tries to mount as root without any capability.
func helpPowerless(args []string) error {
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	none := [2]unix.CapUserData{}
	if err := unix.Capset(&header, &none[0]); err != nil {
		return err
	}
	return helpMount(args[0], args[1])
}

// helpNamespace is to be run with a mount table of its own. It makes a /dev/fuse that
// everybody can open, and runs the helper "user" as somebody else.
func helpNamespace(args []string) error {
	dir, ref, mountPoint := args[0], args[1], args[2]
	node := filepath.Join(dir, "fuse")
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))); err != nil {
		return err
	}
	if err := os.Chmod(node, 0o666); err != nil {
		return err
	}
	if err := unix.Mount(node, "/dev/fuse", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", ref, mountPoint)
	cmd.Env = append(os.Environ(), helperVar+"=user")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// helpUser mounts, reads and unmounts as a user that is not root, and prints what it saw.
func helpUser(args []string) error {
	img, err := openLayout(args[0])
	if err != nil {
		return err
	}
	dir := args[1]
	_, err = fuse.Mount(fuse.Config{Image: img, Dir: dir, AllowOther: true})
	fmt.Println("allow_other:", err)
	s, err := fuse.Mount(fuse.Config{Image: img, Dir: dir, FSName: `a,b\c`})
	if err != nil {
		return err
	}
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return err
	}
	m := table.At(dir)[0]
	fmt.Println("mount:", m.Type, m.Source, strings.Join(m.Options, ","), strings.Join(m.SuperOptions, ","))
	b, err := os.ReadFile(filepath.Join(dir, "file"))
	if err != nil {
		return err
	}
	fmt.Printf("read: %s\n", b)
	_, err = os.ReadFile(filepath.Join(dir, "closed"))
	fmt.Println("closed:", errors.Is(err, os.ErrPermission))
	f, err := os.Open(filepath.Join(dir, "file"))
	if err != nil {
		return err
	}
	err = s.Unmount()
	fmt.Println("busy:", errors.Is(err, fuse.ErrBusy), fuse.Unmount(dir, false) != nil)
	if err := f.Close(); err != nil {
		return err
	}
	if err := fuse.Unmount(dir, false); err != nil {
		return err
	}
	s.Wait()
	fmt.Println("again:", errors.Is(fuse.Unmount(dir, false), fuse.ErrNotMounted))
	if s, err = fuse.Mount(fuse.Config{Image: img, Dir: dir}); err != nil {
		return err
	}
	if err := s.Detach(); err != nil {
		return err
	}
	s.Wait()
	fmt.Println("done")
	return nil
}

// helpSleep waits until it is killed: its user namespace is what it is for.
func helpSleep([]string) error {
	fmt.Println("ready")
	_, err := os.Stdin.Read(make([]byte, 1))
	return err
}

// unsafeBuffer returns a buffer of n bytes aligned for O_DIRECT.
func unsafeBuffer(n int) []byte {
	b := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & 4095
	return b[skip : skip+n]
}
