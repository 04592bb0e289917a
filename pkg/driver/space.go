package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

const (
	// spaceEvery is how often the store is held against its limits when nothing happens: others
	// fill the disk, too.
	spaceEvery = 5 * time.Minute
	// orphansEvery is how often blobs of no image are looked for, orphanAge how old they must be.
	// Those of a pull that failed help the next attempt until then, unless space is wanted.
	orphansEvery = time.Hour
	orphanAge    = time.Hour
	// lowWatermark is how many percent of the quota are left when it was exceeded, so that the
	// next pulls need no collection.
	lowWatermark = 90
	// fullAtLeast is how many bytes are freed at least when the disk was full.
	fullAtLeast = 16 << 20
)

// space keeps the store within its limits. It is safe for concurrent use.
type space struct {
	store *store.Store
	pins  *store.Pins
	log   *slog.Logger
	// quota is how many bytes blobs may take up, 0 for any number; reserve is how much of the
	// disk is to stay free.
	quota   int64
	reserve Reserve
	// known are the images that have records, forget removes such a record.
	known  func() []format.Digest
	forget func(format.Digest) error

	// collecting is held during a survey or a collection. It comes before mu.
	collecting sync.Mutex
	// woken asks run for a check.
	woken chan struct{}

	mu sync.Mutex // guards the fields below
	// used is what blobs take up: as surveyed last, and what came since. It is never too low,
	// but for what other programs write; it is too high until the next survey when others
	// remove blobs. stale says that nobody surveyed since images were pinned or unpinned.
	used     int64
	surveyed bool
	stale    bool
	// begun is what was ever begun to be written, writing that part of it that is not done.
	begun, writing int64
	// promised is what pulls under way may yet write.
	promised int64
	pinned   int64 // as surveyed last
	totals   collectedTotals
}

// collectedTotals counts what collections removed since the driver started.
type collectedTotals struct {
	images, blobs, bytes int64
}

// storeUsage is what there is to know of the store for those who watch it. Bytes are those on
// the disk.
type storeUsage struct {
	// bytes is what blobs take up, pinned what those of mounted and pinned images do, as of
	// the last survey: some minutes ago at most, and an hour for what the store commands did.
	bytes, pinned int64
	// quota is 0 for none. free is what the disk has, reserve what of it is to stay.
	quota, free, reserve int64
	// evictedImages, removedBlobs and removedBytes only grow.
	evictedImages, removedBlobs, removedBytes int64
}

// openSpace opens the pins and prepares what keeps the store within its limits.
func (d *Driver) openSpace(pins string, st *store.Store) (err error) {
	if d.pins, err = store.OpenPins(store.PinsConfig{Dir: pins, Create: true}); err != nil {
		return err
	}
	d.space = &space{
		store: st, pins: d.pins, log: d.log, quota: d.cfg.StoreQuota, reserve: d.cfg.StoreReserve,
		known: d.images.known, forget: d.images.forget, woken: make(chan struct{}, 1),
	}
	return nil
}

// watchSpace begins to watch the limits. stop ends it and waits for it.
func (d *Driver) watchSpace(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); d.space.run(ctx) }()
	return func() { cancel(); <-done }
}

// mountPin begins the names of the pins of mounted images.
const mountPin = "mount"

// pinMount pins an image that is about to be mounted.
func (d *Driver) pinMount(ctx context.Context, manifest format.Digest) (unpin func(), err error) {
	name := d.pins.NewName(mountPin)
	err = d.space.relieved(ctx, func() error { return d.pins.Pin(manifest, name, "mounted by the driver") })
	if err != nil {
		return nil, err
	}
	unpin = func() {
		err := d.at(stepUnpublishEnded)
		if err == nil {
			err = d.pins.Unpin(manifest, name)
		}
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			d.log.Error("cannot unpin an image that is not mounted any more; the next start does", "image", manifest.String(), "error", err)
		}
		d.space.wake()
	}
	if err := d.at(stepPublishPinned); err != nil {
		unpin()
		return nil, err
	}
	return unpin, nil
}

// unpinMounts removes the pins of an earlier driver's mounts.
func (d *Driver) unpinMounts(pins []store.Pin) {
	for _, p := range pins {
		if !strings.HasPrefix(p.Name, mountPin+"-") {
			continue
		}
		if err := d.pins.Unpin(p.Image, p.Name); err != nil && !errors.Is(err, store.ErrNotFound) {
			d.log.Error("cannot remove the pin of an earlier driver's mount", "image", p.Image.String(), "error", err)
		}
	}
}

