// Package load_test keeps a node busy: many volumes of a few images are published, read and
// unpublished by many workers at once, against the driver as a process of its own and a real
// registry. It looks for what is left over: mounts, descriptors, goroutines, state, memory.
//
// "make load" runs it for five minutes. It prints how long publishing a cached image takes,
// and asserts no time.
package load_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/node"
)

var (
	duration = flag.Duration("load.duration", 20*time.Second, "how long to publish, read and unpublish")
	nVolumes = flag.Int("load.volumes", 200, "volumes at a time")
	nImages  = flag.Int("load.images", 10, "images that the volumes show")
	nWorkers = flag.Int("load.workers", 20, "workers that share the volumes")
)

// filesRead is how many files of a volume a worker reads each time.
const filesRead = 20

// load is one run.
type load struct {
	t      *testing.T
	dir    string
	node   *node.Node
	images []*image

	mu     sync.Mutex // guards what follows
	cached []time.Duration
	cycles int
	reads  int
}

// TestLoad publishes, reads and unpublishes until the time is over, then looks for leaks.
func TestLoad(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root: run as root")
	}
	dir := t.TempDir()
	l := &load{t: t, dir: dir, images: makeImages(t, *nImages)}
	address := freeAddress(t)
	n, err := node.Start(t.Context(), buildDriver(t), dir, "--http-endpoint", address, "--store-reserve", "0")
	if err != nil {
		t.Fatal(err)
	}
	l.node = n
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
		noMounts(t, dir)
	})
	// Every image is pulled, and everything that is made once is made, before counting begins.
	l.run(t.Context(), func(int) bool { return false })
	l.settled()
	before := measure(t, n.PID(), address)
	pulled := len(l.cached)
	l.cached = nil

	end := time.Now().Add(*duration)
	stop := sample(t, n.PID(), address)
	l.run(t.Context(), func(int) bool { return time.Now().Before(end) })
	samples := stop()
	l.settled()
	after := waitFor(t, n.PID(), address, before)

	t.Logf("%d volumes of %d images, %d workers, %v: %d rounds, %d volumes published, %d files read and compared",
		*nVolumes, *nImages, *nWorkers, *duration, l.cycles, len(l.cached)+pulled, l.reads)
	report(t, fmt.Sprintf("beside %d other workers", *nWorkers-1), l.cached)
	report(t, "one after the other, the image mounted anew each time", l.alone(t.Context()))
	report(t, "one after the other, another pod having the image mounted", l.beside(t.Context()))
	t.Logf("before: %v", before)
	t.Logf("after:  %v", after)
	checkLeaks(t, before, after)
	checkMemory(t, samples)
}

