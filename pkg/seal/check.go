package seal

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// Check proves that an image is the one that cfg.Digest names; the package comment says what
// that guarantees. Blobs that no file needs are not looked at.
//
// Where the kernel is asked, all blobs must be sealed with the digests that the chain demands. It fails with
// ErrMismatch, ErrWrongEntry, verity.ErrNotEnabled for a blob that is not sealed,
// verity.ErrNotSupported with Require, and store.ErrNotFound for a blob that is not there.
func Check(ctx context.Context, cfg Config) (Report, error) {
	r, err := check(ctx, &cfg)
	if err != nil {
		return Report{}, fmt.Errorf("check image %s: %w", cfg.Root.Digest, err)
	}
	return r, nil
}

func check(ctx context.Context, cfg *Config) (Report, error) {
	c, err := readChain(ctx, cfg)
	if err != nil {
		return Report{}, err
	}
	if cfg.Mode == Hash {
		return c.hash(ctx)
	}
	switch ok, err := c.supported(); {
	case err != nil:
		return Report{}, err
	case ok:
		return c.measureAll(ctx)
	case cfg.Mode == Require:
		return Report{}, c.errUnsupported(", or have the image checked in user space with --verity=auto")
	}
	return c.hash(ctx)
}

// measureAll compares the kernel's measurement of every blob with the chain.
func (c *chain) measureAll(ctx context.Context) (Report, error) {
	var (
		mu     sync.Mutex // guards report
		report Report
	)
	err := each(ctx, runtime.GOMAXPROCS(0), c.needed(), func(ctx context.Context, p image.Part) error {
		if err := c.listed(p); err != nil {
			return err
		}
		if err := c.measure(ctx, p); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		report.Kernel++
		return nil
	})
	return report, err
}

// measure compares the kernel's measurement of a blob with the chain.
func (c *chain) measure(ctx context.Context, p image.Part) error {
	f, err := c.Store.OpenBlob(p.Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	got, err := verity.Measure(f)
	switch {
	case errors.Is(err, verity.ErrNotEnabled):
		return fmt.Errorf("%s is not sealed: %w; seal the image with '%s', or have it checked in user space with --verity=hash",
			c.name(p), err, c.command())
	case err != nil:
		return err
	case got == p.Verity:
		return nil
	}
	if err := c.mismatch(ctx, f, p, nil); err != nil {
		return err
	}
	return c.badSeal(f, p, got)
}

// command returns the command that seals the image.
func (c *chain) command() string {
	tag := c.Root.Annotations[format.AnnotationRefName]
	if tag == "" {
		tag = "TAG"
	}
	return fmt.Sprintf("csi-puzzlefs enable-fs-verity %s:%s %s", c.Store.Dir(), tag, c.Digest)
}

// hash proves the chain in user space as far as the data blobs, which reads check.
func (c *chain) hash(ctx context.Context) (Report, error) {
	report := Report{Hashed: 1} // the manifest, by readChain
	for _, p := range c.parts.Metadata {
		if err := c.listed(p); err != nil {
			return Report{}, err
		}
		if err := c.hashBlob(ctx, p); err != nil {
			return Report{}, err
		}
		report.Hashed++
	}
	for _, p := range c.parts.Data {
		if err := c.listed(p); err != nil {
			return Report{}, err
		}
		if _, err := c.Store.Size(p.Digest); err != nil {
			return Report{}, err
		}
		if err := ctx.Err(); err != nil {
			return Report{}, err
		}
		report.Deferred++
	}
	return report, nil
}

// hashBlob hashes a blob and compares it with the chain.
func (c *chain) hashBlob(ctx context.Context, p image.Part) error {
	f, err := c.Store.OpenBlob(p.Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	return c.mismatch(ctx, f, p, nil)
}

// needed returns the blobs without which the image cannot be read.
func (c *chain) needed() []image.Part {
	parts := append([]image.Part{c.parts.Root}, c.parts.Metadata...)
	return append(parts, c.parts.Data...)
}

// each calls fn for every part, workers at a time, until one fails or ctx is done.
func each(ctx context.Context, workers int, parts []image.Part, fn func(context.Context, image.Part) error) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for _, p := range parts {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			return fn(gctx, p)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}
