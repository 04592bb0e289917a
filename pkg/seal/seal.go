package seal

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// Errors of this package, wrapped with the blob at hand. Those of packages store, image and
// format pass through, and so do verity.ErrNotSupported, where the kernel was asked for and the
// file system has no fs-verity, and verity.ErrNotEnabled, where a blob is not sealed.
var (
	// ErrConfig says that a Config is not usable.
	ErrConfig = errors.New("invalid configuration")
	// ErrMismatch says that an fs-verity digest is not the one that the chain demands.
	ErrMismatch = errors.New("fs-verity digest does not match")
	// ErrWrongEntry says that a blob is what its SHA-256 names, but that the image has the
	// fs-verity digest of something else for it. The reference writes such images when it
	// compresses: for a chunk that it stores raw, the digest of the compressed form.
	ErrWrongEntry = errors.New("the image has a wrong fs-verity digest for a good blob")
)

// Mode says who proves the chain.
type Mode int

// The modes.
const (
	// Auto is the kernel where the file system of the layout has fs-verity, else user space.
	Auto Mode = iota
	// Require is the kernel, and an error where there is no fs-verity.
	Require
	// Hash is user space, whatever the file system.
	Hash
)

// String returns the name that ParseMode takes.
func (m Mode) String() string {
	switch m {
	case Auto:
		return "auto"
	case Require:
		return "require"
	case Hash:
		return "hash"
	}
	return fmt.Sprintf("mode %d", int(m))
}

// ParseMode parses auto, require or hash.
func ParseMode(s string) (Mode, error) {
	for _, m := range []Mode{Auto, Require, Hash} {
		if s == m.String() {
			return m, nil
		}
	}
	return 0, fmt.Errorf("%.100q: want auto, require or hash: %w", s, ErrConfig)
}

// Config says what to seal or to check.
type Config struct {
	// Store has the blobs. It stays the caller's.
	Store *store.Store
	// Root is what the tag names, as [store.Store.Resolve] returns it. Its tag, if it has
	// one, is used in messages.
	Root format.Descriptor
	// Digest is the fs-verity digest that the manifest must have.
	Digest verity.Digest
	// Mode is looked at by Check only: Enable needs the kernel.
	Mode Mode
	// Progress, if not nil, is called with the stored bytes that Enable has hashed so far, by one
	// goroutine at a time.
	Progress func(bytes int64)
}

func (c *Config) validate() error {
	switch {
	case c.Store == nil:
		return fmt.Errorf("no store: %w", ErrConfig)
	case c.Digest == verity.Digest{}:
		return fmt.Errorf("no digest: %w", ErrConfig)
	case c.Mode < Auto || c.Mode > Hash:
		return fmt.Errorf("%v: %w", c.Mode, ErrConfig)
	}
	return nil
}

// Report says what was done. Every blob is counted once among Kernel, Hashed and Deferred.
type Report struct {
	// Kernel counts the blobs that are sealed with the digest that the chain demands.
	Kernel int
	// Hashed counts those whose bytes were hashed in user space, and were right.
	Hashed int
	// Deferred counts those whose bytes are checked when they are read, by their SHA-256.
	Deferred int
	// Sealed says how many of Kernel were sealed by this call, and had not been.
	Sealed int
	// Missing counts blobs that are not there, and that no file needs.
	Missing int
	// Warnings are sentences about blobs that no file needs and that could not be sealed.
	Warnings []string
}

// chain is an image whose manifest has the digest that was given.
type chain struct {
	*Config
	parts *image.Parts
}

// readChain reads an image's metadata and compares the manifest with the digest.
func readChain(ctx context.Context, cfg *Config) (*chain, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	parts, err := image.ReadParts(ctx, image.Config{Source: cfg.Store, Root: cfg.Root})
	if err != nil {
		return nil, err
	}
	if parts.Root.Verity != cfg.Digest {
		return nil, fmt.Errorf("its %s has the fs-verity digest %s, but %s was given; correct the digest or the tag: %w",
			rootKind(cfg.Root), parts.Root.Verity, cfg.Digest, ErrMismatch)
	}
	return &chain{cfg, parts}, nil
}

// rootKind returns what kind of blob names an image.
func rootKind(root format.Descriptor) string {
	if root.MediaType == format.MediaTypeRootfs {
		return "rootfs blob"
	}
	return "manifest"
}