// touch notes that an image is used. What goes wrong costs its place in the order of eviction.
func (d *Driver) touch(manifest format.Digest) {
	if err := d.images.store.Touch(manifest); err != nil {
		d.log.Debug("cannot note the use of an image", "image", manifest.String(), "error", err)
	}
}

// usage returns what is known without asking the disk for more than its free space.
func (sp *space) usage() (storeUsage, error) {
	free, total, err := sp.store.Free()
	sp.mu.Lock()
	defer sp.mu.Unlock()
	return storeUsage{
		bytes: sp.used, pinned: sp.pinned, quota: sp.quota, free: free, reserve: sp.reserve.of(total),
		evictedImages: sp.totals.images, removedBlobs: sp.totals.blobs, removedBytes: sp.totals.bytes,
	}, err
}

// run watches the limits until ctx is done.
func (sp *space) run(ctx context.Context) {
	tick := time.NewTicker(spaceEvery)
	defer tick.Stop()
	lastOrphans := time.Now()
	for first := true; ; first = false {
		var err error
		switch {
		case first:
			err = sp.survey(ctx)
		case time.Since(lastOrphans) >= orphansEvery:
			lastOrphans = time.Now()
			err = sp.collect(ctx, true)
		}
		if err == nil {
			err = sp.check(ctx)
		}
		if err != nil && ctx.Err() == nil {
			sp.log.Error("cannot keep the store within its limits, trying again later", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-sp.woken:
		case <-tick.C:
			if err := sp.refresh(ctx); err != nil && ctx.Err() == nil {
				sp.log.Error("cannot survey the store", "error", err)
			}
		}
	}
}

// wake asks for a check soon: something was pulled or unpinned.
func (sp *space) wake() {
	sp.mu.Lock()
	sp.stale = true
	sp.mu.Unlock()
	select {
	case sp.woken <- struct{}{}:
	default:
	}
}

// check evicts what the limits want gone. While nothing is wanted it costs one system call.
func (sp *space) check(ctx context.Context) error {
	if _, want, err := sp.excess(0); err != nil || want <= 0 {
		return err
	}
	return sp.collect(ctx, false)
}

// collect evicts what the limits want gone, and old orphans if it is told to.
func (sp *space) collect(ctx context.Context, orphans bool) error {
	sp.collecting.Lock()
	defer sp.collecting.Unlock()
	opts := store.CollectOptions{OrphanAge: orphanAge}
	if !orphans {
		if _, want, err := sp.excess(0); err != nil || want <= 0 {
			return err // another collection was faster
		}
	}
	_, err := sp.collectFor(ctx, opts, 0, func(_, want int64) (int64, int64) { return 0, want })
	return err
}

// collectFor is one collection that wants what limit makes of what the limits want for need further
// bytes. The caller holds collecting.
func (sp *space) collectFor(ctx context.Context, opts store.CollectOptions, need int64, limit func(must, want int64) (int64, int64)) (store.Collected, error) {
	settle := sp.begin()
	opts.Further, opts.Forget = sp.known(), sp.forget
	var freeErr error
	opts.Want = func(used int64) (must, want int64) {
		settle(used)
		must, want, freeErr = sp.excess(need)
		return limit(must, want)
	}
	begin := time.Now()
	c, err := sp.store.Collect(ctx, sp.pins, opts)
	sp.mu.Lock()
	sp.used -= c.Bytes
	sp.pinned = c.Pinned
	sp.totals.images += int64(len(c.Evicted))
	sp.totals.blobs += int64(c.Blobs)
	sp.totals.bytes += c.Bytes
	sp.mu.Unlock()
	for _, e := range c.Evicted {
		sp.log.Info("evicted an image that no volume uses", "image", e.Image.String(), "bytes", e.Bytes, "last_use", e.LastUse)
	}
	if c.Blobs > 0 {
		sp.log.Info("made room in the store", "blobs", c.Blobs, "bytes", c.Bytes, "left", c.Left, "pinned", c.Pinned, "took", time.Since(begin))
	}
	return c, errors.Join(err, freeErr)
}

// begin notes that the blobs on the disk are about to be counted, and returns the function that
// takes the result.
func (sp *space) begin() (settle func(used int64)) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	begun, writing := sp.begun, sp.writing
	return func(used int64) {
		sp.mu.Lock()
		defer sp.mu.Unlock()
		sp.used = used + writing + sp.begun - begun
		sp.surveyed, sp.stale = true, false
	}
}

// survey counts what there is.
func (sp *space) survey(ctx context.Context) error {
	sp.collecting.Lock()
	defer sp.collecting.Unlock()
	settle := sp.begin()
	v, err := sp.store.Survey(ctx, sp.pins, sp.known())
	if err != nil {
		return err
	}
	settle(v.Bytes)
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.pinned = v.PinnedBytes
	return nil
}

