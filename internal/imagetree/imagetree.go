// Package imagetree describes an opened image as package testtree describes a directory, so
// that tests can compare the two. Every byte of every file is read.
package imagetree

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// typeOf maps the kinds that an image can show.
func typeOf(k format.Kind) (testtree.Type, error) {
	switch k {
	case format.KindDir:
		return testtree.Dir, nil
	case format.KindFile:
		return testtree.File, nil
	case format.KindSymlink:
		return testtree.Symlink, nil
	case format.KindFifo:
		return testtree.Fifo, nil
	case format.KindSocket:
		return testtree.Socket, nil
	case format.KindChr:
		return testtree.Char, nil
	case format.KindBlk:
		return testtree.Block, nil
	case format.KindUnknown, format.KindWhiteout:
	}
	return "", fmt.Errorf("an image must not show a %s", k)
}

// FromImage returns one entry a path, sorted as testtree.FromDir sorts them.
func FromImage(ctx context.Context, im *image.Image) ([]testtree.Entry, error) {
	var entries []testtree.Entry
	err := im.Walk(func(path string, a image.Attr) error {
		if path == "." {
			path = ""
		}
		e, err := describe(ctx, im, "/"+path, a)
		entries = append(entries, e)
		return err
	})
	testtree.Sort(entries)
	return entries, err
}

func describe(ctx context.Context, im *image.Image, path string, a image.Attr) (e testtree.Entry, err error) {
	e = testtree.Entry{Path: path, Perm: a.Perm, UID: a.UID, GID: a.GID, Major: a.Major, Minor: a.Minor}
	if e.Type, err = typeOf(a.Kind); err != nil {
		return e, fmt.Errorf("%s: %w", path, err)
	}
	xattrs, err := im.Xattrs(a.Ino)
	if err != nil {
		return e, err
	}
	for _, x := range xattrs {
		e.Xattrs = append(e.Xattrs, testtree.Xattr{Key: string(x.Key), Value: x.Val})
	}
	switch a.Kind {
	case format.KindSymlink:
		e.Target, err = im.Readlink(a.Ino)
	case format.KindFile:
		e.Size, e.Nlink = int64(a.Size), uint64(a.Nlink)
		e.SHA256, err = hash(ctx, im, a)
	default:
	}
	return e, err
}

// hash reads a file to its end, in pieces that end nowhere in particular.
func hash(ctx context.Context, im *image.Image, a image.Attr) (string, error) {
	h := sha256.New()
	buf := make([]byte, 100_003)
	for off := int64(0); ; {
		n, err := im.ReadAt(ctx, a.Ino, buf, off)
		h.Write(buf[:n])
		off += int64(n)
		if errors.Is(err, io.EOF) {
			if uint64(off) != a.Size {
				return "", fmt.Errorf("inode %d ends at %d, its size is %d", a.Ino, off, a.Size)
			}
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
	}
}
