package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// contender is a way to keep a tree, and to read it again.
type contender struct {
	name string
	// program is what mounts.
	program string
	// builtBy names the contender that it has its images from, if they are not its own.
	builtBy string
	// build makes of a tree what is kept of it at a path that does not exist.
	build func(ctx context.Context, tree, image string) (usage, error)
	// mount shows what is kept in an empty directory. It returns the process that serves it, 0 for the
	// kernel, when the directory can be read.
	mount func(ctx context.Context, image, dir string) (*server, error)
}

// server is the process that serves a mount; nil for the kernel.
type server struct{ cmd *exec.Cmd }

// oursPrefix begins the names of contenders that must not fail.
const oursPrefix = "ours"

// contenders returns all, the one that the others are held against first.
func contenders(ours, theirs string) []contender {
	puzzlefs := func(name, program string, flags ...string) contender {
		return contender{
			name: name, program: program,
			build: func(ctx context.Context, tree, image string) (usage, error) {
				return run(ctx, append([]string{program, "build", tree, image + ":bench"}, flags...)...)
			},
			mount: func(ctx context.Context, image, dir string) (*server, error) {
				return serve(ctx, dir, program, "mount", "-f", image+":bench", dir)
			},
		}
	}
	squashfs := func(ctx context.Context, tree, image string) (usage, error) {
		return run(ctx, "mksquashfs", tree, image, "-comp", "zstd", "-Xcompression-level", "3", "-quiet", "-no-progress")
	}
	return []contender{
		puzzlefs(oursPrefix, ours, "--cache", "none"),
		puzzlefs(oursZstd, ours, "--cache", "none", "-c"),
		puzzlefs(reference, theirs),
		puzzlefs(reference+", zstd", theirs, "-c"),
		{name: directory, program: "mount", mount: func(ctx context.Context, image, dir string) (*server, error) {
			return nil, done(run(ctx, "mount", "--bind", image, dir))
		}},
		{name: squash, program: "mount", build: squashfs, mount: func(ctx context.Context, image, dir string) (*server, error) {
			return nil, done(run(ctx, "mount", "-o", "loop,ro", image, dir))
		}},
		{name: "squashfuse_ll", program: "squashfuse_ll", builtBy: squash, build: squashfs, mount: func(ctx context.Context, image, dir string) (*server, error) {
			return serve(ctx, dir, "squashfuse_ll", "-f", image, dir)
		}},
		{
			name: "EROFS", program: "mount",
			build: func(ctx context.Context, tree, image string) (usage, error) {
				return run(ctx, "mkfs.erofs", "--quiet", image, tree)
			},
			mount: func(ctx context.Context, image, dir string) (*server, error) {
				return nil, done(run(ctx, "mount", "-t", "erofs", "-o", "loop,ro", image, dir))
			},
		},
		{
			name: "casync", program: "casync",
			build: func(ctx context.Context, tree, image string) (usage, error) {
				return run(ctx, "casync", "make", "--store="+image+".castr", image+".caidx", tree)
			},
			mount: func(ctx context.Context, image, dir string) (*server, error) {
				return serve(ctx, dir, "casync", "mount", "--store="+image+".castr", image+".caidx", dir)
			},
		},
	}
}

// usage is what a program took.
type usage struct {
	memory float64 // the most that was resident at a time, in bytes
}

// done leaves out what a program took.
func done(_ usage, err error) error { return err }

// run runs a program. What it says is the error.
func run(ctx context.Context, args ...string) (usage, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		said := out.Bytes()
		return usage{}, fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, said[max(0, len(said)-2000):])
	}
	var u usage
	if r, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		u.memory = float64(r.Maxrss) * 1024
	}
	return u, nil
}

// serve starts a program that mounts something on dir, and waits until it has.
func serve(ctx context.Context, dir string, args ...string) (*server, error) {
	cmd := exec.Command(args[0], args[1:]...) // it ends when its mount is gone
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{cmd}
	if err := waitMounted(ctx, dir); err != nil {
		return nil, errors.Join(err, cmd.Process.Kill(), s.wait())
	}
	return s, nil
}

// wait waits for the end of a server. How it ends when its mount is gone does not matter.
func (s *server) wait() error {
	if s != nil {
		_ = s.cmd.Wait()
	}
	return nil
}

// memory returns the resident memory of a server, in bytes; 0 for the kernel.
func (s *server) memory() (float64, error) {
	if s == nil {
		return 0, nil
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		var kib float64
		if n, err := fmt.Sscanf(line, "VmRSS: %f kB", &kib); n == 1 && err == nil {
			return kib * 1024, nil
		}
	}
	return 0, errors.New("no VmRSS in the status of the server")
}

// mountInfo lists what is mounted.
const mountInfo = "/proc/self/mountinfo"

// waitMounted waits until something is mounted on dir, looking once in half a millisecond.
func waitMounted(ctx context.Context, dir string) error {
	for begin := time.Now(); time.Since(begin) < time.Minute; {
		b, err := os.ReadFile(mountInfo)
		if err != nil {
			return err
		}
		if strings.Contains(string(b), " "+dir+" ") {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond / 2):
		}
	}
	return fmt.Errorf("nothing is mounted on %s after a minute", dir)
}

// mounted mounts an image for as long as use runs.
func (b *bench) mounted(ctx context.Context, c contender, image string, use func(dir string, s *server) error) (err error) {
	dir := b.fresh("mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	s, err := c.mount(ctx, image, dir)
	if err != nil {
		return err
	}
	defer func() {
		if uerr := unmount(dir); uerr != nil {
			err = errors.Join(err, uerr, unix.Unmount(dir, unix.MNT_DETACH))
		}
		err = errors.Join(err, s.wait())
	}()
	return use(dir, s)
}

// unmount waits for those who hold the mount for a moment longer.
func unmount(dir string) error {
	var err error
	for range 100 {
		if err = unix.Unmount(dir, 0); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// kept returns the files and directories that a contender keeps of a tree: image, and names that go on with a dot.
func kept(image string) ([]string, error) {
	names, err := filepath.Glob(image + ".*")
	if _, statErr := os.Lstat(image); statErr == nil {
		names = append(names, image)
	}
	return names, err
}

// empty takes away what is in the files of what is kept of a tree. The files stay, because ext4 makes inodes
// several times slower for some minutes after thousands of files were removed.
func empty(image string) error {
	names, err := kept(image)
	for _, name := range names {
		err = errors.Join(err, filepath.WalkDir(name, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			return os.Truncate(path, 0)
		}))
	}
	return err
}

// sizeOf returns the disk space of what is kept of a tree, which may be several files whose names begin alike,
// in bytes.
func sizeOf(image string) (float64, error) {
	names, err := kept(image)
	if err != nil {
		return 0, err
	}
	total := int64(0)
	for _, name := range names {
		err := filepath.WalkDir(name, func(path string, _ os.DirEntry, err error) error {
			var st unix.Stat_t
			if err == nil {
				err = unix.Lstat(path, &st)
			}
			total += st.Blocks * 512
			return err
		})
		if err != nil {
			return 0, err
		}
	}
	return float64(total), nil
}