// run lets every worker go round its volumes once, and again as long as more says so.
func (l *load) run(ctx context.Context, more func(round int) bool) {
	l.t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make(chan error, *nWorkers)
	var wg sync.WaitGroup
	for w := range *nWorkers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 0))
			for round := 0; ; round++ {
				if err := l.round(ctx, w, rng); err != nil {
					errs <- fmt.Errorf("worker %d, round %d: %w", w, round, err)
					cancel()
					return
				}
				if !more(round) {
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	var first error
	for err := range errs {
		if first == nil || !errors.Is(err, context.Canceled) {
			first = err
		}
	}
	if first != nil {
		l.t.Fatalf("%v\nthe driver's log ends with\n%s", first, tail(l.node.Log()))
	}
}

// round publishes all volumes of a worker, reads from them, and takes them away again.
func (l *load) round(ctx context.Context, worker int, rng *rand.Rand) (err error) {
	share := *nVolumes / *nWorkers
	images := map[string]*image{}
	volumes := make([]node.Volume, 0, share)
	defer func() {
		rng.Shuffle(len(volumes), func(i, j int) { volumes[i], volumes[j] = volumes[j], volumes[i] })
		for _, v := range volumes {
			err = errors.Join(err, l.node.Unpublish(ctx, v), gone(v.Target))
		}
	}()
	took := make([]time.Duration, 0, share)
	for i := range share {
		im := l.images[rng.IntN(len(l.images))]
		v := l.volume(fmt.Sprintf("pod-%d-%d", worker, i), im)
		volumes, images[v.Pod] = append(volumes, v), im
		begin := time.Now()
		if err := l.node.Publish(ctx, v); err != nil {
			return fmt.Errorf("publish: %w", err)
		}
		took = append(took, time.Since(begin))
	}
	for _, v := range volumes {
		if err := images[v.Pod].compare(v.Target, rng); err != nil {
			return err
		}
	}
	// What kubelet does besides: it asks for the size, and publishes again what is published.
	v := volumes[rng.IntN(len(volumes))]
	if bytes, inodes, err := l.node.Stats(ctx, v); err != nil || bytes != images[v.Pod].bytes || inodes == 0 {
		return fmt.Errorf("stats of %s: %d bytes in %d inodes, want %d bytes: %w", v.Pod, bytes, inodes, images[v.Pod].bytes, err)
	}
	if err := l.node.Publish(ctx, v); err != nil {
		return fmt.Errorf("publish again: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cached = append(l.cached, took...)
	l.cycles++
	l.reads += share * filesRead
	return nil
}

// times is how often publishing is timed for each image while nothing else goes on.
const times = 20

// alone returns how long each of some publishes takes while nothing else goes on.
func (l *load) alone(ctx context.Context) []time.Duration {
	l.t.Helper()
	var took []time.Duration
	for i := range times * len(l.images) {
		v := l.volume("alone", l.images[i%len(l.images)])
		begin := time.Now()
		err := l.node.Publish(ctx, v)
		took = append(took, time.Since(begin))
		if err := errors.Join(err, l.node.Unpublish(ctx, v)); err != nil {
			l.t.Fatal(err)
		}
	}
	return took
}

// beside is alone while another pod has a volume of each image.
func (l *load) beside(ctx context.Context) []time.Duration {
	l.t.Helper()
	for i, im := range l.images {
		if err := l.node.Publish(ctx, l.volume(fmt.Sprint("other-", i), im)); err != nil {
			l.t.Fatal(err)
		}
	}
	took := l.alone(ctx)
	for i, im := range l.images {
		if err := l.node.Unpublish(ctx, l.volume(fmt.Sprint("other-", i), im)); err != nil {
			l.t.Fatal(err)
		}
	}
	return took
}

// volume is an image in the place where kubelet would want it.
func (l *load) volume(pod string, im *image) node.Volume {
	return node.Volume{
		Pod:    pod,
		Target: filepath.Join(l.dir, "kubelet", "pods", pod, "volumes", "kubernetes.io~csi", "data", "mount"),
		Image:  im.ref, Digest: im.digest.String(),
	}
}

// settled checks that nothing is published any more.
func (l *load) settled() {
	l.t.Helper()
	noMounts(l.t, l.dir)
	for _, name := range []string{"volumes", "mounts"} {
		entries, err := os.ReadDir(filepath.Join(node.StateDir(l.dir), name))
		if err != nil {
			l.t.Fatal(err)
		}
		for _, e := range entries {
			l.t.Errorf("left over: %s/%s", name, e.Name())
		}
	}
}

// gone fails if something is left at a target.
func gone(target string) error {
	if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("target %s is left over: %w", target, err)
	}
	return nil
}

// noMounts fails if something is mounted below dir.
func noMounts(t *testing.T, dir string) {
	t.Helper()
	mounts, err := node.Mounts(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		t.Errorf("still mounted: %s", m)
	}
}

// report prints how long publishing a cached image takes.
func report(t *testing.T, how string, took []time.Duration) {
	t.Helper()
	slices.Sort(took)
	quantile := func(q float64) time.Duration {
		return took[min(int(q*float64(len(took))), len(took)-1)].Round(10 * time.Microsecond)
	}
	t.Logf("publishing a cached image %s, %d calls: median %v, p99 %v, longest %v", how, len(took), quantile(0.5), quantile(0.99), quantile(1))
}

// tail returns the end of a log.
func tail(log string) string { return log[max(0, len(log)-4000):] }
