package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// ErrNoState says that a directory is not the state directory of a driver.
var ErrNoState = errors.New("not a state directory")

// UserPin is the name of the pin that [State.Pin] makes.
const UserPin = "user"

// State is the state directory of a driver as operators see it. The driver may be running or
// not, and may start or stop meanwhile: it sees what State does, and the other way round.
type State struct {
	store  *store.Store
	pins   *store.Pins
	images string
}

// OpenState opens the state directory of a driver. It makes nothing, and fails with ErrNoState
// where there is none.
func OpenState(dir string) (*State, error) {
	fail := func(why string) error {
		return fmt.Errorf("open state directory %s: %s: %w", dir, why, ErrNoState)
	}
	switch fi, err := os.Stat(dir); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fail("it does not exist; give the directory that the driver has as --state-dir")
	case err != nil:
		return nil, fmt.Errorf("open state directory: %w", err)
	case !fi.IsDir():
		return nil, fail("it is not a directory; give the directory that the driver has as --state-dir")
	}
	for _, name := range []string{"lock", "images", "volumes", "store"} {
		if _, err := os.Stat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
			return nil, fail(fmt.Sprintf("it has no %s; give the directory that the driver has as --state-dir", name))
		} else if err != nil {
			return nil, fmt.Errorf("open state directory: %w", err)
		}
	}
	pins, err := store.OpenPins(store.PinsConfig{Dir: filepath.Join(dir, "pins")})
	if errors.Is(err, store.ErrNotFound) {
		// Its driver is of a version that pins nothing: mounted images would be collected.
		return nil, fail("it has no pins; start the driver of this version once")
	}
	if err != nil {
		return nil, fmt.Errorf("open state directory: %w", err)
	}
	st, err := store.Open(store.Config{Dir: filepath.Join(dir, "store")})
	if err != nil {
		return nil, fmt.Errorf("open state directory: %w", err)
	}
	return &State{store: st, pins: pins, images: filepath.Join(dir, "images")}, nil
}

// Close releases the directory.
func (s *State) Close() error { return s.store.Close() }

// StoredImage is an image in the store of a node.
type StoredImage struct {
	store.ImageUsage
	// Repositories are those that give the image to the node without a pod's secret.
	Repositories []string
	// Recorded says that the image was whole when it was pulled.
	Recorded bool
}

// Survey returns what the store holds, and its images, least recently used first.
func (s *State) Survey(ctx context.Context) (*store.Survey, []StoredImage, error) {
	records, err := s.records()
	if err != nil {
		return nil, nil, err
	}
	v, err := s.store.Survey(ctx, s.pins, digests(records))
	if err != nil {
		return nil, nil, err
	}
	var images []StoredImage
	for _, u := range v.Images {
		r, recorded := records[u.Image]
		images = append(images, StoredImage{ImageUsage: u, Repositories: r.Repositories, Recorded: recorded})
	}
	return v, images, nil
}

// records reads the image records. Those that cannot be read are the driver's business.
func (s *State) records() (map[format.Digest]imageRecord, error) {
	entries, err := os.ReadDir(s.images)
	if err != nil {
		return nil, fmt.Errorf("read image records: %w", err)
	}
	records := map[format.Digest]imageRecord{}
	for _, e := range entries {
		if r, err := readImageRecord(filepath.Join(s.images, e.Name())); err == nil {
			records[r.Manifest] = r
		}
	}
	return records, nil
}

// readImageRecord reads an image record, which has the name of its image.
func readImageRecord(path string) (imageRecord, error) {
	var r imageRecord
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err == nil && (r.Version != recordVersion || filepath.Base(path) != r.Manifest.Hex()+".json") {
		err = fmt.Errorf("it is of version %d and says to be about %v", r.Version, r.Manifest)
	}
	return r, err
}

func digests(records map[format.Digest]imageRecord) []format.Digest {
	var list []format.Digest
	for d := range records {
		list = append(list, d)
	}
	return list
}

// CollectOptions say how far State.Collect goes. The zero value only removes old orphans.
type CollectOptions struct {
	// All evicts every image that is not pinned.
	All bool
	// Quota, if not 0, is how many bytes blobs may take up afterwards; Reserve is how much of
	// the disk is to be free. Images are evicted until both hold, or none is left.
	Quota   int64
	Reserve Reserve
	// DryRun only computes.
	DryRun bool
}

// Collect evicts images and removes orphans. Images that are mounted, pinned or being pulled
// stay. The result is valid with an error, too.
func (s *State) Collect(ctx context.Context, opts CollectOptions) (store.Collected, error) {
	records, err := s.records()
	if err != nil {
		return store.Collected{}, err
	}
	free, total, err := s.store.Free()
	if err != nil {
		return store.Collected{}, err
	}
	return s.store.Collect(ctx, s.pins, store.CollectOptions{
		Want: func(used int64) (must, want int64) {
			if opts.All {
				return store.All(used)
			}
			if opts.Quota > 0 {
				want = used - opts.Quota
			}
			return 0, max(want, opts.Reserve.of(total)-free)
		},
		OrphanAge: orphanAge,
		Further:   digests(records),
		Forget: func(d format.Digest) error {
			err := os.Remove(filepath.Join(s.images, d.Hex()+".json"))
			if errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
			return err
		},
		DryRun: opts.DryRun,
	})
}

