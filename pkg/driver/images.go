package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// imageRecord says that an image was once whole in the store, and who may see it.
type imageRecord struct {
	Version  int           `json:"version"`
	Manifest format.Digest `json:"manifest"`
	// Verity is the hex fs-verity digest of the manifest.
	Verity string `json:"verity"`
	// StoredBytes is the sum of the sizes of the image's blobs as they were stored. The
	// descriptors do not say: PuzzleFS 0.2.0 wrote sizes before compression there.
	StoredBytes int64 `json:"storedBytes"`
	// Repositories are those that gave the image to the node without a pod's secret. An
	// image without any is private: it needs a registry's consent for each publish.
	Repositories []string `json:"repositories"`
	// SignedBy are the fingerprints of the keys whose signature of the image was verified. What
	// they signed is its digest, so that it does not matter where the signature came from.
	SignedBy []string `json:"signedBy,omitempty"`
}

// images knows which images the store holds. It is safe for concurrent use.
type images struct {
	dir   string
	store *store.Store
	log   *slog.Logger
	// metrics counts what is read; corrupt is told of blobs that turn out to be corrupt when an
	// image reads them. It must not block.
	metrics *metrics
	corrupt func(manifest, blob format.Digest)
	// cache keeps what all images have decoded.
	cache *image.Cache
	// at is called at each step, see Config.Fault.
	at func(step string) error

	// saving is held while a record is written, which may wait for the disk. mu is not, so
	// that volumes of images that are here can be published meanwhile; it comes after saving.
	saving   sync.Mutex // guards the files in dir, but for their removal
	mu       sync.Mutex // guards what follows
	byDigest map[format.Digest]imageRecord
	// intact says when blobs had come or gone last when an image was found whole, see whole.
	intact map[format.Digest]time.Time
}

// openImages reads the records in dir. One that cannot be read is removed, or passed over if
// it cannot be removed either: it costs a question to the registry, no content.
func openImages(dir string, st *store.Store, d *Driver) (*images, error) {
	log := d.log
	im := &images{
		dir: dir, store: st, log: log, metrics: d.metrics, corrupt: d.corruptRead,
		cache: image.NewCache(d.cfg.ContentCache), at: d.at, byDigest: map[format.Digest]imageRecord{}, intact: map[format.Digest]time.Time{},
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read image records: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		r, err := readImageRecord(path)
		if err != nil {
			if !strings.HasPrefix(e.Name(), ".tmp-") {
				log.Warn("removing an image record that cannot be read; the registry is asked again", "file", path, "error", err)
			}
			if err := os.Remove(path); err != nil {
				log.Error("cannot remove an image record, passing it over", "file", path, "error", err)
			}
			continue
		}
		im.byDigest[r.Manifest] = r
	}
	return im, nil
}

// find returns the record of the image that spec pins, if it was ever whole here.
func (im *images) find(spec volumeSpec) (imageRecord, bool) {
	im.mu.Lock()
	defer im.mu.Unlock()
	v := ""
	if spec.verity != (verity.Digest{}) {
		v = spec.verity.String()
	}
	if !spec.ref.Digest.IsZero() {
		r, ok := im.byDigest[spec.ref.Digest]
		return r, ok && (v == "" || r.Verity == v)
	}
	for _, r := range im.byDigest {
		if v != "" && r.Verity == v {
			return r, true
		}
	}
	return imageRecord{}, false
}

// open opens the image with the given manifest from the store.
func (im *images) open(ctx context.Context, manifest format.Digest, limits image.Limits) (*image.Image, error) {
	size, err := im.store.Size(manifest)
	if err != nil {
		return nil, err
	}
	root := format.Descriptor{MediaType: format.MediaTypeManifest, Digest: manifest, Size: size}
	s := &source{Store: im.store, of: manifest, images: im}
	return image.Open(ctx, image.Config{
		Source: s, Early: s.GetEarly, Root: root, Limits: limits, Cache: im.cache,
	})
}

// source is the store as an image reads it: a blob that turns out to be corrupt is removed,
// so that the next publish of an image that needs it fetches it again. Until then its
// readers get an error.
type source struct {
	*store.Store
	of     format.Digest
	images *images
}

