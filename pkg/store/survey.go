package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"golang.org/x/sys/unix"
)

// Survey says what a layout holds, at about one moment. Bytes are those that files take up on
// the disk; a blob counts once, however many images share it.
type Survey struct {
	// Blobs is the number of blobs and Bytes what they take up.
	Blobs int
	Bytes int64
	// PinnedBytes is what the blobs of pinned images take up.
	PinnedBytes int64
	// Orphans are the blobs that belong to no image.
	Orphans     int
	OrphanBytes int64
	// Images are in the order in which they are evicted, but for those that are pinned.
	Images []ImageUsage
}

// ImageUsage is what one image takes up.
type ImageUsage struct {
	// Image is the digest of the manifest.
	Image format.Digest
	// Tags are the names that the image has in the index.
	Tags []string
	// LastUse is when the image was put or touched last; the zero time if that is not known.
	LastUse time.Time
	// Blobs counts the image's blobs, manifest and config included, Missing those of them that
	// are not in the layout.
	Blobs, Missing int
	// Own is what the blobs take up that no other image has, Shared the others. In bytes.
	Own, Shared int64
	// Pins are the pins of the image; it is not evicted while it has one.
	Pins []Pin
	// Err is why its manifest cannot be read, or nil. Then Blobs is 0.
	Err error
}

// Survey reads the directory of the blobs and the manifests of all images: those that the
// index names, those that are pinned, and further ones that the caller knows. It takes no
// lock. For 100,000 blobs in the page cache it takes one to three seconds of one core, most of
// it to decode manifests, and some tens of megabytes for that time.
func (s *Store) Survey(ctx context.Context, pins *Pins, further []format.Digest) (*Survey, error) {
	v, err := s.survey(ctx, pins, further)
	if err != nil {
		return nil, fmt.Errorf("survey layout %s: %w", s.dir, explain(err))
	}
	return v.report(), nil
}

// Needs returns the images that need each blob, there or not; images are those of Survey.
func (s *Store) Needs(ctx context.Context, pins *Pins, further []format.Digest) (map[format.Digest][]format.Digest, error) {
	v, err := s.survey(ctx, pins, further)
	if err != nil {
		return nil, fmt.Errorf("survey layout %s: %w", s.dir, explain(err))
	}
	needs := map[format.Digest][]format.Digest{}
	for _, d := range v.order() {
		for _, b := range v.images[d].blobs {
			needs[b] = append(needs[b], d)
		}
	}
	return needs, nil
}

// Usage returns how many blobs there are and how many bytes of disk they take up, without
// looking into any. For 100,000 blobs in the page cache it takes about half a second.
func (s *Store) Usage(ctx context.Context) (blobs int, bytes int64, err error) {
	if err := s.begin(); err != nil {
		return 0, 0, fmt.Errorf("survey layout %s: %w", s.dir, err)
	}
	defer s.end()
	err = s.eachBlob(ctx, func(_ format.Digest, f blobFile) { blobs++; bytes += f.bytes })
	if err != nil {
		return 0, 0, fmt.Errorf("survey layout %s: %w", s.dir, explain(err))
	}
	return blobs, bytes, nil
}

// Free returns how many bytes of the layout's file system an ordinary user could still take
// up, and how many it has.
func (s *Store) Free() (free, total int64, err error) {
	err = s.begin()
	if err == nil {
		defer s.end()
		var st unix.Statfs_t
		err = retry(func() error { return unix.Fstatfs(s.blobs, &st) })
		free, total = int64(st.Bavail)*st.Bsize, int64(st.Blocks)*st.Bsize
	}
	if err != nil {
		return 0, 0, fmt.Errorf("look for free space in layout %s: %w", s.dir, err)
	}
	return free, total, nil
}

// Touch notes that an image is used now, in the modification time of its manifest's file:
// that survives restarts, costs no write of its own, and goes with the image. It fails with
// ErrNotFound.
func (s *Store) Touch(manifest format.Digest) error {
	err := s.beginWrite()
	if err == nil {
		defer s.end()
		// The kernel's own idea of now has a resolution of milliseconds, in which several images are used.
		times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(time.Now().UnixNano())}
		err = retry(func() error { return unix.UtimesNanoAt(s.blobs, manifest.Hex(), times, unix.AT_SYMLINK_NOFOLLOW) })
	}
	if err != nil {
		return fmt.Errorf("note the use of an image: %w", s.readError(manifest, err))
	}
	return nil
}

// BlobsChanged returns when a blob was last added to the layout or removed from it, by whatever
// process. As long as it says the same, what was there is there, unless it changed within the
// resolution of the file system's clock, some milliseconds, before it was asked.
func (s *Store) BlobsChanged() (time.Time, error) {
	err := s.begin()
	var st unix.Stat_t
	if err == nil {
		defer s.end()
		err = retry(func() error { return unix.Fstat(s.blobs, &st) })
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("look at the blobs of layout %s: %w", s.dir, err)
	}
	return time.Unix(st.Mtim.Unix()), nil
}

// blobFile is what the directory says of a blob.
type blobFile struct {
	bytes int64 // on the disk
	mtime time.Time
}

// eachBlob calls fn for each regular file with the name of a blob.
func (s *Store) eachBlob(ctx context.Context, fn func(format.Digest, blobFile)) error {
	dir, err := openDirAgain(s.blobs, s.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		const batch = 1024
		names, err := dir.Readdirnames(batch)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		for _, name := range names {
			d, err := format.ParseHex(name)
			if err != nil {
				continue
			}
			var st unix.Stat_t
			err = retry(func() error { return unix.Fstatat(s.blobs, name, &st, unix.AT_SYMLINK_NOFOLLOW) })
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			if err != nil {
				return err
			}
			if st.Mode&unix.S_IFMT == unix.S_IFREG {
				const statBlock = 512
				fn(d, blobFile{bytes: st.Blocks * statBlock, mtime: time.Unix(st.Mtim.Unix())})
			}
		}
	}
}

