package store_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// openPins opens pins beside a layout.
func openPins(t *testing.T, s *store.Store) *store.Pins {
	t.Helper()
	p, err := store.OpenPins(store.PinsConfig{Dir: pinsDir(s.Dir()), Create: true})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func pinsDir(layout string) string { return layout + "-pins" }

// pinNames returns "<image's first digits> <owner or name>: <note>" of each pin.
func pinNames(t *testing.T, p *store.Pins) []string {
	t.Helper()
	pins, err := p.List()
	must(t, err)
	var names []string
	for _, pin := range pins {
		if pin.Since.IsZero() || time.Since(pin.Since) > time.Hour {
			t.Errorf("pin %v was made %v", pin, pin.Since)
		}
		name := pin.Name
		if pin.Held() {
			name = "held"
		}
		names = append(names, fmt.Sprintf("%.4s %s: %s", pin.Image.Hex(), name, pin.Note))
	}
	return names
}

func checkPins(t *testing.T, p *store.Pins, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, pinNames(t, p)); diff != "" {
		t.Errorf("pins (-want +got):\n%s", diff)
	}
}

func TestPins(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pins")
	if _, err := store.OpenPins(store.PinsConfig{Dir: dir}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("open what is not there: %v, want ErrNotFound", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it was made: %v", err)
	}
	p, err := store.OpenPins(store.PinsConfig{Dir: dir, Create: true})
	must(t, err)
	a, b := format.Digest{0xaa, 0xaa}, format.Digest{0xbb, 0xbb}
	must(t, p.Pin(b, "user", "models"))
	must(t, p.Pin(a, "mount-1", ""))
	must(t, p.Pin(a, "user", "first"))
	must(t, p.Pin(a, "user", "second"))
	must(t, p.Sync())
	release, err := p.Hold(a)
	must(t, err)

	again, err := store.OpenPins(store.PinsConfig{Dir: dir})
	must(t, err)
	checkPins(t, again, "aaaa held: ", "aaaa mount-1: ", "aaaa user: second", "bbbb user: models")
	release()
	release()
	must(t, again.Unpin(a, "mount-1"))
	if err := p.Unpin(a, "mount-1"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("unpin twice: %v, want ErrNotFound", err)
	}
	checkPins(t, p, "aaaa user: second", "bbbb user: models")

	// Damage costs a note, not a pin; what is no pin is passed over.
	writeFile(t, filepath.Join(dir, b.Hex()+".user"), []byte("{torn"))
	for _, name := range []string{".tmp", "README", a.Hex(), a.Hex() + ".", a.Hex() + ".UPPER", strings.ToUpper(a.Hex()) + ".user"} {
		writeFile(t, filepath.Join(dir, name), nil)
	}
	checkPins(t, p, "aaaa user: second", "bbbb user: ")

	for _, name := range []string{"", "hold-1", "a/b", "..", "A", "-a", strings.Repeat("a", 65)} {
		if err := p.Pin(a, name, ""); err == nil {
			t.Errorf("a pin with the name %q was made", name)
		}
	}
	if x, y := p.NewName("mount"), p.NewName("mount"); x == y || p.Pin(a, x, "") != nil {
		t.Errorf("names %q and %q: want two that can be used", x, y)
	}
}

// TestPinsLocked: a process that keeps the lock is named, and does not keep others for ever.
func TestPinsLocked(t *testing.T) {
	dir := t.TempDir()
	p, err := store.OpenPins(store.PinsConfig{Dir: dir, LockTimeout: 20 * time.Millisecond})
	must(t, err)
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	must(t, err)
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	if err := p.Pin(format.Digest{1}, "user", ""); !errors.Is(err, store.ErrLocked) || !strings.Contains(err.Error(), dir) {
		t.Errorf("pin: %v, want ErrLocked and the file's name", err)
	}
	if _, err := p.Hold(format.Digest{1}); !errors.Is(err, store.ErrLocked) {
		t.Errorf("hold: %v, want ErrLocked", err)
	}
	must(t, f.Close())
	must(t, p.Pin(format.Digest{1}, "user", ""))
}

// TestHoldEndsWithProcess: what a killed process held is not pinned any more, and is cleaned up
// by whoever prunes, as each collection does.
func TestHoldEndsWithProcess(t *testing.T) {
	s := create(t, store.Config{})
	p := openPins(t, s)
	image := putImage(t, s, "a", 1)
	cmd := child(t, "pin", s.Dir())
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	_, err = out.Read(make([]byte, 1))
	must(t, err)
	name := fmt.Sprintf("%.4s", image.Hex())
	checkPins(t, p, name+" held: ", name+" user: by a child")
	must(t, cmd.Process.Kill())
	if err := cmd.Wait(); err == nil {
		t.Error("the child ended by itself")
	}
	checkPins(t, p, name+" user: by a child")
	live, err := p.Hold(image)
	must(t, err)
	must(t, p.Prune())
	checkPins(t, p, name+" held: ", name+" user: by a child")
	live()
	entries, err := os.ReadDir(pinsDir(s.Dir()))
	must(t, err)
	if len(entries) != 2 {
		t.Errorf("left: %v, want the lock and the pin", entries)
	}
}

// TestHoldBesideList: who lists the pins looks for a lock on each hold's file by asking for it.
// That must not keep a hold from being made whose file is found just before it is locked.
func TestHoldBesideList(t *testing.T) {
	dir := t.TempDir()
	p, err := store.OpenPins(store.PinsConfig{Dir: dir})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var lister sync.WaitGroup
	lister.Go(func() {
		d, err := os.Open(dir)
		if err != nil {
			t.Error(err)
			return
		}
		defer d.Close()
		for ctx.Err() == nil {
			// What List does with the file of a hold, and nothing else, so that it meets it early.
			_, err := d.Seek(0, io.SeekStart)
			names, listErr := d.Readdirnames(-1)
			if err := errors.Join(err, listErr); err != nil {
				t.Error(err)
				return
			}
			for _, name := range names {
				if f, err := os.Open(filepath.Join(dir, name)); err == nil && name != "lock" {
					_ = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
					f.Close()
				}
			}
		}
	})
	for range 3000 {
		release, err := p.Hold(format.Digest{1})
		if err != nil {
			t.Error(err)
			break
		}
		release()
	}
	cancel()
	lister.Wait()
}
