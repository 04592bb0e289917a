// Command bench measures this implementation beside others, in one run, on trees that it makes itself: the
// reference implementation of PuzzleFS, squashfs in the kernel and in FUSE, EROFS, casync, and the
// directory itself. It writes tables, charts and all figures. README.md in this directory says what
// was found.
//
// The contenders take turns, so that a machine whose speed drifts treats all alike, and medians count. What
// takes longer than a run should is measured once.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
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
	flag.IntVar(&b.runs, "runs", 5, "runs of each measurement; the median counts")
	flag.DurationVar(&b.slow, "slow", 20*time.Second, "what takes longer is measured once")
	flag.DurationVar(&b.patience, "patience", 2*time.Minute, "what takes longer is given up and counts as failed")
	flag.Float64Var(&b.steal, "steal", 5, "percent of the CPUs that a hypervisor may take for others during a run; if it is more, the run is repeated, twice at most")
	flag.StringVar(&b.only, "only", "", "regular expression: measure what has it in its name, and keep the other results of an earlier run")
	flag.StringVar(&b.who, "who", "", "measure contenders that have one of these in their names: a,b,...")
	flag.StringVar(&b.work, "work", filepath.Join(os.TempDir(), "csi-puzzlefs-bench"), "directory for trees and images; removed at the end")
	flag.StringVar(&b.results, "results", "bench/results", "directory for the results")
	flag.Int64Var(&b.treeBytes, "bytes", 1<<30, "size of the large tree at least, in bytes, as far as the machine has files")
	flag.Int64Var(&b.largeBytes, "large", 1<<30, "size of each large file, in bytes")
	flag.Parse()
	if err := b.run(ctx, os.Getenv("CSI_PUZZLEFS"), os.Getenv("PUZZLEFS_REFERENCE")); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is one run of all measurements.
type bench struct {
	out           *os.File
	runs          int
	slow          time.Duration
	patience      time.Duration
	steal         float64
	only, who     string
	work, results string
	on            string // the file system of work
	treeBytes     int64
	largeBytes    int64
	contenders    []contender
	trees         []tree
	images        map[string]string    // by tree and contender
	buildPeaks    map[string][]float64 // of the builds, the same
	remembered    map[string]string    // the images whose builds are remembered, by contender
	seq           int                  // for names that were never used before
}