// surveyed is a survey in the form in which it is worked with.
type surveyed struct {
	blobs  map[format.Digest]blobFile
	images map[format.Digest]*surveyedImage
	// refs says how many images have a blob. What is in blobs but not here is an orphan.
	refs map[format.Digest]int
}

type surveyedImage struct {
	tags  []string
	pins  []Pin
	blobs []format.Digest // each once, with the manifest
	err   error           // of reading the manifest
}

// pinned says whether the image must stay.
func (i *surveyedImage) pinned() bool { return len(i.pins) > 0 }

// unknown returns why nothing may be removed, where i is pinned and what it refers to cannot be
// told. A hold without a manifest is that of a pull which has not begun.
func (i *surveyedImage) unknown() error {
	settled := slices.ContainsFunc(i.pins, func(p Pin) bool { return !p.Held() })
	if i.err == nil || !i.pinned() || !settled && errors.Is(i.err, ErrNotFound) {
		return nil
	}
	return i.err
}

func (s *Store) survey(ctx context.Context, pins *Pins, further []format.Digest) (*surveyed, error) {
	if err := s.begin(); err != nil {
		return nil, err
	}
	defer s.end()
	v := &surveyed{
		blobs:  map[format.Digest]blobFile{},
		images: map[format.Digest]*surveyedImage{},
		refs:   map[format.Digest]int{},
	}
	if err := s.eachBlob(ctx, func(d format.Digest, f blobFile) { v.blobs[d] = f }); err != nil {
		return nil, err
	}
	list, err := pins.List()
	if err != nil {
		return nil, err
	}
	x, err := s.readIndex()
	if err != nil {
		return nil, err
	}
	for _, e := range x.entries {
		if e.foreign == nil {
			im := v.image(e.desc.Digest)
			if e.tag != "" {
				im.tags = append(im.tags, e.tag)
			}
		}
	}
	for _, pin := range list {
		im := v.image(pin.Image)
		im.pins = append(im.pins, pin)
	}
	for _, d := range further {
		v.image(d)
	}
	for d, im := range v.images {
		im.blobs, im.err = s.referred(ctx, d)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		for _, b := range im.blobs {
			v.refs[b]++
		}
	}
	return v, nil
}

func (v *surveyed) image(d format.Digest) *surveyedImage {
	im := v.images[d]
	if im == nil {
		im = &surveyedImage{}
		v.images[d] = im
	}
	return im
}

// referred returns the blobs that an image needs, its manifest first. If that cannot be read
// it is the only one.
func (s *Store) referred(ctx context.Context, manifest format.Digest) ([]format.Digest, error) {
	blobs := []format.Digest{manifest}
	b, err := s.Get(ctx, manifest, format.MaxManifestSize)
	if err != nil {
		return blobs, err
	}
	m, err := format.ParseManifest(b)
	if err != nil {
		return blobs, fmt.Errorf("read image %s: %w", manifest, err)
	}
	for _, d := range m.Blobs() {
		if d.Digest != manifest {
			blobs = append(blobs, d.Digest)
		}
	}
	return blobs, nil
}

// order returns the images in the order of eviction: what cannot be read is of no use to
// anybody and goes first, then what was not used for the longest time.
func (v *surveyed) order() []format.Digest {
	list := make([]format.Digest, 0, len(v.images))
	for d := range v.images {
		list = append(list, d)
	}
	broken := func(d format.Digest) int {
		if v.images[d].err != nil {
			return 0
		}
		return 1
	}
	slices.SortFunc(list, func(a, b format.Digest) int {
		return cmp.Or(cmp.Compare(broken(a), broken(b)), v.blobs[a].mtime.Compare(v.blobs[b].mtime), slices.Compare(a[:], b[:]))
	})
	return list
}

// pinnedBlobs returns the blobs of pinned images.
func (v *surveyed) pinnedBlobs() map[format.Digest]bool {
	pinned := map[format.Digest]bool{}
	for _, im := range v.images {
		if im.pinned() {
			for _, b := range im.blobs {
				pinned[b] = true
			}
		}
	}
	return pinned
}

// bytes returns what all blobs take up, and those of pinned images.
func (v *surveyed) bytes() (all, pinned int64) {
	keep := v.pinnedBlobs()
	for d, f := range v.blobs {
		all += f.bytes
		if keep[d] {
			pinned += f.bytes
		}
	}
	return all, pinned
}

func (v *surveyed) report() *Survey {
	r := &Survey{Blobs: len(v.blobs)}
	r.Bytes, r.PinnedBytes = v.bytes()
	for d, f := range v.blobs {
		if v.refs[d] == 0 {
			r.Orphans++
			r.OrphanBytes += f.bytes
		}
	}
	for _, d := range v.order() {
		im := v.images[d]
		u := ImageUsage{Image: d, Tags: im.tags, LastUse: v.blobs[d].mtime, Pins: im.pins, Err: im.err}
		for _, b := range im.blobs {
			f, there := v.blobs[b]
			if v.refs[b] > 1 {
				u.Shared += f.bytes
			} else {
				u.Own += f.bytes
			}
			if im.err != nil {
				continue
			}
			u.Blobs++
			if !there {
				u.Missing++
			}
		}
		r.Images = append(r.Images, u)
	}
	return r
}
