package builder

import (
	"context"
	"errors"
	"io"
)

// ErrArchive says that an archive, or a layer of a container image, is not one that an image
// can be built from: damaged, cut off, of another format, or with names that lead out of it.
var ErrArchive = errors.New("unusable archive")

// ReadTar reads a tar archive, plain or compressed with gzip or zstd, which r yields to its end.
//
// Entries may come in any order, a later one replaces an earlier one of its name, and
// directories that have no entry belong to root with permissions 0755. Names begin at the
// root of the tree whether or not they begin with a slash. Owners are taken by number;
// extended attributes from the records that GNU tar, bsdtar and Go write; times are not kept.
//
// It fails with ErrArchive or format.ErrTooLarge, and the name of the entry, where the
// archive is damaged, cut off or has what no image can have; nothing is left behind then.
// ctx is checked between reads; r itself must return when ctx ends.
func ReadTar(ctx context.Context, r io.Reader, cfg ReadConfig) (*Tree, error) {
	return readTree(ctx, cfg, func(a *archive, root *node) error {
		l, err := newLayer(a.t, root, false)
		if err != nil {
			return err
		}
		if err := a.read(r, l, nil, true); err != nil {
			return err
		}
		return l.apply(ctx)
	})
}
