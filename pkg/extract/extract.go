// Package extract writes the tree of an image to a directory: content, modes with their
// set-id bits, owners, extended attributes, hard links, symlinks, fifos, sockets, devices.
//
// Images are hostile, and so may be who owns something in the directory. No path can lead out
// of it, for three reasons. Names cannot leave a directory, because package format refuses
// those that could. All work is done with one name at a time, relative to the descriptor of a
// directory that this package made or took over: while it works there the directory belongs
// to the user who extracts and nobody else may write to it, so that what stands in it is what
// this package found or made. And what is found there is looked at with openat2, which follows
// no symlink and enters no mount, before anything is done to it. os.Root gives the first and
// the last, but not descriptors for the kinds of inodes that an image has, nor a word on mounts.
package extract

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// Errors of this package, wrapped with the path at hand.
var (
	// ErrConfig says that a Config is not usable.
	ErrConfig = errors.New("invalid extraction")
	// ErrNotEmpty says that the target has content already.
	ErrNotEmpty = errors.New("directory is not empty: extract into a new or an empty one, or complete what is there with --force")
	// ErrStray says that the target has content that the image has not, or a directory with
	// content where the image has something else.
	ErrStray = errors.New("the image does not have what is there: remove it, or extract into another directory")
	// ErrBusy says that another extraction works in the target.
	ErrBusy = errors.New("another extraction is writing to this directory: wait for it")
	// ErrMount says that something is mounted in the target.
	ErrMount = errors.New("something is mounted here: unmount it, or extract into another directory")
	// ErrOwner says that a directory of another user is in the target.
	ErrOwner = errors.New("it belongs to another user: extract as root, or into another directory")
	// ErrImmutable says that what is there cannot be changed.
	ErrImmutable = errors.New("it is immutable or append-only: change that with chattr -i -a")
	// ErrPrivilege says that something can be restored by root only.
	ErrPrivilege = errors.New("only root may restore this: run as root")
	// ErrDevice says that Linux has no device of a number, which would become another.
	ErrDevice = errors.New("no such device number: Linux has major numbers up to 4095 and minor ones up to 1048575")
	// ErrXattrs says that a file system has no room for the attributes of one file.
	ErrXattrs = errors.New("the file system cannot hold so many attributes of one file: extract to another one")
	// ErrChanged says that somebody else removed a file that was extracted, or put another one in
	// its place.
	ErrChanged = errors.New("somebody removed or replaced this file meanwhile: extract where nobody else writes")
)

// Config says what to extract.
type Config struct {
	Image *image.Image
	// Dir is the target, which is made if it does not exist. Its owner, mode and attributes
	// become those of the image's root.
	Dir string
	// Force lets Dir have content, which is completed and corrected. Without it Dir must be
	// empty.
	Force bool
	// Workers is the number of files written at the same time; 0 means one per CPU.
	Workers int
	// Progress, if not nil, is called with the bytes written or compared so far, from several
	// goroutines.
	Progress func(bytes int64)
	// Fault, if not nil, is called at each step, from several goroutines. For tests.
	Fault func(Step) error
}

// Report is what an extraction came to.
type Report struct {
	// Files is the number of regular files, hard links counted once, and Bytes their content.
	Files, Bytes int64
	// ReusedFiles and ReusedBytes are the part of them that was there and stayed.
	ReusedFiles, ReusedBytes int64
}

