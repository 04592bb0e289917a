package fuse_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func itoa(n int) string { return strconv.Itoa(n) }

// TestPermissions reads as somebody who is not root: owner and mode count.
func TestPermissions(t *testing.T) {
	needRoot(t)
	dir := tree(t, map[string]string{"open": "x", "closed": "x", "own": "x", "d/": "", "d/open": "x"})
	for what, err := range map[string]error{
		"closed": os.Chmod(filepath.Join(dir, "closed"), 0o600),
		"own":    os.Chmod(filepath.Join(dir, "own"), 0o400),
		"owner":  os.Chown(filepath.Join(dir, "own"), nobody, nobody),
		"d":      os.Chmod(filepath.Join(dir, "d"), 0o700),
	} {
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	s, root := build(t, dir)
	_, mnt := mount(t, openImage(t, s, root))
	var paths []string
	for _, p := range []string{"open", "closed", "own", "d", "d/open", "none"} {
		paths = append(paths, filepath.Join(mnt, p))
	}
	// Twice: the kernel keeps the answers, of whatever kind.
	for range 2 {
		const want = "ok\nEACCES\nok\nEACCES\nEACCES\nENOENT\n"
		if got := runs(t, helper(t, nobody, "access", paths...)); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// acl returns the xattr of an ACL: owner rw, group of the file none, a named group rw, mask
// rw, others none.
func acl(group uint32) []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 6, 1<<32 - 1}, {4, 0, 1<<32 - 1}, {8, 6, group}, {16, 6, 1<<32 - 1}, {32, 0, 1<<32 - 1}} {
		b = append(b, byte(e.tag), byte(e.tag>>8), byte(e.perm), byte(e.perm>>8), byte(e.id), byte(e.id>>8), byte(e.id>>16), byte(e.id>>24))
	}
	return b
}

// TestACL reads files whose ACLs say something else than their modes, which show the mask
// in place of the group's permissions.
func TestACL(t *testing.T) {
	needRoot(t)
	dir := tree(t, map[string]string{"denied": "x", "allowed": "x"})
	for name, test := range map[string]struct {
		owner int
		group uint32
	}{"denied": {nobody, 1234}, "allowed": {0, nobody}} {
		path := filepath.Join(dir, name)
		if err := os.Chown(path, 0, test.owner); err != nil {
			t.Fatal(err)
		}
		if err := unix.Lsetxattr(path, "system.posix_acl_access", acl(test.group), 0); errors.Is(err, unix.EOPNOTSUPP) {
			t.Skipf("the file system of the temporary directory has no ACLs: %v", err)
		} else if err != nil {
			t.Fatal(err)
		}
	}
	s, root := build(t, dir)
	_, mnt := mount(t, openImage(t, s, root))
	for range 2 {
		const want = "EACCES\nok\n"
		if got := runs(t, helper(t, nobody, "access", filepath.Join(mnt, "denied"), filepath.Join(mnt, "allowed"))); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	value := make([]byte, 100)
	n, err := unix.Lgetxattr(filepath.Join(mnt, "denied"), "system.posix_acl_access", value)
	if err != nil || string(value[:n]) != string(acl(1234)) {
		t.Errorf("the ACL is %x, %v, want %x", value[:n], err, acl(1234))
	}
}

// TestIDMapped maps owners to other users, as is done for pods with user namespaces.
func TestIDMapped(t *testing.T) {
	_, dir := mount(t, awkward(t))
	// The mapping is that of a user namespace, which needs a process.
	cmd := helper(t, 0, "sleep")
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100_000, Size: 1000}}
	cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = ids, ids
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	limit, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	if errors.Is(err, os.ErrNotExist) || err == nil && strings.TrimSpace(string(limit)) == "0" {
		t.Skip("no user namespaces here")
	} else if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stdin.Close(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait() // at the end of its input it fails
	}()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); !strings.HasPrefix(line, "ready") {
		t.Fatalf("the helper said %q, %v", line, err)
	}
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer namespace.Close()
	clone, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(clone)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(namespace.Fd())}
	if err := unix.MountSetattr(clone, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		t.Fatalf("map the IDs of the mount: %v", err)
	}
	target := tempDir(t)
	if err := unix.MoveMount(clone, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	for path, want := range map[string][2]uint32{"a": {100_007, 100_008}, "sub": {100_000, 100_000}} {
		if got := lstat(t, filepath.Join(target, path)); got.UID != want[0] || got.GID != want[1] {
			t.Errorf("%s belongs to %d:%d, want %d", path, got.UID, got.GID, want)
		}
	}
	if b, err := os.ReadFile(filepath.Join(target, "a")); len(b) != 5000 || err != nil {
		t.Errorf("read: %d bytes, %v", len(b), err)
	}
}
