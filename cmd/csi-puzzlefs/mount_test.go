package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// TestMountOptions: each option of the reference is taken, or refused with the reason.
func TestMountOptions(t *testing.T) {
	for name, test := range map[string]struct {
		lists        []string
		user         bool // not root
		writable     bool
		want         fuse.Config
		warns, fails string
	}{
		"none":            {},
		"no effect":       {lists: []string{"ro,default_permissions,atime", "sync", "dirsync,nodev,nosuid,exec"}},
		"async":           {lists: []string{"async"}},
		"flags":           {lists: []string{"dev,suid", "noexec,noatime"}, want: fuse.Config{Dev: true, Suid: true, NoExec: true, NoAtime: true}},
		"others":          {lists: []string{"allow_other,auto_unmount"}, user: true, want: fuse.Config{AllowOther: true, AutoUnmount: true}},
		"root":            {lists: []string{"allow_root"}, want: fuse.Config{RootOnly: true}},
		"values":          {lists: []string{`fsname=a\,b=c\\d,subtype=puzzlefs`}, want: fuse.Config{FSName: `a,b=c\d`, Subtype: "puzzlefs"}},
		"empty and twice": {lists: []string{"", ",ro,,ro,", "fsname=x,fsname=x"}, want: fuse.Config{FSName: "x"}},
		"end in \\":       {lists: []string{`fsname=x\`}, want: fuse.Config{FSName: `x\`}},
		"rw":              {lists: []string{"rw"}, warns: "-o rw: images are read-only"},
		"rw, writable":    {lists: []string{"rw"}, writable: true},
		"sync, writable":  {lists: []string{"sync"}, writable: true, warns: "-o sync has no effect"},
		"own names":       {lists: []string{"fsname=x,subtype=y"}, want: fuse.Config{FSName: "x", Subtype: "y"}, warns: "cannot tell this mount from others"},

		"unknown":              {lists: []string{"ro,umask=022"}, fails: `-o umask=022: unknown mount option "umask" (known are allow_other, `},
		"misspelt":             {lists: []string{"nodve"}, fails: "did you mean nodev?"},
		"misspelt, with value": {lists: []string{"fsnam=x"}, fails: "did you mean fsname=?"},
		"no value":             {lists: []string{"fsname"}, fails: "a value is missing"},
		"empty value":          {lists: []string{"subtype="}, fails: "a value is missing"},
		"value too much":       {lists: []string{"ro=1"}, fails: "ro takes no value"},
		"two values":           {lists: []string{"fsname=x", "fsname=y"}, fails: "fsname=x was given, too"},
		"contradiction":        {lists: []string{"dev", "nodev"}, fails: "dev and nodev contradict each other"},
		"others and root":      {lists: []string{"allow_root,allow_other"}, fails: "contradict"},
		"dev, no root":         {lists: []string{"dev"}, user: true, fails: "dev and suid are for root"},
		"suid, no root":        {lists: []string{"suid"}, user: true, fails: "dev and suid are for root"},
		"root only, no root":   {lists: []string{"allow_root"}, user: true, fails: "allow_root is for root: the kernel"},
		"ro, writable":         {lists: []string{"ro"}, writable: true, fails: "ro contradicts -w"},
		"root only, writable":  {lists: []string{"allow_root"}, writable: true, fails: "lets every user in"},
		"auto, writable":       {lists: []string{"auto_unmount"}, writable: true, fails: "below the overlay"},
	} {
		t.Run(name, func(t *testing.T) {
			o, err := parseMountOptions(&cobra.Command{}, test.lists, !test.user, test.writable)
			if test.fails != "" {
				var usage *usageError
				if !errors.As(err, &usage) || !strings.Contains(err.Error(), test.fails) {
					t.Errorf("got %v, want an error of usage with %q", err, test.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var cfg fuse.Config
			o.apply(&cfg)
			if got, want := fmt.Sprintf("%+v", cfg), fmt.Sprintf("%+v", test.want); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
			warnings := strings.Join(o.warnings(), "; ")
			if (test.warns == "") != (warnings == "") || !strings.Contains(warnings, test.warns) {
				t.Errorf("warnings %q, want %q", warnings, test.warns)
			}
		})
	}
}

// program returns a path to this binary under the program's name, with the behaviour of that.
func program(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "csi-puzzlefs")
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// smallImage builds an image of one file in the directory and returns LAYOUT:TAG.
func smallImage(t *testing.T, dir string) string {
	t.Helper()
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "greeting"), []byte("hello\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ref := filepath.Join(dir, "layout") + ":t"
	var stderr bytes.Buffer
	if code := run([]string{"build", tree, ref}, &bytes.Buffer{}, &stderr); code != exitOK {
		t.Fatal(stderr.String())
	}
	return ref
}

// stalled is a store whose blobs, once the image is open, come when stall is closed.
type stalled struct {
	*store.Store
	open  bool
	stall chan struct{}
}

func (s *stalled) wait(ctx context.Context) error {
	if !s.open {
		return nil
	}
	select {
	case <-s.stall:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Get implements image.Source.
func (s *stalled) Get(ctx context.Context, d format.Digest, limit int64) ([]byte, error) {
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	return s.Store.Get(ctx, d, limit)
}

// ReadWhole implements image.Source.
func (s *stalled) ReadWhole(ctx context.Context, reads []store.WholeRead) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	return s.Store.ReadWhole(ctx, reads)
}

// ReadBlobAt implements image.Source.
func (s *stalled) ReadBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error) {
	if err := s.wait(ctx); err != nil {
		return 0, err
	}
	return s.Store.ReadBlobAt(ctx, d, p, off)
}

// stall mounts an image of a directory, whose files nobody can read until the test ends or goOn
// is called.
func stall(t *testing.T, dir, mnt string) (goOn func()) {
	t.Helper()
	s, err := store.Open(store.Config{Dir: filepath.Join(t.TempDir(), "layout"), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	r, err := builder.Build(t.Context(), builder.Config{Dir: dir, Store: s, Tag: "t"})
	if err != nil {
		t.Fatal(err)
	}
	source := &stalled{Store: s, stall: make(chan struct{})}
	im, err := image.Open(t.Context(), image.Config{Source: source, Root: r.Manifest})
	if err != nil {
		t.Fatal(err)
	}
	source.open = true
	srv, err := fuse.Mount(fuse.Config{Image: im, Dir: mnt})
	if err != nil {
		t.Fatal(err)
	}
	goOn = sync.OnceFunc(func() { close(source.stall) })
	t.Cleanup(func() {
		goOn()
		if err := errors.Join(srv.Detach(), s.Close()); err != nil {
			t.Error(err)
		}
		srv.Wait()
	})
	return goOn
}

// awaitProcesses waits until there are as many processes of the program with this WORK.
func awaitProcesses(t *testing.T, work string, n int) {
	t.Helper()
	var pids []int
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		var err error
		if pids, err = serversOf(work); err != nil {
			t.Fatal(err)
		}
		if len(pids) == n {
			return
		}
	}
	t.Fatalf("processes %v, want %d", pids, n)
}

// killServers ends what a test that failed has left running: it uses the stalled layout.
func killServers(t *testing.T, work string) {
	t.Helper()
	pids, err := serversOf(work)
	if err != nil {
		t.Error(err)
	}
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL) // it may have ended
	}
}

// nothingLeft makes sure that nothing is mounted, running or left in dir/mnt.
func nothingLeft(t *testing.T, dir string) {
	t.Helper()
	if pids, err := serversOf(dir); err != nil || len(pids) > 0 {
		t.Errorf("left running: %v, %v", pids, err)
	}
	if points, err := mountsBelow(dir); err != nil || len(points) > 0 {
		t.Errorf("left mounted: %v, %v", points, err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "mnt")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestMountInterrupted: Ctrl-C while the server is still at it, and hangs in a system call even,
// leaves nothing behind.
func TestMountInterrupted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting for all users takes root")
	}
	dir := t.TempDir()
	defer unmountBelow(t, dir)
	smallImage(t, dir)
	ref := filepath.Join(t.TempDir(), "stalled")
	if err := errors.Join(os.Mkdir(ref, 0o755), os.Mkdir(filepath.Join(dir, "mnt"), 0o755)); err != nil {
		t.Fatal(err)
	}
	stall(t, filepath.Join(dir, "layout"), ref)
	t.Cleanup(func() { killServers(t, dir) })
	ref += ":t"
	for name, args := range map[string][]string{
		"read-only": {"mount", ref, filepath.Join(dir, "mnt")},
		"writable":  {"mount", "-w", ref, filepath.Join(dir, "mnt")},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(program(t), args...)
			cmd.Env = append(os.Environ(), "WORK="+dir)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			awaitProcesses(t, dir, 2) // the parent and its server
			if err := cmd.Process.Signal(unix.SIGINT); err != nil {
				t.Fatal(err)
			}
			err := cmd.Wait()
			if cmd.ProcessState.ExitCode() != exitError || !strings.Contains(stderr.String(), "csi-puzzlefs: interrupted: mount ") {
				t.Errorf("%v, message %q", err, stderr.String())
			}
			nothingLeft(t, dir)
		})
	}
}

// TestParentKilled: a server whose parent is gone before it could be told unmounts again.
func TestParentKilled(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting for all users takes root")
	}
	for name, flags := range map[string][]string{"read-only": nil, "writable": {"-w"}} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			defer unmountBelow(t, dir)
			smallImage(t, dir)
			layout := filepath.Join(t.TempDir(), "stalled")
			if err := errors.Join(os.Mkdir(layout, 0o755), os.Mkdir(filepath.Join(dir, "mnt"), 0o755)); err != nil {
				t.Fatal(err)
			}
			goOn := stall(t, filepath.Join(dir, "layout"), layout)
			t.Cleanup(func() { killServers(t, dir) })
			cmd := exec.Command(program(t), append([]string{"mount", layout, "t", filepath.Join(dir, "mnt")}, flags...)...)
			cmd.Env = append(os.Environ(), "WORK="+dir)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			awaitProcesses(t, dir, 2)
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // killed
			awaitProcesses(t, dir, 1)
			goOn()
			awaitProcesses(t, dir, 0)
			nothingLeft(t, dir)
		})
	}
}

// TestMountAsUser: who is not root mounts in the background, too, by fusermount3.
func TestMountAsUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("becoming another user, with a device that everybody can open, takes root")
	}
	const nobody = 65534
	dir := t.TempDir()
	defer unmountBelow(t, dir)
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	ref := smallImage(t, dir)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	mnt, prog, device := filepath.Join(dir, "mnt"), filepath.Join(dir, "csi-puzzlefs"), filepath.Join(dir, "fuse")
	// The binary of the test lies where only root can reach it.
	err = errors.Join(os.Link(self, prog), os.Mkdir(mnt, 0o755), os.Chown(mnt, nobody, nobody),
		unix.Mknod(device, unix.S_IFCHR, int(unix.Mkdev(10, 229))), os.Chmod(device, 0o666))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "sh", "-ec", `mount --bind "$1" /dev/fuse
		exec setpriv --reuid=65534 --regid=65534 --clear-groups sh -ec '
			"$1" mount "$2" "$3"
			cat "$3/greeting"
			"$1" umount "$3"
			! "$1" mount -w "$2" "$3"
			! "$1" mount -o suid "$2" "$3"
			! "$1" mount -o allow_root "$2" "$3"' sh "$2" "$3" "$4"`, "sh", device, prog, ref, mnt)
	cmd.Env = append(os.Environ(), "WORK="+dir)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"hello\n", "--writable and --persist are for root", "dev and suid are for root", "allow_root is for root"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	awaitProcesses(t, dir, 0)
	nothingLeft(t, dir)
}

// TestServerLogs: a server in the background logs to the journal where there is one, else to
// syslog, at the level asked for. Both are sockets of the test, in a mount namespace that has
// them where the program looks.
func TestServerLogs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a mount namespace takes root")
	}
	for name, test := range map[string]struct {
		socket string // below /run
		level  string
		want   []string // regular expressions, each for some message
	}{
		"journal": {"systemd/journal/socket", "info", []string{
			`(?s)MESSAGE=mounted .*PRIORITY=6\n.*SYSLOG_IDENTIFIER=csi-puzzlefs\n`, `(?m)^IMAGE=sha256:[0-9a-f]{64}$`, `(?m)^DIR=/.*/mnt$`, `MESSAGE=unmounted `,
		}},
		"journal, debug": {"systemd/journal/socket", "debug", []string{`MESSAGE=fuse message=.*LOOKUP`, `MESSAGE=unmounted `}},
		"syslog":         {"log", "info", []string{`^<30>.* csi-puzzlefs\[\d+\]: mounted image=sha256:[0-9a-f]{64} dir=/.*/mnt\n$`, `: unmounted `}},
		"syslog, debug":  {"log", "debug", []string{`^<31>.*: fuse message=.*LOOKUP`, `: unmounted `}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			ref := smallImage(t, dir)
			socket := filepath.Join(dir, "run", test.socket)
			if err := errors.Join(os.MkdirAll(filepath.Dir(socket), 0o755), os.Mkdir(filepath.Join(dir, "mnt"), 0o755)); err != nil {
				t.Fatal(err)
			}
			conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			messages := make(chan string, 10_000)
			go func() {
				defer close(messages)
				for buf := make([]byte, 64<<10); ; {
					n, err := conn.Read(buf)
					if err != nil {
						return // closed
					}
					messages <- string(buf[:n])
				}
			}()
			cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "sh", "-ec", `mount --bind "$1/run" /run
				"$2" --log-level "$4" mount "$3" "$1/mnt"
				ls "$1/mnt/greeting"
				"$2" umount "$1/mnt"`, "sh", dir, program(t), ref, test.level)
			if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), "warning") {
				t.Fatalf("%v\n%s", err, out)
			}
			left := test.want
			timeout := time.After(10 * time.Second)
			for len(left) > 0 {
				select {
				case m := <-messages:
					for len(left) > 0 && regexp.MustCompile(left[0]).MatchString(m) {
						left = left[1:]
					}
				case <-timeout:
					t.Fatalf("no message like %q", left)
				}
			}
		})
	}
}
