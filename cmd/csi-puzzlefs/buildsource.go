package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// How sources begin that are no directories.
const (
	schemeTar    = "tar:"
	schemeLayout = "oci:"
	schemeDocker = "docker://"
)

// buildSource is what an image is built from: a directory, the upper directory of an overlay, or
// what read reads.
type buildSource struct {
	dir, upper  string
	upperDir    *os.File // where the path does not lead to it
	upperXattrs builder.UpperXattrs
	name        string // what to call it in messages
	read        func(context.Context, *registry.Client, *meter, builder.ReadConfig) (*builder.Tree, error)
}

// parseSource makes sense of a SOURCE.
func parseSource(cmd *cobra.Command, text, platform string) (buildSource, error) {
	want, err := builder.ParsePlatform(platform)
	if err != nil {
		return buildSource{}, usagef(cmd, "--platform: %w", err)
	}
	strict := platform != ""
	src := buildSource{name: text}
	rest, isTar := strings.CutPrefix(text, schemeTar)
	switch {
	case text == "" || isTar && rest == "":
		return buildSource{}, usagef(cmd, "the name of the source is empty")
	case isTar:
		src.read = func(ctx context.Context, _ *registry.Client, m *meter, cfg builder.ReadConfig) (*builder.Tree, error) {
			return readTar(ctx, rest, m, cfg)
		}
	case strings.HasPrefix(text, schemeLayout):
		ref, err := splitRef(cmd, strings.TrimPrefix(text, schemeLayout))
		if err != nil {
			return buildSource{}, err
		}
		src.read = func(ctx context.Context, _ *registry.Client, m *meter, cfg builder.ReadConfig) (*builder.Tree, error) {
			s, err := store.Open(store.Config{Dir: ref.dir})
			if err != nil {
				return nil, err
			}
			tree, err := builder.ReadImage(ctx, &metered{Images: builder.NewLayoutImages(s, ref.tag), m: m}, want, strict, cfg)
			return tree, errors.Join(err, s.Close())
		}
	case strings.HasPrefix(text, schemeDocker):
		ref, err := registry.ParseReference(strings.TrimPrefix(text, schemeDocker))
		if err != nil {
			return buildSource{}, usagef(cmd, "%w", err)
		}
		src.read = func(ctx context.Context, c *registry.Client, m *meter, cfg builder.ReadConfig) (*builder.Tree, error) {
			return builder.ReadImage(ctx, &metered{Images: &registryImages{c, ref}, m: m}, want, strict, cfg)
		}
	default:
		src.dir = text
	}
	if strict && (src.dir != "" || isTar) {
		return buildSource{}, usagef(cmd, "--platform is for sources that are container images")
	}
	return src, nil
}

// upperSource makes sense of the flags about an overlay.
func (f *buildFlags) upperSource(cmd *cobra.Command) (buildSource, error) {
	src := buildSource{name: f.upper, upper: f.upper, upperDir: f.upperDir}
	if f.platform != "" {
		return src, usagef(cmd, "--platform is for sources that are container images")
	}
	switch f.upperXattrs {
	case "auto":
		src.upperXattrs = builder.UpperXattrsAuto
	case "trusted":
		src.upperXattrs = builder.UpperXattrsTrusted
	case "user":
		src.upperXattrs = builder.UpperXattrsUser
	default:
		return src, usagef(cmd, "--overlay-xattrs %q: want auto, trusted or user", f.upperXattrs)
	}
	return src, nil
}

// readTar reads an archive from a file, or from standard input.
func readTar(ctx context.Context, name string, m *meter, cfg builder.ReadConfig) (_ *builder.Tree, err error) {
	if name == "-" {
		in, err := newInterruptible(ctx, os.Stdin)
		if err != nil {
			return nil, err
		}
		defer in.close()
		return builder.ReadTar(ctx, &meterReader{ReadCloser: io.NopCloser(in), m: m}, cfg)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		return nil, fmt.Errorf("%s is a directory: leave out %s", name, schemeTar)
	}
	return builder.ReadTar(ctx, &meterReader{ReadCloser: f, m: m, total: fi.Size()}, cfg)
}

// meterReader shows how much was read.
type meterReader struct {
	io.ReadCloser
	m           *meter
	done, total int64
}

func (r *meterReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.done += int64(n)
	r.m.set(r.done, r.total)
	return n, err
}

// metered shows how much was read of each blob of an image.
type metered struct {
	builder.Images
	m *meter
}

// Blob implements builder.Images.
func (i *metered) Blob(ctx context.Context, d format.Digest, size int64) (io.ReadCloser, error) {
	r, err := i.Images.Blob(ctx, d, size)
	if err != nil {
		return nil, err
	}
	return &meterReader{ReadCloser: r, m: i.m, total: size}, nil
}

// registryImages is a container image in a registry.
type registryImages struct {
	client *registry.Client
	ref    registry.Reference
}

var _ builder.Images = (*registryImages)(nil)

// Manifest implements builder.Images.
func (r *registryImages) Manifest(ctx context.Context, d format.Digest, limit int64) ([]byte, error) {
	ref := r.ref
	if !d.IsZero() {
		ref.Digest = d
	}
	m, err := r.client.Manifest(ctx, ref, limit, builder.ManifestTypes()...)
	return m.Bytes, err
}

// Blob implements builder.Images.
func (r *registryImages) Blob(ctx context.Context, d format.Digest, size int64) (io.ReadCloser, error) {
	return r.client.Blob(ctx, r.ref, d, size)
}

// interruptible reads a pipe or a terminal until its context ends: a blocking read of
// standard input cannot be ended otherwise.
type interruptible struct {
	ctx context.Context // io.Reader has no other way to it
	f   *os.File
	// wake becomes readable when ctx ends.
	wake, waker *os.File
	stop        func() bool
	once        sync.Once
}

func newInterruptible(ctx context.Context, f *os.File) (*interruptible, error) {
	wake, waker, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("prepare to read standard input: %w", err)
	}
	r := &interruptible{ctx: ctx, f: f, wake: wake, waker: waker}
	r.stop = context.AfterFunc(ctx, func() { r.once.Do(func() { _ = waker.Close() }) })
	return r, nil
}

func (r *interruptible) Read(p []byte) (int, error) {
	fds := []unix.PollFd{{Fd: int32(r.f.Fd()), Events: unix.POLLIN}, {Fd: int32(r.wake.Fd()), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		if r.ctx.Err() != nil {
			return 0, context.Cause(r.ctx)
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("wait for standard input: %w", err)
		}
		return r.f.Read(p)
	}
}

// close releases what was made for reading; the file stays open.
func (r *interruptible) close() {
	r.stop()
	r.once.Do(func() { _ = r.waker.Close() })
	_ = r.wake.Close()
}
