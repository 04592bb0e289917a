package store

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"golang.org/x/sys/unix"
)

const (
	pinsLock = "lock"
	// holdPrefix begins the names of pins that last as long as a process holds their file.
	holdPrefix = "hold-"
	// pinTemp is the file that becomes a pin. There is one, since its writer has the lock.
	pinTemp = ".tmp"

	pinVersion  = 1
	maxPinFile  = 64 << 10
	pinFileMode = 0o600
	pinsDirMode = 0o700
)

// PinsConfig says where pins are kept.
type PinsConfig struct {
	// Dir is their directory, beside the layout, not in it.
	Dir string
	// Create makes the directory if it is not there; its parent must be.
	Create bool
	// LockTimeout bounds the wait for another process that changes pins or collects.
	// 0 means DefaultLockTimeout.
	LockTimeout time.Duration
}

// Pins are the images of a layout that [Store.Collect] keeps, with all of their blobs. Each is
// a file, so that every process sees them and a restart knows them:
//
//	DIR/lock                   held (flock) to change pins, and while blobs are removed
//	DIR/<manifest hex>.<name>  a pin; a name that begins with "hold-" is that of a hold
//
// A pin counts from when the call that makes it returns. All methods are safe for concurrent
// use, by many processes.
type Pins struct {
	dir     string
	timeout time.Duration
	mu      sync.Mutex // queues the goroutines of this process for the lock
}

// Pin keeps an image.
type Pin struct {
	// Image is the digest of its manifest.
	Image format.Digest
	// Name tells the pins of one image apart, and whose they are: "user", "mount-…".
	Name string
	// Note is for people.
	Note string
	// Since is when it was made.
	Since time.Time
}

// Held says whether the pin ends with the process that made it.
func (p Pin) Held() bool { return strings.HasPrefix(p.Name, holdPrefix) }

// pinFile is the content of a pin's file. What counts is the name.
type pinFile struct {
	Version int    `json:"version"`
	Note    string `json:"note"`
}

// OpenPins opens a directory of pins. Nothing stays open; there is nothing to close. Without
// Create it fails with ErrNotFound where there is no such directory.
func OpenPins(cfg PinsConfig) (*Pins, error) {
	if cfg.Dir == "" {
		return nil, errors.New("open pins: PinsConfig.Dir is empty")
	}
	if cfg.LockTimeout == 0 {
		cfg.LockTimeout = DefaultLockTimeout
	}
	p := &Pins{dir: filepath.Clean(cfg.Dir), timeout: cfg.LockTimeout}
	if cfg.Create {
		if err := os.Mkdir(p.dir, pinsDirMode); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("open pins: %w", explain(err))
		}
	}
	switch fi, err := os.Stat(p.dir); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("open pins: there is no directory %s: %w", p.dir, ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("open pins: %w", err)
	case !fi.IsDir():
		return nil, fmt.Errorf("open pins: %s is not a directory", p.dir)
	}
	return p, nil
}

// lock keeps all other processes and goroutines from changing pins and from removing blobs.
func (p *Pins) lock() (unlock func(), err error) {
	p.mu.Lock()
	fd, err := openat(unix.AT_FDCWD, filepath.Join(p.dir, pinsLock), unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW, pinFileMode)
	if err == nil {
		if err = flockWithin(fd, p.timeout); err == nil {
			return func() { _ = unix.Close(fd); p.mu.Unlock() }, nil
		}
		_ = unix.Close(fd)
	}
	p.mu.Unlock()
	if errors.Is(err, ErrLocked) {
		return nil, fmt.Errorf("another process has %s locked for more than %v; wait for it, or stop it, and try again: %w",
			filepath.Join(p.dir, pinsLock), p.timeout, ErrLocked)
	}
	return nil, fmt.Errorf("lock %s: %w", filepath.Join(p.dir, pinsLock), explain(err))
}

// NewName returns a name for a pin that no other has, beginning with owner and a dash.
func (p *Pins) NewName(owner string) string { return owner + "-" + strings.ToLower(rand.Text()) }

// Pin pins an image until Unpin, in place of the pin of the same name if there is one. The
// image need not be in the layout. name is 1 to 64 of a-z, 0-9 and dashes, and does not begin
// with "hold-". The pin outlives the process; it outlives a power failure after Sync. It fails
// with ErrLocked.
func (p *Pins) Pin(image format.Digest, name, note string) error {
	if err := p.pin(image, name, note); err != nil {
		return fmt.Errorf("pin image %s: %w", image, explain(err))
	}
	return nil
}

func (p *Pins) pin(image format.Digest, name, note string) error {
	if !validPinName(name) || strings.HasPrefix(name, holdPrefix) {
		return fmt.Errorf("the name %q is none that a pin can have", name)
	}
	b, err := json.Marshal(pinFile{Version: pinVersion, Note: note})
	if err != nil {
		return err
	}
	if len(b) > maxPinFile {
		return fmt.Errorf("the note has %d bytes, too many", len(note))
	}
	unlock, err := p.lock()
	if err != nil {
		return err
	}
	defer unlock()
	// What a killed process left at tmp is overwritten.
	tmp := filepath.Join(p.dir, pinTemp)
	if err := os.WriteFile(tmp, b, pinFileMode); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, p.path(image, name))
}