// refresh surveys again if something changed.
func (sp *space) refresh(ctx context.Context) error {
	sp.mu.Lock()
	stale := sp.stale
	sp.mu.Unlock()
	if !stale {
		return nil
	}
	return sp.survey(ctx)
}

// excess returns how many bytes must go for need more to fit beside what is there and what is
// promised, and how many should.
func (sp *space) excess(need int64) (must, want int64, err error) {
	free, total, err := sp.store.Free()
	if err != nil {
		return 0, 0, err
	}
	sp.mu.Lock()
	defer sp.mu.Unlock()
	must, want = sp.excessOf(need, free, total)
	return must, want, nil
}

// excessOf is excess for a disk with so many bytes free. The caller holds mu.
func (sp *space) excessOf(need, free, total int64) (must, want int64) {
	need += sp.promised
	if over := sp.used + need - sp.quota; sp.quota > 0 && over > 0 {
		must, want = over, sp.used+need-sp.quota/100*lowWatermark
	}
	short := sp.reserve.of(total) + need - free
	return max(must, short), max(want, short)
}

// promise reserves need bytes if there is room for them.
func (sp *space) promise(need int64) (bool, error) {
	free, total, err := sp.store.Free()
	if err != nil {
		return false, err
	}
	sp.mu.Lock()
	defer sp.mu.Unlock()
	if sp.quota > 0 && !sp.surveyed {
		return false, nil
	}
	if must, _ := sp.excessOf(need, free, total); must > 0 {
		return false, nil
	}
	sp.promised += need
	return true, nil
}

// makeRoom promises need bytes for what, evicting images if need be. It fails with ErrNoRoom,
// and evicts nothing then, if the room cannot be had.
func (sp *space) makeRoom(ctx context.Context, what string, need int64) error {
	if ok, err := sp.promise(need); ok || err != nil {
		return err
	}
	sp.collecting.Lock()
	defer sp.collecting.Unlock()
	if ok, err := sp.promise(need); ok || err != nil {
		return err
	}
	_, err := sp.collectFor(ctx, store.CollectOptions{OrphanAge: orphanAge}, need, func(must, want int64) (int64, int64) { return must, want })
	if err == nil {
		var ok bool
		if ok, err = sp.promise(need); ok {
			return nil
		}
	}
	switch {
	case errors.Is(err, store.ErrUnknownContent):
		return fmt.Errorf("make room for %s: %w: %w", what, err, ErrNoRoom)
	case err != nil:
		return fmt.Errorf("make room for %s: %w", what, err)
	}
	return sp.noRoom(what, need)
}

// noRoom says what stands in the way of need bytes.
func (sp *space) noRoom(what string, need int64) error {
	free, total, err := sp.store.Free()
	if err != nil {
		return err
	}
	sp.mu.Lock()
	defer sp.mu.Unlock()
	if sp.quota > 0 && sp.used+sp.promised+need > sp.quota {
		promised := ""
		if sp.promised > 0 {
			promised = fmt.Sprintf(", %s are promised to other pulls", humanBytes(sp.promised))
		}
		return fmt.Errorf("make room for %s: it needs up to %s; of the store's quota of %s, %s are in use, %s of that by mounted and pinned images%s; raise --store-quota, or unpin images (csi-puzzlefs store ls names them): %w",
			what, humanBytes(need), humanBytes(sp.quota), humanBytes(sp.used), humanBytes(sp.pinned), promised, ErrNoRoom)
	}
	return fmt.Errorf("make room for %s: it needs up to %s; the disk has %s free, of which %s are to stay free and %s are promised to other pulls; in the store %s are in use, %s of that by mounted and pinned images; free space on the disk, lower --store-reserve, or unpin images: %w",
		what, humanBytes(need), humanBytes(free), humanBytes(sp.reserve.of(total)), humanBytes(sp.promised), humanBytes(sp.used), humanBytes(sp.pinned), ErrNoRoom)
}

// isFull reports whether the disk was full.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// relieved calls write, and once more if the disk was full and images could be evicted.
func (sp *space) relieved(ctx context.Context, write func() error) error {
	err := write()
	if !isFull(err) || ctx.Err() != nil {
		return err
	}
	sp.collecting.Lock()
	c, collectErr := sp.collectFor(ctx, store.CollectOptions{OrphanAge: orphanAge}, 0, func(_, want int64) (int64, int64) {
		return 0, max(want, fullAtLeast)
	})
	sp.collecting.Unlock()
	if collectErr != nil {
		return errors.Join(err, collectErr)
	}
	if c.Bytes == 0 {
		return err
	}
	return write()
}
