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
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// Mounter serves images as file systems.
type Mounter interface {
	// Mount serves img as spec says, read-only and readable by every user, and returns once
	// it answers. Mountinfo shows the type "fuse.puzzlefs". The mount outlives ctx.
	Mount(ctx context.Context, img *image.Image, spec MountSpec) (Mount, error)
}

// MountSpec says how to serve an image.
type MountSpec struct {
	// Dir is an empty directory to mount on.
	Dir string
	// Source is what mountinfo is to show as such.
	Source string
	// ModTime is the one time of all files, which images do not store; 1970 if zero.
	ModTime time.Time
	// Dev and Suid let device files and set-user-ID bits work, NoExec keeps programs from
	// being run. Binds of the mount can only take away.
	Dev, Suid, NoExec bool
	// SELinux are options of the file system, such as "context=LABEL", without quotes.
	SELinux []string
}

// Mount is a file system that a [Mounter] serves, until it is unmounted everywhere: from
// its directory, which the driver does, and from where it was bound to.
type Mount interface {
	// Done is closed when the file system is no longer served.
	Done() <-chan struct{}
}

// mounts keeps one mount per image and options, shared by all volumes of them. The key has the
// options of the file system; nodev, noexec and the like are set on each bind.
type mounts struct {
	dir     string
	mounter Mounter
	open    func(ctx context.Context, manifest format.Digest, limits image.Limits) (*image.Image, error)
	memory  *memory
	// pin keeps an image in the store until unpin is called.
	pin   func(ctx context.Context, manifest format.Digest) (unpin func(), err error)
	flags mountFlags
	log   *slog.Logger

	mu     sync.Mutex // guards shared, and the users of each
	shared map[mountKey]*sharedMount
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
	// ended is closed when the mount is done and what it took is given back.
	ended <-chan struct{}
}

// endWait is how long the end of a mount that is taken away is waited for: so that who makes room right after the
// last volume of an image is gone finds it unused. A process that keeps a file of it open is not waited for.
const endWait = 500 * time.Millisecond

func (m *mounts) path(key mountKey) string {
	return filepath.Join(m.dir, key.name())
}

// acquire makes sure that the image is mounted and returns the index, the device and the
// directory of the mount. user keeps it until release; acquiring twice is once. An image that
// is mounted for a new volume is held against the node's limits; for one that was published
// before it was, and one that has to be mounted again is not refused.
func (m *mounts) acquire(ctx context.Context, key mountKey, user string, limits admission) (img *image.Image, dev mountinfo.Device, err error) {
	m.mu.Lock()
	s := m.shared[key]
	if s == nil {
		s = &sharedMount{users: map[string]struct{}{}, busy: make(chan struct{}, 1)}
		m.shared[key] = s
	}
	_, had := s.users[user]
	s.users[user] = struct{}{}
	m.mu.Unlock()
	defer func() {
		if err != nil && !had {
			err = errors.Join(err, m.release(key, user))
		}
	}()

	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	case <-ctx.Done():
		return nil, "", fmt.Errorf("wait for the mount of %v: %w", key.manifest, ctx.Err())
	}
	alive, err := m.alive(key, s)
	if err != nil {
		return nil, "", err
	}
	if !alive {
		if err := m.mount(ctx, key, s, limits); err != nil {
			return nil, "", err
		}
	}
	return s.image, s.dev, nil
}

// alive reports whether s is mounted and served. The caller has s.busy.
func (m *mounts) alive(key mountKey, s *sharedMount) (bool, error) {
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
	return serves(table, m.path(key), s.dev), nil
}

// mount opens and serves the image. The caller has s.busy.
func (m *mounts) mount(ctx context.Context, key mountKey, s *sharedMount, limits admission) error {
	dir := m.path(key)
	if s.mount != nil {
		m.log.Warn("the mount of an image is gone, mounting it again", "image", key.manifest.String(), "dir", dir)
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
	unpin, err := m.pin(ctx, key.manifest)
	if err != nil {
		return errors.Join(err, removeDir(dir))
	}
	img, err := m.memory.open(ctx, limits, func(limits image.Limits) (*image.Image, error) {
		return m.open(ctx, key.manifest, limits)
	})
	if err != nil {
		unpin()
		return errors.Join(fmt.Errorf("open image %v: %w", key.manifest, err), removeDir(dir))
	}
	for _, w := range img.Warnings() {
		m.log.Warn("the image is odd, but usable", "image", key.manifest.String(), "warning", w)
	}
	mnt, err := m.mounter.Mount(ctx, img, MountSpec{
		Dir: dir, Source: key.manifest.String(), ModTime: key.options.modTime, SELinux: key.options.list(),
		Dev: m.flags.dev, Suid: m.flags.suid, NoExec: m.flags.noexec,
	})
	if err != nil {
		m.memory.free(img)
		unpin()
		return errors.Join(fmt.Errorf("mount image %v: %w", key.manifest, err), detachAll(dir), removeDir(dir))
	}
	// Detaching it is not enough: a process that has a file open goes on reading. It ends with
	// the mount, which ends with this process at the latest.
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		<-mnt.Done()
		unpin()
		m.memory.free(img)
	}()
	s.image, s.mount, s.ended = img, mnt, ended
	table, err := readMounts()
	if err == nil {
		if stack := table.At(dir); len(stack) > 0 && isOurs(stack[0]) {
			s.dev = stack[0].Device
			return nil
		}
		err = fmt.Errorf("mount image %v: nothing of type %s is mounted at %s", key.manifest, fsType, dir)
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
		select {
		case <-s.ended:
		case <-time.After(endWait):
		}
	}
	return removeDir(dir)
}

// release takes user off the image's mount, and unmounts it when that was the last one.
// Releasing twice, or what was never acquired, is fine.
func (m *mounts) release(key mountKey, user string) error {
	m.mu.Lock()
	s := m.shared[key]
	if s == nil {
		m.mu.Unlock()
		return nil
	}
	delete(s.users, user)
	m.mu.Unlock()

	s.busy <- struct{}{}
	defer func() { <-s.busy }()
	m.mu.Lock()
	unused := len(s.users) == 0 && m.shared[key] == s
	m.mu.Unlock()
	if !unused {
		return nil
	}
	if err := s.unmount(m.path(key)); err != nil {
		return fmt.Errorf("unmount image %v: %w", key.manifest, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// Somebody may have come meanwhile, and waits to mount it again.
	if len(s.users) == 0 {
		delete(m.shared, key)
	}
	return nil
}

// lookup returns the index and the device of an image that is mounted.
func (m *mounts) lookup(ctx context.Context, key mountKey) (*image.Image, mountinfo.Device, bool) {
	m.mu.Lock()
	s := m.shared[key]
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
	if alive, err := m.alive(key, s); err != nil || !alive {
		return nil, "", false
	}
	return s.image, s.dev, true
}

// count returns how many images have a mount, or are getting or losing theirs.
func (m *mounts) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.shared)
}

// removeDir removes an empty directory; a missing one is fine.
func removeDir(dir string) error {
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove mount point %s: %w", dir, err)
	}
	return nil
}

// used reports whether a volume uses the mount whose directory has that name.
func (m *mounts) used(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key := range m.shared {
		if key.name() == name {
			return true
		}
	}
	return false
}
