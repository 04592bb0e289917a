package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Changes of a tree of which aims speak.
const (
	onePlace = "1 % changed in one place"
	allOver  = "1 % changed all over"
)

// measurements returns all that is measured, in the order of the report.
func (b *bench) measurements(ours string) []measurement {
	root, goroot, large, many := b.trees[0], b.trees[1], b.trees[2], b.trees[3]
	var all []measurement
	add := func(name string, u unit, of func(ctx context.Context, c contender) (float64, error)) {
		all = append(all, measurement{name, u, of})
	}
	for _, t := range []tree{root, goroot, large} {
		add("build, "+t.name, seconds, func(ctx context.Context, c contender) (float64, error) { return b.build(ctx, c, t) })
		add("size, "+t.name, bytesUnit, func(ctx context.Context, c contender) (float64, error) { return b.size(ctx, c, t) })
	}
	add("memory of a build, "+root.name, bytesUnit, func(ctx context.Context, c contender) (float64, error) { return b.buildMemory(ctx, c, root) })
	for _, kind := range []change{{"nothing changed", 0, 0}, {onePlace, 1, 100}, {allOver, 100, 100}} {
		add("build again, "+kind.name+", "+root.name, seconds, func(ctx context.Context, c contender) (float64, error) {
			return b.buildAgain(ctx, c, ours, root, kind)
		})
	}
	for _, t := range []tree{many, root} {
		add("mount to first stat, "+t.name, seconds, func(ctx context.Context, c contender) (float64, error) {
			return b.firstStat(ctx, c, t)
		})
	}
	for _, t := range []tree{root, goroot} {
		add("ls -lR cold, "+t.name, seconds, b.reading(t, true, list))
		add("ls -lR warm, "+t.name, seconds, b.reading(t, false, list))
		add("read all cold, "+t.name, seconds, b.reading(t, true, readAll))
		add("read all warm, "+t.name, seconds, b.reading(t, false, readAll))
	}
	for _, name := range []string{randomFile, textFile} {
		add("first sequential read, "+name, bytesPerSecond, func(ctx context.Context, c contender) (float64, error) {
			return b.sequential(ctx, c, large, name, false)
		})
		add("second sequential read, "+name, bytesPerSecond, func(ctx context.Context, c contender) (float64, error) {
			return b.sequential(ctx, c, large, name, true)
		})
		add("4 KiB random reads, "+name, perSecond, func(ctx context.Context, c contender) (float64, error) {
			return b.random(ctx, c, large, name)
		})
	}
	add("memory after reading all, "+root.name, bytesUnit, func(ctx context.Context, c contender) (float64, error) {
		return b.memory(ctx, c, root)
	})
	return all
}

// timed returns how many seconds fn took.
func timed(fn func() error) (float64, error) {
	begin := time.Now()
	err := fn()
	return time.Since(begin).Seconds(), err
}

// build times a build from a tree in the page cache, until all is on the disk.
func (b *bench) build(ctx context.Context, c contender, t tree) (float64, error) {
	if c.build == nil || c.builtBy != "" {
		return 0, errNotMeasured
	}
	if err := errors.Join(readAll(ctx, t.dir), syncFS(b.work)); err != nil {
		return 0, err
	}
	image := b.fresh("built")
	var u usage
	took, err := timed(func() (err error) {
		u, err = c.build(ctx, t.dir, image)
		return errors.Join(err, syncFS(b.work))
	})
	if err != nil {
		return 0, err
	}
	key := c.name + " " + t.name
	b.buildPeaks[key] = append(b.buildPeaks[key], u.memory)
	if _, ok := b.images[key]; !ok {
		b.images[key] = image
		return took, nil
	}
	return took, errors.Join(empty(image), syncFS(b.work))
}

// buildMemory returns the resident memory of the builds that were measured, or of one more.
func (b *bench) buildMemory(ctx context.Context, c contender, t tree) (float64, error) {
	key := c.name + " " + t.name
	if len(b.buildPeaks[key]) == 0 {
		if _, err := b.build(ctx, c, t); err != nil {
			return 0, err
		}
	}
	m := b.buildPeaks[key][0]
	b.buildPeaks[key] = b.buildPeaks[key][1:]
	return m, nil
}

func (b *bench) size(ctx context.Context, c contender, t tree) (float64, error) {
	image, err := b.image(ctx, c, t)
	if err != nil {
		return 0, err
	}
	return sizeOf(image)
}

// buildAgain times a build that remembers an earlier one of the tree, of which files have grown since.
func (b *bench) buildAgain(ctx context.Context, c contender, ours string, t tree, kind change) (float64, error) {
	flags := map[string][]string{oursPrefix: nil, oursZstd: {"-c"}}
	extra, ok := flags[c.name]
	if !ok {
		return 0, errNotMeasured
	}
	image, ok := b.remembered[c.name]
	if !ok {
		image = b.fresh("again")
		b.remembered[c.name] = image
	}
	build := func() error {
		args := append([]string{ours, "build", t.dir, image + ":bench", "--cache", image + ".record"}, extra...)
		return errors.Join(done(run(ctx, args...)), syncFS(b.work))
	}
	// What was changed shortly before a build is read again by the next.
	time.Sleep(3 * time.Second)
	if err := build(); err != nil {
		return 0, err
	}
	restore, err := grow(t.dir, kind, t.paths)
	if err != nil {
		return 0, err
	}
	v, err := timed(build)
	return v, errors.Join(err, restore())
}