// Get is that of the store.
func (s *source) Get(ctx context.Context, d format.Digest, limit int64) ([]byte, error) {
	b, err := s.Store.Get(ctx, d, limit)
	s.images.metrics.readBytes.Add(float64(len(b)))
	return b, s.removeCorrupt(ctx, d, err)
}

// GetEarly is that of the store.
func (s *source) GetEarly(ctx context.Context, d format.VerityData, limit int64) ([]byte, func() error, error) {
	b, verify, err := s.Store.GetEarly(ctx, d, limit)
	if err != nil {
		return nil, nil, s.removeCorrupt(ctx, d.Digest, err)
	}
	s.images.metrics.readBytes.Add(float64(len(b)))
	return b, func() error { return s.removeCorrupt(ctx, d.Digest, verify()) }, nil
}

// ReadWhole is that of the store.
func (s *source) ReadWhole(ctx context.Context, reads []store.WholeRead) error {
	err := s.Store.ReadWhole(ctx, reads)
	for i := range reads {
		s.images.metrics.readBytes.Add(float64(reads[i].N))
	}
	if errors.Is(err, store.ErrDigestMismatch) {
		// It does not say of which.
		for i := range reads {
			err = s.removeCorrupt(ctx, reads[i].Blob.Digest, err)
		}
	}
	return err
}

// ReadBlobAt is that of the store.
func (s *source) ReadBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error) {
	n, err := s.Store.ReadBlobAt(ctx, d, p, off)
	s.images.metrics.readBytes.Add(float64(n))
	return n, s.removeCorrupt(ctx, d, err)
}

func (s *source) removeCorrupt(ctx context.Context, d format.Digest, err error) error {
	if !errors.Is(err, store.ErrDigestMismatch) {
		return err
	}
	// Removed rather than kept aside: what it should have held is at the registry and is
	// checked when it comes, what it does hold is of no use to anybody, and nothing would ever
	// collect the copies on a disk that fails and makes one after the other.
	corrupt, removeErr := s.RemoveCorrupt(ctx, d)
	if !corrupt {
		return err // somebody replaced or removed it meanwhile
	}
	s.images.corrupt(s.of, d)
	s.images.log.Error("a blob in the store was corrupt and is removed; publishing a volume of its image fetches it again", "image", s.of.String(), "blob", d.String(), "error", err)
	return errors.Join(err, removeErr)
}

// settled is how long ago blobs must have come or gone last for that to be told from what
// happens next, however coarse the file system's clock is.
const settled = 2 * time.Second

// whole reports whether the store still has all of an image that was whole once. It reads
// the manifest and asks for the size of every blob, unless that was done before and no blob came or went
// since; contents are verified when they are read. A corrupt manifest is removed, so that it is
// fetched again.
func (im *images) whole(ctx context.Context, manifest format.Digest) (bool, error) {
	r, ok := im.recorded(manifest)
	if !ok {
		return false, nil
	}
	// Asked first: what happens meanwhile must not pass for what was looked at.
	changed, err := im.store.BlobsChanged()
	if err != nil {
		return false, err
	}
	if im.wasWhole(manifest, changed) {
		return true, nil
	}
	n, err := im.storedBytes(ctx, manifest)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return false, nil
	case errors.Is(err, store.ErrDigestMismatch):
		im.metrics.verifyFailures.WithLabelValues(verifyRead).Inc()
		im.log.Warn("removing a corrupt manifest from the store", "image", manifest.String())
		if _, err := im.store.RemoveCorrupt(ctx, manifest); err != nil && !errors.Is(err, store.ErrNotFound) {
			return false, err
		}
		return false, nil
	case err != nil:
		return false, err
	}
	whole := n == r.StoredBytes
	if whole && time.Since(changed) > settled {
		im.remember(manifest, changed)
	}
	return whole, nil
}

// remember notes that the image was whole when blobs had come or gone last at changed.
func (im *images) remember(manifest format.Digest, changed time.Time) {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.intact[manifest] = changed
}

