package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// Mounter serves images as file systems.
type Mounter interface {
	// Mount serves img at the empty directory dir, readable by every user, read-only,
	// nosuid and nodev, and returns once it answers. Mountinfo shows the type
	// "fuse.puzzlefs" and the given source. The mount outlives ctx.
	Mount(ctx context.Context, img *image.Image, dir, source string) (Mount, error)
}

// Mount is a file system that a [Mounter] serves, until it is unmounted everywhere: from
// its directory, which the driver does, and from where it was bound to.
type Mount interface {
	// Done is closed when the file system is no longer served.
	Done() <-chan struct{}
}

// mounts keeps one mount per image, shared by all volumes of that image. The key has no
// mount options because this version knows none that belong to a superblock: noexec and
// the like are set on each bind.
type mounts struct {
	dir     string
	mounter Mounter
	open    func(ctx context.Context, manifest format.Digest) (*image.Image, error)
	log     *slog.Logger

	mu     sync.Mutex // guards shared, and the users of each
	shared map[format.Digest]*sharedMount
}

// sharedMount is the mount of one image. Its entry stays in the map from the first user's
// arrival until the mount is gone, so that nobody mounts on a directory being unmounted.
type sharedMount struct {
	// users are the real target paths.
	users map[string]struct{}
	// busy is a lock that can be waited for with a context. It guards the fields below.
	busy  chan struct{}
	image *image.Image
	mount Mount
	dev   mountinfo.Device
}

func (m *mounts) path(manifest format.Digest) string {
	return filepath.Join(m.dir, manifest.Hex())
}

// acquire makes sure that the image is mounted and returns the index, the device and the
// directory of the mount. user keeps it until release; acquiring twice is once.
func (m *mounts) acquire(ctx context.Context, manifest format.Digest, user string) (img *image.Image, dev mountinfo.Device, err error) {
	m.mu.Lock()
	s := m.shared[manifest]
	if s == nil {
		s = &sharedMount{users: map[string]struct{}{}, busy: make(chan struct{}, 1)}
		m.shared[manifest] = s
	}
	_, had := s.users[user]
	s.users[user] = struct{}{}
	m.mu.Unlock()
	defer func() {
		if err != nil && !had {
			err = errors.Join(err, m.release(manifest, user))
		}
	}()

	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	case <-ctx.Done():
		return nil, "", fmt.Errorf("wait for the mount of %v: %w", manifest, ctx.Err())
	}
	alive, err := m.alive(manifest, s)
	if err != nil {
		return nil, "", err
	}
	if !alive {
		if err := m.mount(ctx, manifest, s); err != nil {
			return nil, "", err
		}
	}
	return s.image, s.dev, nil
}

// alive reports whether s is mounted and served. The caller has s.busy.
func (m *mounts) alive(manifest format.Digest, s *sharedMount) (bool, error) {
	if s.mount == nil {
		return false, nil
	}
	select {
	case <-s.mount.Done():
		return false, nil
	default:
	}
	table, err := readMounts()
	if err != nil {
		return false, err
	}
	return serves(table, m.path(manifest), s.dev), nil
}

// mount opens and serves the image. The caller has s.busy.
func (m *mounts) mount(ctx context.Context, manifest format.Digest, s *sharedMount) error {
	dir := m.path(manifest)
	if s.mount != nil {
		m.log.Warn("the mount of an image is gone, mounting it again", "image", manifest.String(), "dir", dir)
		if err := s.unmount(dir); err != nil {
			return err
		}
	}
	// What an earlier driver left there is dead, or not known to be alive.
	if err := detachAll(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make mount point: %w", err)
	}
	img, err := m.open(ctx, manifest)
	if err != nil {
		return errors.Join(fmt.Errorf("open image %v: %w", manifest, err), removeDir(dir))
	}
	for _, w := range img.Warnings() {
		m.log.Warn("the image is odd, but usable", "image", manifest.String(), "warning", w)
	}
	mnt, err := m.mounter.Mount(ctx, img, dir, manifest.String())
	if err != nil {
		return errors.Join(fmt.Errorf("mount image %v: %w", manifest, err), detachAll(dir), removeDir(dir))
	}
	s.image, s.mount = img, mnt
	table, err := readMounts()
	if err == nil {
		if stack := table.At(dir); len(stack) > 0 && isOurs(stack[0]) {
			s.dev = stack[0].Device
			return nil
		}
		err = fmt.Errorf("mount image %v: nothing of type %s is mounted at %s", manifest, fsType, dir)
	}
	return errors.Join(err, s.unmount(dir))
}

// unmount takes the mount off dir and removes dir. The caller has s.busy.
func (s *sharedMount) unmount(dir string) error {
	if s.mount != nil {
		s.image, s.mount, s.dev = nil, nil, ""
		if err := detachAll(dir); err != nil {
			return err
		}
	}
	return removeDir(dir)
}

// release takes user off the image's mount, and unmounts it when that was the last one.
// Releasing twice, or what was never acquired, is fine.
func (m *mounts) release(manifest format.Digest, user string) error {
	m.mu.Lock()
	s := m.shared[manifest]
	if s == nil {
		m.mu.Unlock()
		return nil
	}
	delete(s.users, user)
	m.mu.Unlock()

	s.busy <- struct{}{}
	defer func() { <-s.busy }()
	m.mu.Lock()
	unused := len(s.users) == 0 && m.shared[manifest] == s
	m.mu.Unlock()
	if !unused {
		return nil
	}
	if err := s.unmount(m.path(manifest)); err != nil {
		return fmt.Errorf("unmount image %v: %w", manifest, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// Somebody may have come meanwhile, and waits to mount it again.
	if len(s.users) == 0 {
		delete(m.shared, manifest)
	}
	return nil
}

// lookup returns the index and the device of an image that is mounted.
func (m *mounts) lookup(ctx context.Context, manifest format.Digest) (*image.Image, mountinfo.Device, bool) {
	m.mu.Lock()
	s := m.shared[manifest]
	m.mu.Unlock()
	if s == nil {
		return nil, "", false
	}
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	case <-ctx.Done():
		return nil, "", false
	}
	if alive, err := m.alive(manifest, s); err != nil || !alive {
		return nil, "", false
	}
	return s.image, s.dev, true
}

// removeDir removes an empty directory; a missing one is fine.
func removeDir(dir string) error {
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove mount point %s: %w", dir, err)
	}
	return nil
}

// used reports whether a volume uses the image's mount.
func (m *mounts) used(manifest format.Digest) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.shared[manifest] != nil
}
