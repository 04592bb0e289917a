package store

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"golang.org/x/sys/unix"
)

// collectBatch is how many blobs are removed in one go, while nobody can pin: some
// milliseconds.
const collectBatch = 256

// CollectOptions say what Collect is to remove.
type CollectOptions struct {
	// Want, if not nil, says how many bytes are to go, given how many the blobs take up: first
	// orphans of any age, then images, least recently used first. Unless must bytes can go,
	// because the rest is pinned, nothing is removed for its sake.
	Want func(used int64) (must, want int64)
	// OrphanAge is how old a blob of no image must be, in time since it was written, to be
	// removed even though Want does not want it. A program that writes into the layout without
	// a hold has so long to tag its image.
	OrphanAge time.Duration
	// Further are images that the caller knows, beside those that the index names.
	Further []format.Digest
	// Forget, if not nil, makes the caller forget an image that is evicted, before anything of
	// it is removed; it may be called twice. It must not use the pins. An error ends the collection.
	Forget func(format.Digest) error
	// DryRun computes what would be removed, and removes nothing.
	DryRun bool
}

// All is a CollectOptions.Want that wants everything gone that is not pinned.
func All(int64) (must, want int64) { return 0, math.MaxInt64 }

// Collected is what Collect removed, or with DryRun would. Bytes are those on the disk.
type Collected struct {
	// Evicted are the images that went, in this order.
	Evicted []Evicted
	// Orphans counts the blobs of no image that went.
	Orphans     int
	OrphanBytes int64
	// Blobs and Bytes are all that went, orphans and blobs of images.
	Blobs int
	Bytes int64
	// Left is what the remaining blobs take up, Pinned those of them that cannot go.
	Left, Pinned int64
}

// Evicted is an image that went. Blobs that a remaining image has stay.
type Evicted struct {
	Image   format.Digest
	Tags    []string
	LastUse time.Time
	// Bytes is what went with it: its own blobs, and those shared with images evicted before.
	Bytes int64
}

// Collect removes blobs that nobody needs: orphans, and images that are not pinned, whole, with
// their tags. It may run beside readers, pulls that hold their images, and other collections, in
// any process: a blob of an image that is pinned by when it would go is kept. Changes of pins
// wait for some milliseconds at a time. A process that is killed meanwhile leaves images that
// are whole, images that are evicted, and orphans.
//
// Where what a pinned image refers to cannot be read, it removes nothing and fails with
// ErrUnknownContent. It fails with ErrLocked and ErrReadOnly. What was removed before an error
// is in the result.
func (s *Store) Collect(ctx context.Context, pins *Pins, opts CollectOptions) (Collected, error) {
	c := &collection{s: s, pins: pins, opts: opts}
	c.reset()
	if err := c.run(ctx); err != nil {
		return c.result, fmt.Errorf("collect blobs of layout %s: %w", s.dir, explain(err))
	}
	return c.result, nil
}

// collection is a Collect under way. What is to go is planned without the lock of the pins, and
// each step asks again, with the lock, what has been pinned or tagged since.
type collection struct {
	s      *Store
	pins   *Pins
	opts   CollectOptions
	result Collected

	seen    *surveyed
	victims map[format.Digest]bool
	// untagged says that the victims' entries in the index are gone: one that is there was made
	// since.
	untagged bool
	// blobs are to go; manifests come last, so that a tag that is still there does not dangle
	// for longer than need be.
	blobs []format.Digest
	// orphans are those of blobs that belong to no image.
	orphans map[format.Digest]bool
	// owner is the victim with whose eviction a blob goes.
	owner map[format.Digest]format.Digest
	// known are the images whose blobs are not among those to go, or are in keep.
	known map[format.Digest]bool
	keep  map[format.Digest]bool
}

func (c *collection) run(ctx context.Context) error {
	if err := c.s.beginWrite(); err != nil {
		return err
	}
	defer c.s.end()
	for again := true; again; {
		var err error
		if c.seen, err = c.s.survey(ctx, c.pins, c.opts.Further); err != nil {
			return err
		}
		if again, err = c.moved(ctx); err != nil {
			return err
		}
	}
	c.result.Left, c.result.Pinned = c.seen.bytes()
	c.plan()
	if c.opts.DryRun {
		c.count(c.blobs)
		c.result.Evicted = c.evicted()
		return nil
	}
	if err := c.evict(ctx); err != nil {
		return err
	}
	if err := c.s.at(StepCollectUntagged); err != nil {
		return err
	}
	for batch := range slices.Chunk(c.blobs, collectBatch) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := c.removeBatch(ctx, batch); err != nil {
			return err
		}
		if err := c.s.at(StepCollectBatch); err != nil {
			return err
		}
	}
	if !c.untagged {
		return c.evict(ctx)
	}
	return nil
}

// moved reports whether a survey has to be made again because an image was unpinned and evicted
// by another collection between looking at its pins and its manifest. It fails where what a
// pinned image refers to is really not known.
func (c *collection) moved(ctx context.Context) (bool, error) {
	defer c.reset()
	for _, im := range c.seen.images {
		if im.unknown() == nil {
			continue
		}
		unlock, err := c.pins.lock()
		if err != nil {
			return false, err
		}
		defer unlock()
		_, err = c.refresh(ctx)
		return err == nil, err
	}
	return false, nil
}

// reset forgets what refresh found.
func (c *collection) reset() { c.keep, c.known = map[format.Digest]bool{}, map[format.Digest]bool{} }

