package seal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

const (
	// sealers is how many files are sealed at the same time: each waits for the disk.
	sealers = 16
	// writerTimeout is how long a program that has a blob open for writing is waited for. A
	// build has one open for a moment after giving it its name.
	writerTimeout = 5 * time.Second
	// retryDelay is the pause between two attempts.
	retryDelay = 10 * time.Millisecond
)

// Enable seals the manifest, the metadata, the config and every data blob of an image, and
// makes that durable. First it compares all of them with the chain: where one that is needed does
// not match, nothing is sealed. What is sealed already is only measured, so that to do it
// again takes little time, and so does to go on after an interruption.
//
// Blobs that no file needs are sealed if they are there and match. It fails with ErrMismatch,
// ErrWrongEntry, verity.ErrNotSupported, store.ErrNotFound and store.ErrDigestMismatch.
func Enable(ctx context.Context, cfg Config) (Report, error) {
	r, err := enable(ctx, &cfg)
	if err != nil {
		return Report{}, fmt.Errorf("seal image %s: %w", cfg.Root.Digest, err)
	}
	return r, nil
}

func enable(ctx context.Context, cfg *Config) (Report, error) {
	c, err := readChain(ctx, cfg)
	if err != nil {
		return Report{}, err
	}
	switch ok, err := c.supported(); {
	case err != nil:
		return Report{}, err
	case !ok:
		return Report{}, c.errUnsupported("; nothing needs to be sealed to mount an image with --digest and --verity=hash")
	}
	e := &enabler{chain: c}
	if err := each(ctx, runtime.GOMAXPROCS(0), c.needed(), e.inspect); err != nil {
		return Report{}, err
	}
	if err := each(ctx, runtime.GOMAXPROCS(0), e.unneeded(ctx), e.inspectUnneeded); err != nil {
		return Report{}, err
	}
	if err := each(ctx, sealers, e.open, e.seal); err != nil {
		return Report{}, err
	}
	if e.report.Sealed > 0 {
		if err := cfg.Store.Sync(); err != nil {
			return Report{}, err
		}
	}
	return e.report, nil
}

// enabler is one run of Enable.
type enabler struct {
	*chain

	mu     sync.Mutex // guards what follows
	report Report
	hashed int64
	open   []image.Part // blobs that match and are not sealed
}

// inspect compares a blob with the chain, by its seal or by its bytes.
func (e *enabler) inspect(ctx context.Context, p image.Part) error {
	if err := e.listed(p); err != nil {
		return err
	}
	return e.compare(ctx, p)
}

// unneeded returns the blobs that no file needs. The config is one of them: of what it must be the
// manifest gives the SHA-256 only.
func (e *enabler) unneeded(ctx context.Context) []image.Part {
	d := e.parts.Config
	isConfig := func(p image.Part) bool { return p.Digest == d }
	if d.IsZero() || slices.ContainsFunc(e.parts.Data, isConfig) || slices.ContainsFunc(e.parts.Shadowed, isConfig) {
		return e.parts.Shadowed
	}
	config := image.Part{Digest: d}
	if b, err := e.Store.Get(ctx, d, format.MaxManifestSize); err == nil {
		config.Verity = verity.Sum(b) // else looking at it says what is wrong
	}
	return append(slices.Clip(e.parts.Shadowed), config)
}

// inspectUnneeded is inspect for a blob that may be missing, and that is left alone where it
// does not match.
func (e *enabler) inspectUnneeded(ctx context.Context, p image.Part) error {
	err := e.compare(ctx, p)
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if errors.Is(err, store.ErrNotFound) {
		e.report.Missing++
	} else {
		e.report.Warnings = append(e.report.Warnings, fmt.Sprintf("a blob that no file needs is not sealed: %v", err))
	}
	return nil
}

// compare compares a blob with the chain and notes whether it is sealed.
func (e *enabler) compare(ctx context.Context, p image.Part) error {
	f, err := e.Store.OpenBlob(p.Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	measured, err := verity.Measure(f)
	sealed := err == nil
	if err != nil && !errors.Is(err, verity.ErrNotEnabled) {
		return err
	}
	if !sealed || measured != p.Verity {
		if err := e.mismatch(ctx, f, p, e.count); err != nil {
			return err
		}
	}
	if sealed && measured != p.Verity {
		return e.badSeal(f, p, measured)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if sealed {
		e.report.Kernel++
	} else {
		e.open = append(e.open, p)
	}
	return nil
}

// count tells about bytes that were hashed.
func (e *enabler) count(n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.hashed += int64(n)
	if e.Progress != nil {
		e.Progress(e.hashed)
	}
}

// seal seals a blob that matched.
func (e *enabler) seal(ctx context.Context, p image.Part) error {
	f, err := e.Store.OpenBlob(p.Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := enableFile(ctx, f); err != nil {
		return fmt.Errorf("%s: %w", e.name(p), explain(err))
	}
	got, err := verity.Measure(f)
	if err != nil {
		return err
	}
	if got != p.Verity {
		return fmt.Errorf("%s was changed while it was being sealed: it is sealed with the fs-verity digest %s, want %s; remove %s, then build or pull the image again: %w",
			e.name(p), got, p.Verity, f.Name(), ErrMismatch)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.report.Kernel++
	e.report.Sealed++
	return nil
}

// enableFile seals a file, waiting for a while for a program that writes to it, and for as long as it
// takes for another that is sealing it.
func enableFile(ctx context.Context, f *os.File) error {
	for deadline := time.Now().Add(writerTimeout); ; {
		err := verity.Enable(f)
		again := errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ETXTBSY) && time.Now().Before(deadline)
		if !again {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retryDelay):
		}
	}
}

// explain adds the cure to errors that a person can do something about.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: only who may write to a file can seal it: run as the owner of the layout or as root", err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: mount the file system of the layout writable while its images are sealed", err)
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w: a seal takes a hundredth of a file's size: free space on this file system and try again", err)
	}
	return err
}