func (b *bench) run(ctx context.Context, ours, theirs string) (err error) {
	switch {
	case ours == "":
		return errors.New("CSI_PUZZLEFS does not name the program: use make bench")
	case theirs == "":
		return errors.New("PUZZLEFS_REFERENCE does not name the reference: hack/reference.sh builds it where there is a cargo")
	case os.Geteuid() != 0:
		return errors.New("mounting and dropping caches need root")
	}
	only, err := regexp.Compile(b.only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	for _, program := range []string{"mksquashfs", "squashfuse_ll", "mkfs.erofs", "casync"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("find the contenders: %w: run hack/install-deps.sh bench", err)
		}
	}
	if err := os.Mkdir(b.work, 0o755); err != nil {
		return fmt.Errorf("make the work directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.work)) }()
	if b.on, err = fileSystem(b.work); err != nil {
		return err
	}
	for _, c := range contenders(ours, theirs) {
		if b.who == "" || slices.ContainsFunc(strings.Split(b.who, ","), func(w string) bool { return strings.Contains(c.name, w) }) {
			b.contenders = append(b.contenders, c)
		}
	}
	if b.trees, err = makeTrees(ctx, filepath.Join(b.work, "trees"), b.treeBytes, b.largeBytes); err != nil {
		return fmt.Errorf("make the trees: %w", err)
	}
	b.images, b.buildPeaks, b.remembered = make(map[string]string), make(map[string][]float64), make(map[string]string)
	r := &report{When: time.Now().UTC().Format(time.DateOnly), CPUs: runtime.NumCPU(), Runs: b.runs}
	r.Kernel, r.CPU = kernel(), cpuModel()
	for _, t := range b.trees {
		r.Trees = append(r.Trees, fmt.Sprintf("%s: %d MB in %d paths", t.name, t.bytes/1e6, t.paths))
	}
	if b.only != "" {
		if err := r.continueFrom(b.results); err != nil {
			return err
		}
	}
	all := b.measurements(ours)
	for _, m := range all {
		if !only.MatchString(m.name) {
			continue
		}
		result, err := b.measure(ctx, m)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		if len(result.Figures) == 0 {
			continue // of nobody that takes part, or not here
		}
		r.set(result)
		r.sort(all)
		fmt.Fprint(b.out, result.text())
		// What was measured stays, whatever comes.
		if err := r.write(b.results, aims(b.trees)); err != nil {
			return err
		}
	}
	return nil
}

// measurement is one thing that is measured of some contenders.
type measurement struct {
	name string
	unit unit
	// of returns a figure, or errNotMeasured for a contender that it means nothing for.
	of func(ctx context.Context, c contender) (float64, error)
}

// errNotMeasured says that a contender has no figure.
var errNotMeasured = errors.New("not measured")

// measure lets the contenders take turns.
func (b *bench) measure(ctx context.Context, m measurement) (*result, error) {
	r := &result{Name: m.name, Unit: m.unit, On: b.on}
	out := make(map[string]bool)
	for i := range b.runs {
		// Another begins each run: what the last one left to the kernel to do is not always for the same to bear.
		first := i % len(b.contenders)
		for _, c := range slices.Concat(b.contenders[first:], b.contenders[:first]) {
			if out[c.name] {
				continue
			}
			v, took, err := b.undisturbed(ctx, m, c)
			if errors.Is(err, errNotMeasured) {
				out[c.name] = true
				continue
			}
			if err != nil && (ctx.Err() != nil || strings.HasPrefix(c.name, oursPrefix)) {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			if err != nil {
				// Others may fail, which is a finding.
				fmt.Fprintf(os.Stderr, "bench: %s: %s: %v\n", m.name, c.name, err)
				r.Failed = append(r.Failed, c.name)
				out[c.name] = true
				continue
			}
			r.add(c.name, v)
			out[c.name] = i == 0 && took > b.slow
		}
	}
	return r, nil
}

// breath is how long a hypervisor that took the CPUs away is given.
const breath = 5 * time.Second

// undisturbed measures a contender once, and again if a hypervisor took the CPUs away. It returns the figure
// of which it took least, and how long that was measured.
func (b *bench) undisturbed(ctx context.Context, m measurement, c contender) (v float64, took time.Duration, err error) {
	least := math.Inf(1)
	for try := range 3 {
		if try > 0 {
			select {
			case <-ctx.Done():
				return 0, 0, ctx.Err()
			case <-time.After(breath):
			}
		}
		patient, cancel := context.WithTimeout(ctx, b.patience)
		before, begin := stolen(), time.Now()
		again, failed := m.of(patient, c)
		wall := time.Since(begin)
		cancel()
		share := 0.0
		if lost := stolen() - before; lost > 2*tick && m.unit != bytesUnit {
			share = 100 * lost.Seconds() / wall.Seconds() / float64(runtime.NumCPU())
		}
		if failed != nil && share <= b.steal {
			return 0, wall, failed
		}
		if share < least {
			v, took, err, least = again, wall, failed, share
		}
		if share <= b.steal {
			break
		}
	}
	return v, took, err
}

// tick is what the kernel counts the time of CPUs in.
const tick = time.Second / 100

// stolen returns how much time of the CPUs a hypervisor has given to others, 0 where the kernel does not say.
func stolen() time.Duration {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	var ticks [8]int64 // user, nice, system, idle, iowait, irq, softirq, steal
	if _, err := fmt.Sscanf(string(b), "cpu %d %d %d %d %d %d %d %d", &ticks[0], &ticks[1], &ticks[2], &ticks[3], &ticks[4], &ticks[5], &ticks[6], &ticks[7]); err != nil {
		return 0
	}
	return time.Duration(ticks[7]) * tick
}

// fresh returns a path that does not exist.
func (b *bench) fresh(what string) string {
	b.seq++
	return filepath.Join(b.work, fmt.Sprintf("%s-%d", what, b.seq))
}

// image returns what a contender keeps of a tree, made when it is first asked for.
func (b *bench) image(ctx context.Context, c contender, t tree) (string, error) {
	if c.build == nil {
		return t.dir, nil
	}
	key := cmp.Or(c.builtBy, c.name) + " " + t.name
	if image, ok := b.images[key]; ok {
		return image, nil
	}
	image := b.fresh("image")
	if _, err := c.build(ctx, t.dir, image); err != nil {
		return "", err
	}
	b.images[key] = image
	return image, nil
}

// tmpfs is the file system that no cache is before.
const tmpfs = "tmpfs"

// fileSystem names the file system that a directory lies on.
func fileSystem(dir string) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", fmt.Errorf("find the file system of %s: %w", dir, err)
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC:
		return "ext4", nil
	case unix.TMPFS_MAGIC:
		return tmpfs, nil
	case unix.XFS_SUPER_MAGIC:
		return "XFS", nil
	case unix.BTRFS_SUPER_MAGIC:
		return "Btrfs", nil
	}
	return fmt.Sprintf("file system %#x", st.Type), nil
}

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func cpuModel() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(b)) {
		if name, model, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(model)
		}
	}
	return "unknown"
}