// name returns what a blob is, for messages.
func (c *chain) name(p image.Part) string {
	kind := "blob"
	switch {
	case p.Digest == c.parts.Root.Digest:
		kind = rootKind(c.Root)
	case c.isMetadata(p) && c.Root.MediaType == format.MediaTypeRootfs:
		kind = "metadata blob"
	case c.isMetadata(p):
		kind = "rootfs blob"
	}
	name := kind + " " + p.Digest.String()
	if file := c.parts.File(p.Digest); file != "" {
		name += " of " + file
	}
	return name
}

func (c *chain) isMetadata(p image.Part) bool {
	return slices.ContainsFunc(c.parts.Metadata, func(m image.Part) bool { return m.Digest == p.Digest })
}

// mismatch says why a blob whose file is f does not match the chain, or nil if its bytes do. The
// SHA-256 tells a damaged blob from a wrong digest in the image.
func (c *chain) mismatch(ctx context.Context, f *os.File, p image.Part, progress func(n int)) error {
	sum, got, err := digests(ctx, f, progress)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", c.name(p), err)
	case sum != p.Digest:
		return fmt.Errorf("%s is damaged: it holds %s; remove %s, then build or pull the image again: %w", c.name(p), sum, f.Name(), store.ErrDigestMismatch)
	case got == p.Verity:
		return nil
	case c.isMetadata(p):
		return fmt.Errorf("%s has the fs-verity digest %s, but the image says %s; build it again: %w", c.name(p), got, p.Verity, ErrMismatch)
	}
	why := ""
	if c.parts.IsRaw(p.Digest) {
		why = ", as the reference implementation does for chunks that it stores raw because they do not compress"
	}
	return fmt.Errorf("%s is good and has the fs-verity digest %s, but the image says %s%s; the kernel's fs-verity cannot be used with this image: build it again, or mount it with --verity=hash: %w",
		c.name(p), got, p.Verity, why, ErrWrongEntry)
}

// badSeal says that a file is sealed with a digest that is not the one of its bytes alone, because
// of a salt or of another block size.
func (c *chain) badSeal(f *os.File, p image.Part, measured verity.Digest) error {
	return fmt.Errorf("%s is good, but sealed with the fs-verity digest %s, want %s: a seal cannot be changed; remove %s, then build or pull the image again: %w",
		c.name(p), measured, p.Verity, f.Name(), ErrMismatch)
}

// listed makes sure that the image has an fs-verity digest for a blob.
func (c *chain) listed(p image.Part) error {
	if p.Verity == (verity.Digest{}) {
		return fmt.Errorf("the image has no fs-verity digest for %s; build it again: %w", c.name(p), ErrMismatch)
	}
	return nil
}

// supported reports whether the file system of the layout has fs-verity.
func (c *chain) supported() (bool, error) {
	f, err := c.Store.OpenBlob(c.parts.Root.Digest)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = verity.Measure(f)
	switch {
	case errors.Is(err, verity.ErrNotSupported):
		return false, nil
	case err == nil, errors.Is(err, verity.ErrNotEnabled), errors.Is(err, verity.ErrInvalidDigest):
		return true, nil
	}
	return false, err
}

// errUnsupported says what to do where the file system of the layout has no fs-verity.
func (c *chain) errUnsupported(otherwise string) error {
	return fmt.Errorf("layout %s: %w; on ext4 'tune2fs -O verity DEVICE' adds it, else move the layout to a file system that has it%s",
		c.Store.Dir(), verity.ErrNotSupported, otherwise)
}

// digests reads a blob's file once and returns the digests of its bytes.
func digests(ctx context.Context, f *os.File, progress func(n int)) (sum format.Digest, v verity.Digest, err error) {
	h, tree := sha256.New(), verity.New()
	buf := make([]byte, 128<<10)
	for {
		if err := ctx.Err(); err != nil {
			return sum, v, err
		}
		n, err := f.Read(buf)
		h.Write(buf[:n])
		_, _ = tree.Write(buf[:n]) // never fails
		if progress != nil {
			progress(n)
		}
		if errors.Is(err, io.EOF) {
			return format.Digest(h.Sum(nil)), tree.Digest(), nil
		}
		if errors.Is(err, unix.EIO) {
			err = fmt.Errorf("%w: its disk, or the kernel's fs-verity, says that it is damaged; remove it, then build or pull the image again", err)
		}
		if err != nil {
			return sum, v, fmt.Errorf("read blob: %w", err)
		}
	}
}