// Unpin removes a pin. It fails with ErrNotFound where there is none, and with ErrLocked.
func (p *Pins) Unpin(image format.Digest, name string) error {
	unlock, err := p.lock()
	if err != nil {
		return fmt.Errorf("unpin image %s: %w", image, err)
	}
	defer unlock()
	err = os.Remove(p.path(image, name))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("it has no pin %q: %w", name, ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("unpin image %s: %w", image, err)
	}
	return nil
}

// Hold pins an image until release is called or the process ends, however it ends. It is for who
// is about to look which blobs of an image are there. While the manifest is not in the layout a
// hold keeps nothing, and a collection that is removing blobs when it comes goes on for a moment
// without knowing it. So a pull holds, puts the manifest, holds again, which waits for that
// collection, and then looks for the rest. It fails with ErrLocked.
func (p *Pins) Hold(image format.Digest) (release func(), err error) {
	unlock, err := p.lock()
	if err != nil {
		return nil, fmt.Errorf("hold image %s: %w", image, err)
	}
	defer unlock()
	path := p.path(image, p.NewName(strings.TrimSuffix(holdPrefix, "-")))
	fd, err := openat(unix.AT_FDCWD, path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, pinFileMode)
	if err == nil {
		// Who lists the pins at this moment has it locked for a moment.
		if err = flockWithin(fd, p.timeout); err != nil {
			_ = unix.Close(fd)
			err = errors.Join(err, os.Remove(path))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("hold image %s: %w", image, explain(err))
	}
	return sync.OnceFunc(func() {
		// A file that stays behind, unlocked, is nobody's: a collection removes it.
		_ = os.Remove(path)
		_ = unix.Close(fd)
	}), nil
}

// Sync makes the pins durable.
func (p *Pins) Sync() error {
	fd, err := openat(unix.AT_FDCWD, p.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err == nil {
		err = retry(func() error { return unix.Syncfs(fd) })
		_ = unix.Close(fd)
	}
	if err != nil {
		return fmt.Errorf("sync pins: %w", explain(err))
	}
	return nil
}

// List returns the pins, ordered by image and name, without holds whose process is gone.
func (p *Pins) List() ([]Pin, error) { return p.list(nil) }

// list calls stale, if it is not nil, with the path of each hold whose process is gone.
func (p *Pins) list(stale func(path string)) ([]Pin, error) {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return nil, fmt.Errorf("list pins: %w", explain(err))
	}
	var pins []Pin
	for _, e := range entries {
		hex, name, _ := strings.Cut(e.Name(), ".")
		image, err := format.ParseHex(hex)
		if err != nil || !validPinName(name) {
			continue
		}
		pin, err := p.read(image, name)
		switch {
		case err == nil:
			pins = append(pins, pin)
		case errors.Is(err, errStale):
			if stale != nil {
				stale(p.path(image, name))
			}
		case !errors.Is(err, fs.ErrNotExist): // it may go meanwhile
			return nil, fmt.Errorf("list pins: %w", explain(err))
		}
	}
	slices.SortFunc(pins, func(a, b Pin) int {
		return cmp.Or(slices.Compare(a.Image[:], b.Image[:]), strings.Compare(a.Name, b.Name))
	})
	return pins, nil
}

var errStale = errors.New("its process is gone")

// read reads one pin. Content that makes no sense costs its note, not the pin.
func (p *Pins) read(image format.Digest, name string) (Pin, error) {
	pin := Pin{Image: image, Name: name}
	path := p.path(image, name)
	fi, err := os.Stat(path)
	if err != nil {
		return pin, err
	}
	pin.Since = fi.ModTime()
	if !pin.Held() {
		var content pinFile
		if b, err := readSmall(unix.AT_FDCWD, path, maxPinFile); err == nil && json.Unmarshal(b, &content) == nil {
			pin.Note = content.Note
		}
		return pin, nil
	}
	fd, err := openat(unix.AT_FDCWD, path, unix.O_RDONLY, 0)
	if err != nil {
		return pin, err
	}
	defer unix.Close(fd)
	err = retry(func() error { return unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB) })
	switch {
	case err == nil:
		return pin, errStale
	case errors.Is(err, unix.EWOULDBLOCK):
		return pin, nil
	}
	return pin, fmt.Errorf("%s: %w", path, err)
}

// Prune removes the holds of processes that are gone. A collection does so, too. It fails with
// ErrLocked.
func (p *Pins) Prune() error {
	unlock, err := p.lock()
	if err != nil {
		return fmt.Errorf("prune pins: %w", err)
	}
	defer unlock()
	_, err = p.current()
	return err
}

// current returns the pins and removes the holds of processes that are gone. The caller has
// the lock: without it a hold could be one that is just being made.
func (p *Pins) current() ([]Pin, error) {
	return p.list(func(path string) { _ = os.Remove(path) }) // what stays does no harm
}

func (p *Pins) path(image format.Digest, name string) string {
	return filepath.Join(p.dir, image.Hex()+"."+name)
}

func validPinName(name string) bool {
	return regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`).MatchString(name)
}
