package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
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
	// diskBlock is what the smallest blob takes up on common file systems, in bytes.
	diskBlock = 4096
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
	// the last survey: some minutes ago at most.
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
	return func() {
		if err := d.pins.Unpin(manifest, name); err != nil && !errors.Is(err, store.ErrNotFound) {
			d.log.Error("cannot unpin an image that is not mounted any more; the next start does", "image", manifest.String(), "error", err)
		}
		d.space.wake()
	}, nil
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
	_, err := sp.run1(ctx, opts, 0, func(_, want int64) (int64, int64) { return 0, want })
	return err
}

// run1 is one collection that wants what limit makes of what the limits want for need further
// bytes. The caller holds collecting.
func (sp *space) run1(ctx context.Context, opts store.CollectOptions, need int64, limit func(must, want int64) (int64, int64)) (store.Collected, error) {
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
	_, err := sp.run1(ctx, store.CollectOptions{OrphanAge: orphanAge}, need, func(must, want int64) (int64, int64) { return must, want })
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
	c, collectErr := sp.run1(ctx, store.CollectOptions{OrphanAge: orphanAge}, 0, func(_, want int64) (int64, int64) {
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

// receive lets pull put an image into the store, whose manifest is given and held, within the
// limits. what is for messages.
func (sp *space) receive(ctx context.Context, what string, manifest []byte, pull func(registry.Destination) error) error {
	need, err := sp.missing(manifest)
	if err != nil {
		return err
	}
	if err := sp.makeRoom(ctx, what, need); err != nil {
		return err
	}
	l := &lease{Store: sp.store, sp: sp, ctx: ctx, what: what, left: need}
	defer l.end()
	return sp.relieved(ctx, func() error {
		// First of all: from now on the hold keeps the blobs that are there, see store.Pins.
		if err := l.Put(manifest, format.DigestOf(manifest)); err != nil {
			return err
		}
		return pull(l)
	})
}

// missing returns how many bytes the store lacks of an image. It is an upper bound: of images of
// PuzzleFS 0.2.0 the descriptors have the sizes before compression.
func (sp *space) missing(manifest []byte) (int64, error) {
	m, err := format.ParseManifest(manifest)
	if err != nil {
		return 0, err
	}
	need := onDisk(int64(len(manifest)))
	for _, d := range m.Blobs() {
		_, err := sp.store.Size(d.Digest)
		switch {
		case errors.Is(err, store.ErrNotFound):
			if d.Size > maxPromise-need {
				return 0, fmt.Errorf("add up the sizes of the blobs in the manifest: %w", format.ErrTooLarge)
			}
			need += onDisk(d.Size)
		case err != nil && !errors.Is(err, store.ErrDigestMismatch):
			return 0, err
		}
	}
	return need, nil
}

// maxPromise bounds the bytes of an image, so that sums do not overflow.
const maxPromise = 1 << 60

// onDisk returns what n bytes take up on a disk.
func onDisk(n int64) int64 { return (n + diskBlock - 1) / diskBlock * diskBlock }

// lease is a store into which a pull writes: what was promised to it, and more only as far as
// there is room. Registries, and manifests, may lie about sizes.
type lease struct {
	*store.Store
	sp   *space
	ctx  context.Context // a Put has no other way to it
	what string
	left int64 // of what was promised; guarded by sp.mu
}

var _ registry.Destination = (*lease)(nil)

// Put is that of the store.
func (l *lease) Put(data []byte, d format.Digest) error {
	n := onDisk(int64(len(data)))
	if _, err := l.Store.Size(d); err == nil {
		n = 0 // it is there, or takes the place of a torn one
	}
	if err := l.take(n); err != nil {
		return err
	}
	err := l.Store.Put(data, d)
	l.wrote(n, err)
	return err
}

// PutReader is that of the store.
func (l *lease) PutReader(ctx context.Context, d format.Digest, size int64, r io.Reader) error {
	t := &taker{l: l, r: r}
	if size > 0 {
		if err := l.take(onDisk(size)); err != nil {
			return err
		}
		t.taken = onDisk(size) // the store reads no more
	}
	err := l.Store.PutReader(ctx, d, size, t)
	l.wrote(t.taken, err)
	return err
}

// take takes n bytes off what was promised, and asks for more if that is not enough.
func (l *lease) take(n int64) error {
	sp := l.sp
	sp.mu.Lock()
	promised := min(n, l.left)
	l.left -= promised
	sp.mu.Unlock()
	if more := n - promised; more > 0 {
		if err := sp.makeRoom(l.ctx, l.what+", which is larger than its manifest says", more); err != nil {
			sp.mu.Lock()
			defer sp.mu.Unlock()
			l.left += promised
			return err
		}
	}
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.promised -= n
	sp.used += n
	sp.begun += n
	sp.writing += n
	return nil
}

// wrote says that n bytes that were taken are in the store, or not.
func (l *lease) wrote(n int64, err error) {
	sp := l.sp
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.writing -= n
	if err != nil {
		sp.used -= n
		sp.promised += n
		l.left += n
	}
}

// end gives back what is left.
func (l *lease) end() {
	l.sp.mu.Lock()
	l.sp.promised -= l.left
	l.left = 0
	l.sp.mu.Unlock()
	l.sp.wake()
}

// taker takes from a lease what it reads.
type taker struct {
	l           *lease
	r           io.Reader
	taken, read int64
}

// Read implements io.Reader.
func (t *taker) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.read += int64(n)
	if more := onDisk(t.read) - t.taken; more > 0 {
		if takeErr := t.l.take(more); takeErr != nil {
			return n, takeErr
		}
		t.taken += more
	}
	return n, err
}
