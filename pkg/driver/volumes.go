package driver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// recordVersion is the version of the JSON of records that this driver writes and reads.
const recordVersion = 1

// Suffixes of the files of STATE/volumes.
const (
	// suffixPublished marks a volume that kubelet was told is published.
	suffixPublished = ".json"
	// suffixPending marks one that is half published or half unpublished: kubelet was told
	// nothing, so a driver that finds one at start undoes it.
	suffixPending = ".pending"
	// suffixCorrupt marks a record that could not be read and was set aside.
	suffixCorrupt = ".corrupt"
)

// record is what is remembered of one volume at one target path.
type record struct {
	Version int  `json:"version"`
	Args    args `json:"args"`
	// Real is the target path without symlinks, the key of a record.
	Real string `json:"realPath"`
	// Manifest is the image.
	Manifest format.Digest `json:"manifest"`
	// Pod is whom the volume is for, if kubelet said so. Events about it go there.
	Pod pod `json:"pod,omitzero"`

	// options follow from Args; they are kept so that nothing can fail later.
	options superOptions
}

// mount says which mount r is a bind of.
func (r record) mount() mountKey { return mountKey{manifest: r.Manifest, options: r.options} }

func (r record) target() target { return target{given: r.Args.TargetPath, real: r.Real} }

// fileName returns the name of r's file without suffix. Volume ids that are not plain
// words are hashed; the target is part of it because a volume that is not ephemeral can be
// published at several.
func (r record) fileName() string {
	id := r.Args.VolumeID
	if !isPlainWord(id) {
		sum := sha256.Sum256([]byte(id))
		id = "id-" + hex.EncodeToString(sum[:])
	}
	sum := sha256.Sum256([]byte(r.Real))
	return id + "-" + hex.EncodeToString(sum[:8])
}

// isPlainWord reports whether an id can be a part of a file name as it is.
func isPlainWord(id string) bool {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	return id != "" && len(id) <= 100 && strings.IndexByte(letters, id[0]) >= 0 && strings.Trim(id, letters+"._-") == ""
}

// volume is a record and what is known about its state.
type volume struct {
	record
	// pending says that the volume is to be undone, see suffixPending.
	pending bool
}

// volumes holds the records of STATE/volumes. It is safe for concurrent use; the caller
// holds the lock of the target whose record it changes.
type volumes struct {
	dir string
	log *slog.Logger
	// committed has an element when there is something to flush.
	committed chan struct{}

	mu       sync.Mutex // guards what follows
	byReal   map[string]volume
	unsynced []string // records that the disk may not have yet
}

// openVolumes reads the records in dir. A file that is not a record is set aside with a
// warning: one bad file must not take the node's other volumes down.
func openVolumes(dir string, log *slog.Logger) (*volumes, error) {
	v := &volumes{dir: dir, log: log, committed: make(chan struct{}, 1), byReal: map[string]volume{}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read volume records: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		pending := strings.HasSuffix(e.Name(), suffixPending)
		if !pending && !strings.HasSuffix(e.Name(), suffixPublished) {
			continue
		}
		r, err := readRecord(path)
		switch {
		case err == nil:
		case pending:
			// Killed while writing it: nothing was mounted before it was whole.
			log.Info("removing the unfinished record of a publish that never began", "file", path)
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("remove unfinished record: %w", err)
			}
			continue
		default:
			log.Warn("set aside a volume record that cannot be read; its volume is published anew when kubelet asks", "file", path, "error", err)
			if err := os.Rename(path, path+suffixCorrupt); err != nil {
				return nil, fmt.Errorf("set aside volume record: %w", err)
			}
			continue
		}
		v.byReal[r.Real] = volume{record: r, pending: pending}
	}
	return v, nil
}

func readRecord(path string) (record, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return record{}, err
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("decode: %w", err)
	}
	if r.Version != recordVersion {
		return record{}, fmt.Errorf("version %d, this driver reads %d", r.Version, recordVersion)
	}
	if checkTarget(r.Real) != nil || checkTarget(r.Args.TargetPath) != nil || checkSubPath(r.Args.subPath()) != nil || r.Manifest.IsZero() {
		return record{}, errors.New("it lacks a target path or a digest, or has bad ones")
	}
	r.options, err = r.Args.options()
	return r, err
}