// Extract writes the tree. Owners are restored as root only, as tar does. When it fails,
// what it wrote is removed again.
//
// With Force the target may have content, most of all what an extraction left that was
// killed. The outcome is the same as in an empty directory:
//
//   - A file whose content is that of the image, which is found out by comparing every byte
//     and never from size and times, stays, and its attributes are corrected. It is written
//     anew instead where others than who extracts could have it open for writing, and where
//     it has names that the image does not give it: what is changed then would change
//     elsewhere, too. So is one that gets set-id bits or capabilities.
//   - Directories stay. Everything else stays if it is exactly right.
//   - What differs is replaced by what was made complete beside it, in one step. Only what
//     stands in the way of a directory, and an empty directory that stands in the way of
//     something else, is removed before.
//   - What the image does not have makes the extraction fail with ErrStray before anything
//     is changed, as the tree would not be that of the image with it, and nobody asked for
//     its removal. Mounts do likewise, with ErrMount.
//
// When it fails nothing that was there is removed, and what was written stays; no file is ever
// incomplete under its name. Doing it again completes it. One target takes one extraction at
// a time.
func Extract(ctx context.Context, cfg Config) (Report, error) {
	switch {
	case cfg.Image == nil:
		return Report{}, fmt.Errorf("extract to %s: no image: %w", cfg.Dir, ErrConfig)
	case cfg.Dir == "":
		return Report{}, fmt.Errorf("extract image %s: no directory: %w", cfg.Image.Digest(), ErrConfig)
	case cfg.Workers < 0:
		return Report{}, fmt.Errorf("extract to %s: %d workers: %w", cfg.Dir, cfg.Workers, ErrConfig)
	case cfg.Workers == 0:
		cfg.Workers = runtime.GOMAXPROCS(0)
	}
	report, err := extract(ctx, &cfg)
	if err != nil {
		return report, fmt.Errorf("extract to %s: %w", cfg.Dir, err)
	}
	return report, nil
}

func extract(ctx context.Context, cfg *Config) (_ Report, err error) {
	made := true
	if err := os.Mkdir(cfg.Dir, 0o700); err != nil {
		if !errors.Is(err, os.ErrExist) {
			return Report{}, err
		}
		made = false
	}
	target := place{name: cfg.Dir}
	root, err := openDir(unix.AT_FDCWD, cfg.Dir, target)
	if err != nil {
		return Report{}, err
	}
	// The root stays open until all hard links are made, whoever else lets go of it.
	defer func() { err = errors.Join(err, root.Close()) }()
	if err := unix.Flock(int(root.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return Report{}, ErrBusy // other errors: the file system has no locks
	}
	if !made && !cfg.Force {
		if err := needEmpty(root); err != nil {
			return Report{}, err
		}
	}
	attr, err := cfg.Image.Attr(format.RootIno)
	if err != nil {
		return Report{}, err
	}
	x := &extractor{
		ctx: ctx, cfg: cfg, root: root, isRoot: os.Geteuid() == 0,
		jobs:  make(chan job, 64),
		links: make(map[uint64]*firstName),
	}
	top := &directory{place: target, attr: attr}
	if cfg.Force && !made {
		if err := x.survey(top); err != nil {
			return Report{}, err
		}
	}
	if !cfg.Force {
		defer func() {
			if err != nil {
				err = errors.Join(err, remove(root, cfg.Dir, made), top.restoreTo(procPath(int(root.Fd()))))
			}
		}()
	}
	if err := x.at(StepSurveyed); err != nil {
		return Report{}, err
	}
	// A descriptor of its own for the tree, which closes it when it is complete.
	if err := x.take(top, int(root.Fd())); err != nil {
		return Report{}, err
	}
	err = x.run(top)
	return x.report(), err
}

// run writes the tree below top.
func (x *extractor) run(top *directory) error {
	g, ctx := errgroup.WithContext(x.ctx)
	x.ctx = ctx
	g.Go(func() error {
		defer close(x.jobs)
		return x.tree(top)
	})
	for range x.cfg.Workers {
		g.Go(x.work)
	}
	err := g.Wait()
	// What the workers left when one of them failed.
	for j := range x.jobs {
		if j.f != nil {
			err = errors.Join(err, j.f.Close())
		}
		err = errors.Join(err, x.release(j.parent, false))
	}
	return err
}

// needEmpty returns ErrNotEmpty unless a directory is empty.
func needEmpty(dir *os.File) error {
	switch _, err := dir.Readdirnames(1); {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return err
	}
	return ErrNotEmpty
}

// remove takes back what a failed extraction wrote into the target that root is open of, whatever
// stands at its path by now, and dir itself if it was made.
func remove(root *os.File, dir string, made bool) error {
	top := procPath(int(root.Fd())) + "/."
	if os.Geteuid() != 0 {
		// Who is not root cannot empty directories that are finished and read only.
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && (path != top || made) {
				err = os.Chmod(path, 0o700) //nolint:gosec // a directory
			}
			return err
		})
	}
	r, err := os.OpenRoot(top)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(top)
	for _, e := range entries {
		err = errors.Join(err, r.RemoveAll(e.Name()))
	}
	err = errors.Join(err, r.Close())
	if made && err == nil {
		err = os.Remove(dir)
	}
	return err
}
