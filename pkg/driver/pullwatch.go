package driver

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// progressGap is the time from the first to the second time that a slow pull is told of; each
// further gap is twice as long.
const progressGap = 30 * time.Second

// audience is who is to hear of a pull: the pods whose calls asked for it. It is safe for
// concurrent use, and its zero value is ready.
type audience struct {
	// fetched is set when something has to be fetched.
	fetched atomic.Bool

	mu   sync.Mutex // guards pods
	pods map[pod]struct{}
}

// add takes p in, if there is a pod.
func (a *audience) add(p pod) {
	if p == (pod{}) {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.pods == nil {
		a.pods = map[pod]struct{}{}
	}
	a.pods[p] = struct{}{}
}

// each calls f for each pod.
func (a *audience) each(f func(pod)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for p := range a.pods {
		f(p)
	}
}

// audienceKey is the key of the *audience in the context of a pull.
type audienceKey struct{}

func withAudience(ctx context.Context, a *audience) context.Context {
	return context.WithValue(ctx, audienceKey{}, a)
}

// audienceOf returns the audience of the pull that ctx is that of, or an empty one.
func audienceOf(ctx context.Context) *audience {
	if a, ok := ctx.Value(audienceKey{}).(*audience); ok {
		return a
	}
	return new(audience)
}

// watchedFetch is fetch for a pull: it is counted, and the pods that wait are told when it
// takes long, and what it took.
func (d *Driver) watchedFetch(ctx context.Context, spec volumeSpec, report func(string)) (format.Digest, error) {
	begin := time.Now()
	to := audienceOf(ctx)
	d.metrics.pullsInFlight.Inc()
	defer d.metrics.pullsInFlight.Dec()
	var progress atomic.Pointer[string]
	stop := d.tellProgress(ctx, to, func() string {
		if text := progress.Load(); text != nil {
			return *text
		}
		return fmt.Sprintf("pulling %v: asking the registry", spec.name())
	})
	defer stop()
	manifest, err := d.fetch(ctx, spec, func(text string) { progress.Store(&text); report(text) })
	took := time.Since(begin)
	d.metrics.pulled(err, to.fetched.Load(), took)
	if err == nil && to.fetched.Load() {
		d.log.InfoContext(ctx, "pulled an image", "image", spec.name(), "manifest", manifest.String(), "took", took)
		text := fmt.Sprintf("pulled %s@%v in %v", spec.repository(), manifest, took.Round(10*time.Millisecond))
		to.each(func(p pod) { d.events.tell(p, corev1.EventTypeNormal, reasonImagePulled, text) })
	}
	return manifest, err
}

// tellProgress tells the pods of a pull how far it is once it has lasted Config.SlowPull, and
// then ever more rarely, until stop is called.
func (d *Driver) tellProgress(ctx context.Context, to *audience, progress func() string) (stop func()) {
	if d.cfg.SlowPull <= 0 {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		repeat(ctx, d.cfg.SlowPull, progressGap, func() {
			text := progress()
			d.log.InfoContext(ctx, "a pull takes long", "progress", text)
			to.each(func(p pod) { d.events.tell(p, corev1.EventTypeNormal, reasonPullSlow, text) })
		})
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// repeat calls f after first, then after gap, and then after twice the time each time, until
// ctx is done.
func repeat(ctx context.Context, first, gap time.Duration, f func()) {
	timer := time.NewTimer(first)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		f()
		timer.Reset(gap)
		gap *= 2
	}
}

// corruptRead tells the pods of all volumes of an image that one of its blobs was corrupt. It is
// called while somebody waits for that blob, and does not make them wait longer.
func (d *Driver) corruptRead(manifest, blob format.Digest) {
	d.metrics.verifyFailures.WithLabelValues(verifyRead).Inc()
	text := fmt.Sprintf("blob %v of image %v was corrupt on node %s and is removed; reads of files that need it fail with EIO "+
		"until a volume of the image is published on this node again, which fetches it: restart the pod", blob, manifest, d.cfg.NodeID)
	for _, vol := range d.volumes.all() {
		if vol.Manifest == manifest && !vol.pending {
			d.events.tell(vol.Pod, corev1.EventTypeWarning, reasonCorruptRead, text)
		}
	}
}
