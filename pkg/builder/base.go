package builder

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// baseTree is the image that a delta is built on, seen with its whiteouts: a builder must
// list again what the base had deleted already. The zero baseTree is that of no base.
type baseTree struct {
	layers []format.InodeVector
	verity []format.VerityData
	chunks []format.Descriptor // of the manifest
	// minimal is the manifest's annotation AnnotationMinimal.
	minimal string
	maxIno  uint64
}

// baseOf reads the image that a delta is to be built on, if there is one.
func baseOf(ctx context.Context, cfg *Config) (*baseTree, error) {
	if !cfg.BaseManifest.IsZero() {
		return readBase(ctx, cfg.Store, cfg.BaseManifest, cfg.BaseManifest.String())
	}
	if cfg.Base == "" {
		return new(baseTree), nil
	}
	desc, err := cfg.Store.Resolve(cfg.Base)
	if err != nil {
		return nil, err
	}
	if desc.MediaType == format.MediaTypeRootfs {
		return nil, fmt.Errorf("%s: %w", cfg.Base, ErrOldVersion)
	}
	return readBase(ctx, cfg.Store, desc.Digest, cfg.Base)
}

// readBase reads the image of a manifest. tag is what to call it.
func readBase(ctx context.Context, s Store, manifest format.Digest, tag string) (*baseTree, error) {
	b, err := s.Get(ctx, manifest, format.MaxManifestSize)
	if err != nil {
		return nil, err
	}
	m, err := format.ParseManifest(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", tag, err)
	}
	desc, err := m.Rootfs()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", tag, err)
	}
	if b, err = s.Get(ctx, desc.Digest, format.MaxRootfsSize); err != nil {
		return nil, err
	}
	r, err := format.DecodeRootfs(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", tag, err)
	}
	if r.Version != format.Version3 {
		return nil, fmt.Errorf("%s has version %d: %w", tag, r.Version, ErrOldVersion)
	}
	base := &baseTree{layers: r.Layers, verity: r.Verity, minimal: m.Annotations[AnnotationMinimal]}
	for _, l := range m.Layers {
		if l.MediaType != format.MediaTypeRootfs {
			base.chunks = append(base.chunks, l)
		}
	}
	for _, l := range r.Layers {
		if len(l) > 0 {
			base.maxIno = max(base.maxIno, l[len(l)-1].Ino)
		}
	}
	return base, nil
}

// nextIno returns the first number for an inode that the base does not have.
func (b *baseTree) nextIno() uint64 {
	return max(b.maxIno, format.RootIno) + 1
}

// find returns the inode of a number, of the topmost layer that has it; nil where there
// is none, or a whiteout.
func (b *baseTree) find(ino uint64) *format.Inode {
	for _, l := range b.layers {
		if i := l.Find(ino); i != nil {
			if i.Kind == format.KindWhiteout {
				return nil
			}
			return i
		}
	}
	return nil
}

// entries returns what a directory lists, as the base has it: with the names of whiteouts,
// and with what lower layers list where it says to look there. A number of no directory has none.
func (b *baseTree) entries(ino uint64) []format.DirEntry {
	if ino == 0 {
		return nil
	}
	var list []format.DirEntry
	var seen map[string]bool
	for _, l := range b.layers {
		i := l.Find(ino)
		if i == nil {
			continue
		}
		if i.Kind != format.KindDir {
			break
		}
		if list == nil && !i.LookBelow {
			return i.Entries
		}
		if seen == nil {
			seen = make(map[string]bool)
		}
		for _, e := range i.Entries {
			if !seen[string(e.Name)] {
				seen[string(e.Name)] = true
				list = append(list, e)
			}
		}
		if !i.LookBelow {
			break
		}
	}
	return list
}

// live returns the numbers of what is in a directory, without whiteouts, by name.
func (b *baseTree) live(dir uint64) (map[string]uint64, error) {
	entries := b.entries(dir)
	live := make(map[string]uint64, len(entries))
	for _, e := range entries {
		if _, twice := live[string(e.Name)]; twice {
			return nil, fmt.Errorf("the base image's directory %d has two entries named %s: %w", dir, quote(string(e.Name)), format.ErrCorrupt)
		}
		live[string(e.Name)] = 0
		if b.find(e.Ino) != nil {
			live[string(e.Name)] = e.Ino
		}
	}
	return live, nil
}

// baseDir is a directory of the base. The zero baseDir is one that the base does not have.
type baseDir struct {
	entries []format.DirEntry
	byName  map[string]uint64
}

// dir returns the directory of number ino as the base lists it.
func (b *baseTree) dir(ino uint64) baseDir {
	if ino == 0 || len(b.layers) == 0 {
		return baseDir{}
	}
	i := b.find(ino)
	if i == nil || i.Kind != format.KindDir {
		return baseDir{}
	}
	d := baseDir{entries: i.Entries, byName: make(map[string]uint64, len(i.Entries))}
	for _, e := range i.Entries {
		d.byName[string(e.Name)] = e.Ino
	}
	return d
}

// isLayer reports whether the layer of a base and a new one are encoded alike.
func isLayer(old format.InodeVector, layer format.Pieces) bool {
	if len(old) != layer.Len() {
		return false
	}
	for i, inode := range layer.All() {
		if !equalInodes(&old[i], inode) {
			return false
		}
	}
	return true
}

// equalInodes reports whether two inodes are encoded alike.
func equalInodes(a, b *format.Inode) bool {
	return a.Ino == b.Ino && a.Kind == b.Kind && a.Perm == b.Perm && a.UID == b.UID && a.GID == b.GID &&
		a.LookBelow == b.LookBelow && a.Major == b.Major && a.Minor == b.Minor &&
		(a.Symlink == nil) == (b.Symlink == nil) && bytes.Equal(a.Symlink, b.Symlink) &&
		slices.Equal(a.Chunks, b.Chunks) &&
		slices.EqualFunc(a.Entries, b.Entries, func(x, y format.DirEntry) bool {
			return x.Ino == y.Ino && bytes.Equal(x.Name, y.Name)
		}) &&
		slices.EqualFunc(a.Xattrs, b.Xattrs, func(x, y format.Xattr) bool {
			return bytes.Equal(x.Key, y.Key) && bytes.Equal(x.Val, y.Val)
		})
}