// wasWhole reports whether the image was found whole when the same blobs were there.
func (im *images) wasWhole(manifest format.Digest, changed time.Time) bool {
	im.mu.Lock()
	defer im.mu.Unlock()
	then, ok := im.intact[manifest]
	return ok && then.Equal(changed)
}

func (im *images) path(manifest format.Digest) string {
	return filepath.Join(im.dir, manifest.Hex()+".json")
}

// recorded returns the record of an image. One whose file is gone was evicted, maybe by another
// process: who could see the image is forgotten with it.
func (im *images) recorded(manifest format.Digest) (imageRecord, bool) {
	_, err := os.Lstat(im.path(manifest))
	im.mu.Lock()
	defer im.mu.Unlock()
	if errors.Is(err, fs.ErrNotExist) {
		delete(im.byDigest, manifest)
		delete(im.intact, manifest)
	}
	r, ok := im.byDigest[manifest]
	return r, ok
}

// forget drops the record of an image that is evicted. Nobody holds it, so nobody adds it.
func (im *images) forget(manifest format.Digest) error {
	if err := os.Remove(im.path(manifest)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove image record: %w", err)
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	delete(im.byDigest, manifest)
	delete(im.intact, manifest)
	return nil
}

// known returns the images that have records.
func (im *images) known() []format.Digest {
	im.mu.Lock()
	defer im.mu.Unlock()
	return slices.Collect(maps.Keys(im.byDigest))
}

// storedBytes sums up the sizes of the blobs of an image. The config blob does not count:
// nothing reads it.
func (im *images) storedBytes(ctx context.Context, manifest format.Digest) (int64, error) {
	b, err := im.store.Get(ctx, manifest, format.MaxManifestSize)
	if err != nil {
		return 0, err
	}
	m, err := format.ParseManifest(b)
	if err != nil {
		return 0, err
	}
	sum := int64(len(b))
	for _, blob := range m.Blobs() {
		if blob.Digest == m.Config.Digest {
			continue
		}
		size, err := im.store.Size(blob.Digest)
		if err != nil {
			return 0, fmt.Errorf("look for blob %v: %w", blob.Digest, err)
		}
		sum += size
	}
	return sum, nil
}

// add notes that the image is whole; if repository is not "", that this repository gave it to
// the node without a pod's secret; and if signer is not "", that this key signed it.
func (im *images) add(ctx context.Context, manifest format.Digest, v verity.Digest, repository, signer string) error {
	n, err := im.storedBytes(ctx, manifest)
	if err != nil {
		return fmt.Errorf("check what was pulled: %w", err)
	}
	im.saving.Lock()
	defer im.saving.Unlock()
	old, known := im.recorded(manifest)
	r := imageRecord{
		Version: recordVersion, Manifest: manifest, Verity: v.String(), StoredBytes: n,
		Repositories: slices.Clone(old.Repositories), SignedBy: slices.Clone(old.SignedBy),
	}
	if repository != "" && !slices.Contains(r.Repositories, repository) {
		r.Repositories = append(r.Repositories, repository)
	}
	if signer != "" && !slices.Contains(r.SignedBy, signer) {
		r.SignedBy = append(r.SignedBy, signer)
	}
	if known && old.StoredBytes == n && len(old.Repositories) == len(r.Repositories) && len(old.SignedBy) == len(r.SignedBy) {
		return nil
	}
	if err := im.tag(r); err != nil {
		return err
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode image record: %w", err)
	}
	if err := writeFile(im.path(manifest), b); err != nil {
		return fmt.Errorf("write image record: %w", err)
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	im.byDigest[manifest] = r
	return nil
}

// tag makes the image visible to other tools under its hex digest, which also makes its
// blobs durable before the record says that it is whole.
func (im *images) tag(r imageRecord) error {
	size, err := im.store.Size(r.Manifest)
	if err != nil {
		return fmt.Errorf("tag image: %w", err)
	}
	desc := format.Descriptor{MediaType: format.MediaTypeManifest, Digest: r.Manifest, Size: size}
	if err := im.store.Tag(r.Manifest.Hex(), desc); err != nil {
		return err
	}
	return im.at(stepPullTagged)
}

// hold keeps an image from being evicted until release is called.
func (d *Driver) hold(ctx context.Context, manifest format.Digest) (release func(), err error) {
	err = d.space.relieved(ctx, func() error {
		release, err = d.pins.Hold(manifest)
		return err
	})
	return release, err
}

// heldWhole holds an image if it is whole. Otherwise release is nil.
func (d *Driver) heldWhole(ctx context.Context, manifest format.Digest) (release func(), err error) {
	release, err = d.hold(ctx, manifest)
	if err != nil {
		return nil, err
	}
	whole, err := d.images.whole(ctx, manifest)
	if err != nil || !whole {
		release()
		return nil, err
	}
	return release, nil
}

// obtainAttempts is how often an image is fetched that is evicted again before it is held.
const obtainAttempts = 3

// obtain makes sure that the image of spec is whole in the store and that the pod may see
// it, and returns its manifest digest. The image is held until release is called. The rules:
//
//   - A pod with a secret is always shown to the registry, with that secret.
//   - A pod without one sees what its repository gave to the node before, without asking
//     again (unless it says Always). An image that came with a pod's secret is not among
//     those until the repository gives it to the node's own credentials, too.
//   - Never fetches nothing, and without a secret asks nobody.
//   - The policy is looked at first, and again at what came: allowed registries before anybody
//     is asked, signatures whenever the registry is asked, and otherwise what is known of them.
func (d *Driver) obtain(ctx context.Context, spec volumeSpec) (_ format.Digest, release func(), err error) {
	if err := d.cfg.Policy.allows(spec.ref); err != nil {
		return format.Digest{}, nil, err
	}
	repository := spec.repository()
	known, whole := d.images.find(spec)
	if whole {
		held, err := d.heldWhole(ctx, known.Manifest)
		if err != nil {
			return format.Digest{}, nil, err
		}
		if whole = held != nil; whole {
			if spec.creds == nil && spec.policy != pullAlways && slices.Contains(known.Repositories, repository) && d.cfg.Policy.signedBy(known.SignedBy) {
				if err := d.cfg.Policy.checkStored(spec.name(), known.StoredBytes); err != nil {
					held()
					return format.Digest{}, nil, err
				}
				return known.Manifest, held, nil
			}
			defer held()
		}
	}
	if spec.policy == pullNever && !whole {
		return format.Digest{}, nil, fmt.Errorf("find image %v: it is not whole on this node, and pullPolicy is Never; use IfNotPresent: %w", spec.name(), ErrNotFound)
	}
	if spec.policy == pullNever && spec.creds == nil && slices.Contains(known.Repositories, repository) {
		return format.Digest{}, nil, fmt.Errorf("find image %v: this node knows of no signature of it by %s, and pullPolicy is Never; use IfNotPresent: %w", spec.name(), d.cfg.Policy.anyKey(), ErrDenied)
	}
	if spec.policy == pullNever && spec.creds == nil {
		return format.Digest{}, nil, fmt.Errorf("find image %v: %s did not give it to this node without a secret yet, and pullPolicy is Never; name the secret in nodePublishSecretRef, or use IfNotPresent: %w", spec.name(), repository, ErrNotFound)
	}
	key := pullKey{what: spec.name(), identity: spec.identity, fetch: spec.policy != pullNever}
	for range obtainAttempts {
		manifest, err := d.pulls.do(ctx, key, func(ctx context.Context, report func(string)) (format.Digest, error) {
			return d.watchedFetch(ctx, spec, report)
		})
		if err != nil {
			return format.Digest{}, nil, err
		}
		if release, err = d.heldWhole(ctx, manifest); err != nil || release != nil {
			return manifest, release, err
		}
	}
	return format.Digest{}, nil, fmt.Errorf("obtain image %v: it was evicted %d times before it could be mounted; the store is too small for the images that are asked for at once, raise --store-quota: %w", spec.name(), obtainAttempts, ErrUnavailable)
}

// name is the reference with the digest that is wanted, for messages and as a key.
func (s volumeSpec) name() string {
	if s.verity != (verity.Digest{}) {
		return s.ref.String() + " (" + verityPrefix + s.verity.String() + ")"
	}
	return s.ref.String()
}

// repository is the place that gives or refuses the image.
func (s volumeSpec) repository() string { return s.ref.Registry + "/" + s.ref.Repository }

// fetch asks the registry for the image on behalf of spec, and pulls what is missing.
func (d *Driver) fetch(ctx context.Context, spec volumeSpec, report func(string)) (format.Digest, error) {
	client := d.client
	if spec.creds != nil {
		client = client.WithCredentials(registry.Keychain(spec.creds, d.cfg.Registry.Credentials))
	}
	desc, manifest, err := client.Resolve(ctx, spec.ref)
	if errors.Is(err, format.ErrTooLarge) {
		return format.Digest{}, tooLarge("%s (this node takes manifests of %s, see the driver's --metadata-memory)", err.Error(), humanBytes(d.cfg.Registry.MaxManifestBytes))
	}
	if err != nil {
		return format.Digest{}, err
	}
	sum := verity.Sum(manifest)
	if spec.verity != (verity.Digest{}) && sum != spec.verity {
		return format.Digest{}, fmt.Errorf("check image %v: the registry has %v with the fs-verity digest %v; correct the digest or the tag: %w", spec.name(), desc.Digest, sum, ErrMismatch)
	}
	if err := d.cfg.Policy.checkManifest(spec.name(), manifest); err != nil {
		return format.Digest{}, err
	}
	signer, err := d.cfg.Policy.checkSigned(ctx, client, spec.ref, desc.Digest)
	if err != nil {
		return format.Digest{}, err
	}
	what := fmt.Sprintf("%s@%v", spec.repository(), desc.Digest)
	pulling := "pulling " + what
	if spec.policy != pullNever {
		report(pulling + ": waiting for another volume's pull of it")
		end, err := d.turns.take(ctx, what)
		if err != nil {
			return format.Digest{}, err
		}
		defer end()
	}
	release, err := d.hold(ctx, desc.Digest)
	if err != nil {
		return format.Digest{}, err
	}
	defer release()
	whole, err := d.images.whole(ctx, desc.Digest)
	if err != nil {
		return format.Digest{}, err
	}
	if !whole {
		if spec.policy == pullNever {
			return format.Digest{}, fmt.Errorf("find image %v: it is not whole on this node, and pullPolicy is Never: %w", spec.name(), ErrNotFound)
		}
		ref := spec.ref
		ref.Digest = desc.Digest
		audienceOf(ctx).fetched.Store(true)
		d.log.InfoContext(ctx, "pulling an image", "image", what)
		if err := d.at(stepPullHeld); err != nil {
			return format.Digest{}, err
		}
		err := d.space.receive(ctx, what, manifest, func(dst registry.Destination) error {
			count := d.metrics.progress()
			_, err := client.Pull(ctx, ref, d.cfg.Policy.cap(spec.name(), dst), registry.PullOptions{
				Progress: func(p registry.Progress) { count(p); report(pulling + ": " + progressText(p)) },
			})
			return err
		})
		if err == nil {
			err = d.at(stepPullStored)
		}
		if err != nil {
			return format.Digest{}, err
		}
	}
	consent := ""
	if spec.creds == nil {
		consent = spec.repository()
	}
	if err := d.space.relieved(ctx, func() error { return d.images.add(ctx, desc.Digest, sum, consent, signer) }); err != nil {
		return format.Digest{}, err
	}
	// What the manifest says of sizes need not be so.
	r, _ := d.images.recorded(desc.Digest)
	return desc.Digest, d.cfg.Policy.checkStored(spec.name(), r.StoredBytes)
}

// progressText says how far a pull is: "37% of 4.1 GiB (120 of 800 blobs)".
func progressText(p registry.Progress) string {
	percent := int64(100)
	if p.TotalBytes > 0 {
		percent = int64(float64(p.DoneBytes) / float64(p.TotalBytes) * 100)
	}
	return fmt.Sprintf("%d%% of %s (%d of %d blobs)", percent, humanBytes(p.TotalBytes), p.DoneBlobs, p.TotalBlobs)
}