// all returns the volumes, ordered by target.
func (v *volumes) all() []volume {
	v.mu.Lock()
	defer v.mu.Unlock()
	list := make([]volume, 0, len(v.byReal))
	for _, vol := range v.byReal {
		list = append(list, vol)
	}
	slices.SortFunc(list, func(a, b volume) int { return strings.Compare(a.Real, b.Real) })
	return list
}

// count returns how many volumes there are that are, or are not, pending.
func (v *volumes) count(pending bool) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	n := 0
	for _, vol := range v.byReal {
		if vol.pending == pending {
			n++
		}
	}
	return n
}

// at returns the volume at t. It is found by the path that kubelet gave, too, because a
// parent that is gone has no real path any more.
func (v *volumes) at(t target) (volume, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if vol, ok := v.byReal[t.real]; ok {
		return vol, true
	}
	for _, vol := range v.byReal {
		if vol.Args.TargetPath == t.given {
			return vol, true
		}
	}
	return volume{}, false
}

// begin notes that r is about to be published. The note need not survive a power loss,
// after which nothing is mounted, only our own death: it is not synced.
func (v *volumes) begin(r record) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode volume record: %w", err)
	}
	if err := os.WriteFile(v.path(r, suffixPending), b, 0o600); err != nil {
		return fmt.Errorf("write volume record: %w", err)
	}
	v.set(volume{record: r, pending: true})
	return nil
}

// commit makes the record that begin wrote that of a published volume. The disk has it soon, see
// keepOnDisk: to wait for that would be most of what it takes to publish an image that is there.
func (v *volumes) commit(r record) error {
	published := v.path(r, suffixPublished)
	if err := os.Rename(v.path(r, suffixPending), published); err != nil {
		return fmt.Errorf("write volume record: %w", err)
	}
	v.set(volume{record: r})
	v.mu.Lock()
	v.unsynced = append(v.unsynced, published)
	v.mu.Unlock()
	select {
	case v.committed <- struct{}{}:
	default: // it is known already
	}
	return nil
}

// flushDelay is how long records are collected before they are written to the disk.
const flushDelay = 100 * time.Millisecond

// keepOnDisk writes records to the disk soon after they were committed, until the returned
// function is called, which writes the rest and waits. A record outlives the death of the process
// in any case. One that a power failure takes is of a mount that it took, too: after the node is up
// kubelet publishes the volume again.
func (v *volumes) keepOnDisk() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			select {
			case <-v.committed:
			case <-ctx.Done():
			}
			select {
			case <-time.After(flushDelay):
			case <-ctx.Done():
			}
			if err := v.flush(); err != nil {
				v.log.Error("cannot write volume records to the disk; a power failure may lose them", "error", err)
			}
		}
	}()
	return func() { cancel(); <-done }
}

// flush writes to the disk what was committed before.
func (v *volumes) flush() error {
	v.mu.Lock()
	files := v.unsynced
	v.unsynced = nil
	v.mu.Unlock()
	if len(files) == 0 {
		return nil
	}
	var errs []error
	for _, file := range files {
		// Its volume may be gone again.
		if err := syncFile(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, syncFile(v.dir))...)
}

// retire notes that r is about to be unpublished.
func (v *volumes) retire(r record) error {
	err := os.Rename(v.path(r, suffixPublished), v.path(r, suffixPending))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("mark volume record for removal: %w", err)
	}
	v.set(volume{record: r, pending: true})
	return nil
}

// drop forgets r.
func (v *volumes) drop(r record) error {
	for _, suffix := range []string{suffixPublished, suffixPending} {
		if err := os.Remove(v.path(r, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove volume record: %w", err)
		}
	}
	if err := syncFile(v.dir); err != nil {
		return fmt.Errorf("remove volume record: %w", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.byReal, r.Real)
	return nil
}

func (v *volumes) set(vol volume) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.byReal[vol.Real] = vol
}

func (v *volumes) path(r record, suffix string) string {
	return filepath.Join(v.dir, r.fileName()+suffix)
}

// syncFile makes a file, or the names in a directory, durable.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// writeFile replaces a file durably: a reader sees the old content or the new one.
func writeFile(path string, b []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".tmp-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncFile(dir)
}