// Verified says what State.Verify found.
type Verified struct {
	// Blobs and Bytes are those that were read, good or bad.
	Blobs int
	Bytes int64
	// Corrupt are the blobs that do not hold what their digests name.
	Corrupt []DamagedBlob
	// Missing are blobs that are not there though a pinned image, which may be mounted, needs
	// them: its readers get errors.
	Missing []DamagedBlob
}

// DamagedBlob is a blob that is corrupt or not there.
type DamagedBlob struct {
	Blob format.Digest
	// Images need it.
	Images []format.Digest
	// Removed says that it was removed, so that it is fetched again.
	Removed bool
}

// Verify reads all blobs and checks them against their digests. With repair it removes those that
// are corrupt, pinned or not, as the driver does with those that it comes across: their readers
// get errors either way, and the next publish of a volume of the image fetches what is not
// there. progress, if not nil, is called with the bytes read so far.
func (s *State) Verify(ctx context.Context, repair bool, progress func(done int64)) (Verified, error) {
	var v Verified
	records, err := s.records()
	if err != nil {
		return v, err
	}
	// Before blobs are removed: a manifest may be among them.
	needs, err := s.store.Needs(ctx, s.pins, digests(records))
	if err != nil {
		return v, err
	}
	for d, err := range s.store.Blobs() {
		if err != nil {
			return v, err
		}
		size, err := s.store.Size(d)
		if err == nil {
			err = s.store.Verify(ctx, d)
		}
		switch {
		case errors.Is(err, store.ErrNotFound):
			continue // it went meanwhile
		case errors.Is(err, store.ErrDigestMismatch):
			damaged := DamagedBlob{Blob: d, Images: needs[d]}
			if repair {
				// Where it is gone or replaced meanwhile, the driver came across it, too.
				if _, err := s.store.RemoveCorrupt(ctx, d); err != nil && !errors.Is(err, store.ErrNotFound) {
					return v, err
				}
				damaged.Removed = true
			}
			v.Corrupt = append(v.Corrupt, damaged)
		case err != nil:
			return v, err
		}
		v.Blobs++
		v.Bytes += size
		if progress != nil {
			progress(v.Bytes)
		}
	}
	if v.Missing, err = s.missing(needs, v.Corrupt); err != nil {
		return v, err
	}
	sortDamaged(v.Corrupt)
	return v, nil
}

// missing returns the blobs that are not there though an image needs them that is pinned, by
// more than a pull. Those that are corrupt, and may have been removed, are not among them.
func (s *State) missing(needs map[format.Digest][]format.Digest, corrupt []DamagedBlob) ([]DamagedBlob, error) {
	pins, err := s.pins.List()
	if err != nil {
		return nil, err
	}
	pinned := map[format.Digest]bool{}
	for _, p := range pins {
		if p.Held() || pinned[p.Image] {
			continue
		}
		// It may be unpinned and evicted while it is looked at, but not while it is held.
		release, err := s.pins.Hold(p.Image)
		if err != nil {
			return nil, err
		}
		defer release()
		now, err := s.pins.List()
		if err != nil {
			return nil, err
		}
		pinned[p.Image] = slices.ContainsFunc(now, func(q store.Pin) bool { return q.Image == p.Image && !q.Held() })
	}
	known := map[format.Digest]bool{}
	for _, c := range corrupt {
		known[c.Blob] = true
	}
	var list []DamagedBlob
	for d, users := range needs {
		users = slices.DeleteFunc(slices.Clone(users), func(im format.Digest) bool { return !pinned[im] })
		if _, err := s.store.Size(d); len(users) > 0 && !known[d] && errors.Is(err, store.ErrNotFound) {
			list = append(list, DamagedBlob{Blob: d, Images: users})
		}
	}
	sortDamaged(list)
	return list, nil
}

func sortDamaged(list []DamagedBlob) {
	slices.SortFunc(list, func(a, b DamagedBlob) int { return slices.Compare(a.Blob[:], b.Blob[:]) })
}

// Pin keeps an image from being evicted, whether a volume uses it or not, until Unpin. note is
// for people. It fails with store.ErrNotFound where the store does not have the image whole.
func (s *State) Pin(ctx context.Context, image format.Digest, note string) error {
	// Held until it is pinned, so that what is found to be whole stays so.
	release, err := s.pins.Hold(image)
	if err != nil {
		return err
	}
	defer release()
	_, images, err := s.Survey(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(images, func(im StoredImage) bool { return im.Image == image })
	switch im := images[i]; {
	case im.Err != nil && errors.Is(im.Err, store.ErrNotFound):
		return fmt.Errorf("pin image %v: it is not on this node; publish a volume of it first, csi-puzzlefs store ls shows what is there: %w", image, store.ErrNotFound)
	case im.Err != nil:
		return fmt.Errorf("pin image %v: %w", image, im.Err)
	case im.Missing > 0:
		return fmt.Errorf("pin image %v: %d of its %d blobs are not on this node; publish a volume of it first: %w", image, im.Missing, im.Blobs, store.ErrNotFound)
	}
	if err := s.pins.Pin(image, UserPin, note); err != nil {
		return err
	}
	return s.pins.Sync()
}

// Unpin undoes Pin. It fails with store.ErrNotFound where there is no such pin; those of mounts
// and pulls stay.
func (s *State) Unpin(image format.Digest) error {
	return s.pins.Unpin(image, UserPin)
}
