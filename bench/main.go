// Command bench times this implementation against the reference, side by side in one run,
// on a tree that it makes itself. It prints a table of medians and ratios. README.md in
// this directory says what was found.
//
// Every figure is of a whole process, what it wrote synced to disk included. The sides
// take turns, so that a machine whose speed drifts treats both alike.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	b := &bench{out: os.Stdout}
	flag.IntVar(&b.runs, "runs", 5, "runs of each command; the median counts")
	flag.StringVar(&b.only, "only", "", "run the benchmarks whose name contains this")
	flag.StringVar(&b.work, "work", filepath.Join(os.TempDir(), "csi-puzzlefs-bench"), "directory for corpus and images; removed at the end")
	flag.Int64Var(&b.corpusBytes, "bytes", 1<<30, "size of the corpus at least, in bytes, as far as the machine has files")
	flag.Parse()
	b.ours, b.reference = os.Getenv("CSI_PUZZLEFS"), os.Getenv("PUZZLEFS_REFERENCE")
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is one run of all benchmarks.
type bench struct {
	out             *os.File
	runs            int
	only            string
	work            string
	corpusBytes     int64
	ours, reference string // the programs
	corpus          string
	seq             int // for names that were never used before
}

// side is an implementation.
type side struct{ name, program string }

// row is one benchmark: what is timed of a side, after what preparation.
type row struct {
	name string
	// prepare runs before each run and is not timed; it may be nil.
	prepare func(ctx context.Context, s side) error
	// timed returns how long the thing to be measured took.
	timed func(ctx context.Context, s side) (time.Duration, error)
}

func (b *bench) run(ctx context.Context) (err error) {
	switch {
	case b.ours == "":
		return errors.New("CSI_PUZZLEFS does not name the program: use make bench")
	case b.reference == "":
		return errors.New("PUZZLEFS_REFERENCE does not name the reference: hack/reference.sh builds it where there is a cargo")
	case os.Geteuid() != 0:
		return errors.New("mounting and dropping caches need root")
	}
	if err := os.Mkdir(b.work, 0o755); err != nil {
		return fmt.Errorf("make the work directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.work)) }()
	b.corpus = filepath.Join(b.work, "corpus")
	size, err := makeCorpus(ctx, b.corpus, b.corpusBytes)
	if err != nil {
		return fmt.Errorf("make the corpus: %w", err)
	}
	fmt.Fprintf(b.out, "corpus: %d MB in %d paths; %d CPUs; medians of %d runs, seconds\n\n", size.bytes/1e6, size.paths, runtime.NumCPU(), b.runs)
	sides := []side{{"ours", b.ours}, {"reference", b.reference}}
	for _, s := range sides {
		if _, err := b.build(ctx, s, b.image(s)); err != nil {
			return err
		}
	}
	fmt.Fprintf(b.out, "| | ours | reference | reference/ours |\n|---|---|---|---|\n")
	for _, r := range b.rows() {
		if !strings.Contains(r.name, b.only) {
			continue
		}
		if err := b.compare(ctx, r, sides); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	return nil
}

// compare runs a benchmark for both sides in turn and prints its row.
func (b *bench) compare(ctx context.Context, r row, sides []side) error {
	times := make([][]time.Duration, len(sides))
	for range b.runs {
		for i, s := range sides {
			if r.prepare != nil {
				if err := r.prepare(ctx, s); err != nil {
					return fmt.Errorf("%s: prepare: %w", s.name, err)
				}
			}
			d, err := r.timed(ctx, s)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			times[i] = append(times[i], d)
		}
	}
	ours, theirs := median(times[0]), median(times[1])
	fmt.Fprintf(b.out, "| %s | %.2f | %.2f | %.1f |\n", r.name, ours.Seconds(), theirs.Seconds(), theirs.Seconds()/ours.Seconds())
	return nil
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// image names the image that a side reads.
func (b *bench) image(s side) string { return filepath.Join(b.work, "image-"+s.name) + ":bench" }

// fresh returns a path that does not exist.
func (b *bench) fresh(what string) string {
	b.seq++
	return filepath.Join(b.work, fmt.Sprintf("%s-%d", what, b.seq))
}

func (b *bench) rows() []row {
	cold := func(context.Context, side) error { return dropCaches() }
	build := func(ctx context.Context, s side) (time.Duration, error) {
		return b.build(ctx, s, b.fresh("layout")+":bench")
	}
	extract := func(ctx context.Context, s side) (time.Duration, error) {
		return b.synced(ctx, s.program, "extract", b.image(s), b.fresh("extracted"))
	}
	list := func(ctx context.Context, dir string) error {
		return exec.CommandContext(ctx, "ls", "-lR", dir).Run() // its output goes nowhere
	}
	mounted := func(use func(context.Context, string) error) func(context.Context, side) (time.Duration, error) {
		return func(ctx context.Context, s side) (time.Duration, error) { return b.mounted(ctx, s, use) }
	}
	return []row{
		{"build, warm", warmUp(b.corpus), build},
		{"build, cold", cold, build},
		{"mount + `ls -lR`, cold", cold, mounted(list)},
		{"mount + `ls -lR`, warm", b.warmImage, mounted(list)},
		{"mount + read all, cold", cold, mounted(readAll)},
		{"mount + read all, warm", b.warmImage, mounted(readAll)},
		{"extract, warm", b.warmImage, extract},
	}
}

// warmImage reads the blobs of a side's image into the page cache.
func (b *bench) warmImage(ctx context.Context, s side) error {
	dir, _, _ := strings.Cut(b.image(s), ":")
	return readAll(ctx, dir)
}

func warmUp(dir string) func(context.Context, side) error {
	return func(ctx context.Context, _ side) error { return readAll(ctx, dir) }
}

func (b *bench) build(ctx context.Context, s side, image string) (time.Duration, error) {
	return b.synced(ctx, s.program, "build", b.corpus, image)
}

// synced times a program and a sync of the file system it wrote to.
func (b *bench) synced(ctx context.Context, program string, args ...string) (time.Duration, error) {
	begin := time.Now()
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%s %s: %w\n%s", program, strings.Join(args, " "), err, tail(out))
	}
	if err := syncFS(b.work); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}

// tail returns the end of a program's output, which may be long.
func tail(out []byte) []byte { return out[max(0, len(out)-2000):] }

// mounted times the mounting of a side's image and the use of the mount.
func (b *bench) mounted(ctx context.Context, s side, use func(context.Context, string) error) (d time.Duration, err error) {
	dir := b.fresh("mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return 0, err
	}
	begin := time.Now()
	cmd := exec.Command(s.program, "mount", "-f", b.image(s), dir)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() {
		if uerr := unix.Unmount(dir, 0); uerr != nil {
			err = errors.Join(err, fmt.Errorf("unmount %s: %w", dir, uerr), unix.Unmount(dir, unix.MNT_DETACH))
		}
		// A server whose mount is gone ends by itself; how does not matter here.
		_ = cmd.Wait()
	}()
	if err := waitMounted(ctx, dir); err != nil {
		return 0, err
	}
	if err := use(ctx, dir); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}

// waitMounted waits until something is mounted on dir, looking once a millisecond.
func waitMounted(ctx context.Context, dir string) error {
	for range 30_000 {
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return err
		}
		if strings.Contains(string(b), " "+dir+" ") {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	return fmt.Errorf("nothing is mounted on %s after 30 s", dir)
}