func unknownContent(image format.Digest, err error) error {
	return fmt.Errorf("the manifest of the pinned image %s cannot be read, so any blob may be one of its: publish a volume of the image, which fetches it again, or unpin it: %w: %w", image, err, ErrUnknownContent)
}

// plan decides what is to go, from the survey alone.
func (c *collection) plan() {
	v := c.seen
	must, want := int64(0), int64(0)
	if c.opts.Want != nil {
		must, want = c.opts.Want(c.result.Left)
	}
	if must > c.result.Left-c.result.Pinned {
		want = 0
	}
	c.victims, c.orphans = map[format.Digest]bool{}, map[format.Digest]bool{}
	c.owner = map[format.Digest]format.Digest{}
	var freed int64
	youngest := time.Now().Add(-c.opts.OrphanAge)
	for d, f := range v.blobs {
		if v.refs[d] == 0 && (want > 0 || !f.mtime.After(youngest)) {
			c.orphans[d] = true
			c.blobs = append(c.blobs, d)
			freed += f.bytes
		}
	}
	var manifests []format.Digest
	for _, d := range v.order() {
		if freed >= want {
			break
		}
		im := v.images[d]
		if im.pinned() {
			continue
		}
		c.victims[d] = true
		for i, b := range im.blobs {
			v.refs[b]--
			f, there := v.blobs[b]
			if !there || v.refs[b] > 0 {
				continue
			}
			freed += f.bytes
			c.owner[b] = d
			if i == 0 {
				manifests = append(manifests, b)
			} else {
				c.blobs = append(c.blobs, b)
			}
		}
	}
	c.blobs = append(c.blobs, manifests...)
	for d, im := range v.images {
		c.known[d] = !c.victims[d] && im.err == nil
	}
}

// refresh makes keep hold the blobs of the images that are pinned or tagged now and were not
// when the survey was made. The caller has the lock of the pins.
func (c *collection) refresh(ctx context.Context) (pinned map[format.Digest]bool, err error) {
	list, err := c.pins.current()
	if err != nil {
		return nil, err
	}
	pinned = map[format.Digest]bool{}
	now := map[format.Digest]*surveyedImage{}
	for _, p := range list {
		pinned[p.Image] = true
		if now[p.Image] == nil {
			now[p.Image] = &surveyedImage{}
		}
		now[p.Image].pins = append(now[p.Image].pins, p)
	}
	x, err := c.s.readIndex()
	if err != nil {
		return nil, err
	}
	for _, e := range x.entries {
		stale := !c.untagged && c.victims[e.desc.Digest]
		if e.foreign == nil && !stale && now[e.desc.Digest] == nil {
			now[e.desc.Digest] = &surveyedImage{}
		}
	}
	for d, im := range now {
		if c.known[d] {
			continue
		}
		im.blobs, im.err = c.s.referred(ctx, d)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err := im.unknown(); err != nil {
			return nil, unknownContent(d, err)
		}
		for _, b := range im.blobs {
			c.keep[b] = true
		}
		// The manifest of a hold may come later.
		c.known[d] = im.err == nil
	}
	return pinned, nil
}

// evict makes the images to go disappear, for the caller and from the index. On a full disk
// there may be no room for a new index; then they stay tagged, and it is to be called again when
// the blobs are gone.
func (c *collection) evict(ctx context.Context) error {
	unlock, err := c.pins.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.s.at(StepCollectLocked); err != nil {
		return err
	}
	pinned, err := c.refresh(ctx)
	if err != nil {
		return err
	}
	for d := range pinned {
		delete(c.victims, d)
	}
	if len(c.victims) == 0 {
		c.untagged = true
		return nil
	}
	if c.opts.Forget != nil {
		for d := range c.victims {
			if err := c.opts.Forget(d); err != nil {
				return fmt.Errorf("forget image %s: %w", d, err)
			}
		}
	}
	if err := c.s.at(StepCollectForgotten); err != nil {
		return err
	}
	c.result.Evicted = c.evicted()
	err = c.s.updateIndex(func(x *index) error { x.removeImages(c.victims); return nil })
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return nil
	}
	c.untagged = err == nil
	return err
}

// removeBatch removes those of the blobs that nobody has come to need.
func (c *collection) removeBatch(ctx context.Context, blobs []format.Digest) error {
	unlock, err := c.pins.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := c.refresh(ctx); err != nil {
		return err
	}
	for _, d := range blobs {
		if c.keep[d] {
			continue
		}
		err := retry(func() error { return unix.Unlinkat(c.s.blobs, d.Hex(), 0) })
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("remove blob %s: %w", d, err)
		}
		c.count([]format.Digest{d})
		if err := c.s.at(StepCollectRemoved); err != nil {
			return err
		}
	}
	return nil
}

// count adds removed blobs to the result.
func (c *collection) count(blobs []format.Digest) {
	for _, d := range blobs {
		n := c.seen.blobs[d].bytes
		c.result.Blobs++
		c.result.Bytes += n
		c.result.Left -= n
		if c.orphans[d] {
			c.result.Orphans++
			c.result.OrphanBytes += n
		}
	}
}

// evicted describes the victims, in the order of eviction.
func (c *collection) evicted() []Evicted {
	bytes := map[format.Digest]int64{}
	for b, d := range c.owner {
		bytes[d] += c.seen.blobs[b].bytes
	}
	var list []Evicted
	for _, d := range c.seen.order() {
		if c.victims[d] {
			list = append(list, Evicted{Image: d, Tags: c.seen.images[d].tags, LastUse: c.seen.blobs[d].mtime, Bytes: bytes[d]})
		}
	}
	return list
}