// firstStat times from the start of the program that mounts until a file's attributes are known.
func (b *bench) firstStat(ctx context.Context, c contender, t tree) (float64, error) {
	image, err := b.image(ctx, c, t)
	if err != nil {
		return 0, err
	}
	if err := warm(ctx, c, image); err != nil {
		return 0, err
	}
	name, err := someFile(t.dir)
	if err != nil {
		return 0, err
	}
	// Reading it from the disk is not what is measured.
	if _, err := run(ctx, c.program, "--version"); err != nil && !errors.As(err, new(*exec.ExitError)) {
		return 0, err
	}
	begin := time.Now()
	took := 0.0
	err = b.mounted(ctx, c, image, func(dir string, _ *server) error {
		_, err := os.Lstat(filepath.Join(dir, name))
		took = time.Since(begin).Seconds()
		return err
	})
	return took, err
}

// reading times something that is done with a mount: with nothing in any cache of the kernel's, which means
// nothing on tmpfs, or for the second time.
func (b *bench) reading(t tree, cold bool, use func(context.Context, string) error) func(context.Context, contender) (float64, error) {
	return func(ctx context.Context, c contender) (float64, error) {
		if cold && b.on == tmpfs {
			return 0, errNotMeasured
		}
		image, err := b.image(ctx, c, t)
		if err != nil {
			return 0, err
		}
		if cold {
			if err := dropCaches(); err != nil {
				return 0, err
			}
		}
		took := 0.0
		err = b.mounted(ctx, c, image, func(dir string, _ *server) (err error) {
			if !cold {
				if err := use(ctx, dir); err != nil {
					return err
				}
			}
			took, err = timed(func() error { return use(ctx, dir) })
			return err
		})
		return took, err
	}
}

// sequential returns how fast a large file is read whose image is in the page cache, for the first or the second time.
func (b *bench) sequential(ctx context.Context, c contender, t tree, name string, again bool) (float64, error) {
	image, err := b.image(ctx, c, t)
	if err != nil {
		return 0, err
	}
	if err := warm(ctx, c, image); err != nil {
		return 0, err
	}
	speed := 0.0
	err = b.mounted(ctx, c, image, func(dir string, _ *server) error {
		path := filepath.Join(dir, name)
		if again {
			if _, err := readFile(ctx, path); err != nil {
				return err
			}
		}
		var n int64
		took, err := timed(func() (err error) { n, err = readFile(ctx, path); return err })
		speed = float64(n) / took
		return err
	})
	return speed, err
}

// random returns how many pieces of 4 KiB a second are read from anywhere in a large file whose image is in
// the page cache, one after the other.
func (b *bench) random(ctx context.Context, c contender, t tree, name string) (float64, error) {
	image, err := b.image(ctx, c, t)
	if err != nil {
		return 0, err
	}
	if err := warm(ctx, c, image); err != nil {
		return 0, err
	}
	rate := 0.0
	err = b.mounted(ctx, c, image, func(dir string, _ *server) error {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		// Without this the kernel reads ahead of each.
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
			return err
		}
		rng, buf, n := rand.New(rand.NewPCG(1, 2)), make([]byte, 4096), 0
		begin := time.Now()
		for ; time.Since(begin) < 2*time.Second; n++ {
			if _, err := f.ReadAt(buf, rng.Int64N(info.Size()/4096)*4096); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
		}
		rate = float64(n) / time.Since(begin).Seconds()
		return nil
	})
	return rate, err
}

// memory returns the resident memory of a server that everything was read from.
func (b *bench) memory(ctx context.Context, c contender, t tree) (float64, error) {
	image, err := b.image(ctx, c, t)
	if err != nil {
		return 0, err
	}
	used := 0.0
	err = b.mounted(ctx, c, image, func(dir string, s *server) (err error) {
		if s == nil {
			return errNotMeasured
		}
		if err := errors.Join(list(ctx, dir), readAll(ctx, dir)); err != nil {
			return err
		}
		used, err = s.memory()
		return err
	})
	return used, err
}

// warm reads what a contender keeps into the page cache. A directory is read when it is used.
func warm(ctx context.Context, c contender, image string) error {
	if c.build == nil {
		return dropCaches()
	}
	names, err := kept(image)
	for _, name := range names {
		err = errors.Join(err, readAll(ctx, name))
	}
	return err
}

func list(ctx context.Context, dir string) error {
	if err := exec.CommandContext(ctx, "ls", "-lR", dir).Run(); err != nil { // its output goes nowhere
		return fmt.Errorf("ls -lR %s: %w", dir, err)
	}
	return nil
}
