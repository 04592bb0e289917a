package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// maxSymlinks is how many symlinks one path may lead through, as in Linux.
const maxSymlinks = 40

// FS returns the image as an io/fs file system. It follows symlinks within the image, an
// absolute target beginning at the image's root. Names that are not valid UTF-8 are listed
// but cannot be opened, as io/fs demands. ctx bounds all reads through the result.
func (im *Image) FS(ctx context.Context) fs.FS { return imageFS{ctx, im} }

type imageFS struct {
	ctx context.Context
	im  *Image
}

var (
	_ fs.ReadDirFS  = imageFS{}
	_ fs.StatFS     = imageFS{}
	_ fs.ReadLinkFS = imageFS{}
)

// Open implements fs.FS.
func (f imageFS) Open(name string) (fs.File, error) {
	a, err := f.resolve("open", name, true)
	if err != nil {
		return nil, err
	}
	info := fileInfo{path.Base(name), a}
	if a.Kind != format.KindDir {
		return &file{fs: f, path: name, info: info}, nil
	}
	dir, err := f.im.OpenDir(a.Ino)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	return &dirFile{path: name, info: info, dir: dir}, nil
}

// ReadDir implements fs.ReadDirFS.
func (f imageFS) ReadDir(name string) ([]fs.DirEntry, error) {
	a, err := f.resolve("readdir", name, true)
	if err != nil {
		return nil, err
	}
	dir, err := f.im.OpenDir(a.Ino)
	if err != nil {
		return nil, pathError("readdir", name, err)
	}
	return (&dirFile{dir: dir}).ReadDir(-1)
}

// Stat implements fs.StatFS.
func (f imageFS) Stat(name string) (fs.FileInfo, error) {
	a, err := f.resolve("stat", name, true)
	return fileInfo{path.Base(name), a}, err
}

// Lstat implements fs.ReadLinkFS.
func (f imageFS) Lstat(name string) (fs.FileInfo, error) {
	a, err := f.resolve("lstat", name, false)
	return fileInfo{path.Base(name), a}, err
}

// ReadLink implements fs.ReadLinkFS.
func (f imageFS) ReadLink(name string) (string, error) {
	a, err := f.resolve("readlink", name, false)
	if err != nil {
		return "", err
	}
	target, err := f.im.Readlink(a.Ino)
	if err != nil {
		return "", pathError("readlink", name, err)
	}
	return target, nil
}

// resolve finds a path, following symlinks, the last component's if follow says so.
func (f imageFS) resolve(op, name string, follow bool) (Attr, error) {
	if !fs.ValidPath(name) {
		return Attr{}, pathError(op, name, fs.ErrInvalid)
	}
	a, err := f.walk(name, follow)
	if err != nil {
		return Attr{}, pathError(op, name, err)
	}
	return a, nil
}

func (f imageFS) walk(name string, follow bool) (Attr, error) {
	// parents is where ".." in a target leads: the directories from the root to the current.
	parents := []uint64{format.RootIno}
	a, err := f.im.Attr(format.RootIno)
	if err != nil {
		return Attr{}, err
	}
	rest := strings.Split(name, "/")
	for links := 0; len(rest) > 0; {
		next := rest[0]
		rest = rest[1:]
		switch next {
		case "", ".":
			continue
		case "..":
			parents = parents[:max(len(parents)-1, 1)]
			if a, err = f.im.Attr(parents[len(parents)-1]); err != nil {
				return Attr{}, err
			}
			continue
		}
		if a, err = f.im.Lookup(parents[len(parents)-1], next); err != nil {
			return Attr{}, err
		}
		switch {
		case a.Kind == format.KindSymlink && (len(rest) > 0 || follow):
			if links++; links > maxSymlinks {
				return Attr{}, fmt.Errorf("more than %d symlinks", maxSymlinks)
			}
			target, err := f.im.Readlink(a.Ino)
			if err != nil {
				return Attr{}, err
			}
			if strings.HasPrefix(target, "/") {
				parents = parents[:1]
			}
			rest = append(strings.Split(target, "/"), rest...)
			if a, err = f.im.Attr(parents[len(parents)-1]); err != nil {
				return Attr{}, err
			}
		case a.Kind == format.KindDir:
			parents = append(parents, a.Ino)
		case len(rest) > 0:
			return Attr{}, ErrNotDir
		}
	}
	return a, nil
}

// pathError makes the errors of this package recognisable to users of io/fs.
func pathError(op, name string, err error) error {
	if errors.Is(err, ErrNotExist) {
		err = fs.ErrNotExist
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// fileInfo implements fs.FileInfo and fs.DirEntry.
type fileInfo struct {
	name string
	attr Attr
}

var (
	_ fs.FileInfo = fileInfo{}
	_ fs.DirEntry = fileInfo{}
)

// Name implements fs.FileInfo.
func (i fileInfo) Name() string { return i.name }

// Size implements fs.FileInfo.
func (i fileInfo) Size() int64 { return int64(i.attr.Size) }

// Mode implements fs.FileInfo.
func (i fileInfo) Mode() fs.FileMode { return i.attr.Mode() }

// Type implements fs.DirEntry.
func (i fileInfo) Type() fs.FileMode { return i.attr.Mode().Type() }

// Info implements fs.DirEntry.
func (i fileInfo) Info() (fs.FileInfo, error) { return i, nil }

// ModTime implements fs.FileInfo: images store no times.
func (i fileInfo) ModTime() time.Time { return time.Unix(0, 0) }

// IsDir implements fs.FileInfo.
func (i fileInfo) IsDir() bool { return i.attr.Kind == format.KindDir }

// Sys implements fs.FileInfo: it returns the Attr.
func (i fileInfo) Sys() any { return i.attr }

// Mode returns type and permissions as io/fs has them.
func (a Attr) Mode() fs.FileMode {
	m := fs.FileMode(a.Perm & 0o777)
	if a.Perm&0o4000 != 0 {
		m |= fs.ModeSetuid
	}
	if a.Perm&0o2000 != 0 {
		m |= fs.ModeSetgid
	}
	if a.Perm&0o1000 != 0 {
		m |= fs.ModeSticky
	}
	switch a.Kind {
	case format.KindDir:
		m |= fs.ModeDir
	case format.KindSymlink:
		m |= fs.ModeSymlink
	case format.KindFifo:
		m |= fs.ModeNamedPipe
	case format.KindSocket:
		m |= fs.ModeSocket
	case format.KindChr:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case format.KindBlk:
		m |= fs.ModeDevice
	case format.KindFile:
	case format.KindUnknown, format.KindWhiteout:
		m |= fs.ModeIrregular
	}
	return m
}

// file is an open file that is no directory.
type file struct {
	fs     imageFS
	path   string
	info   fileInfo
	offset int64
	closed bool
}

var (
	_ io.ReaderAt = (*file)(nil)
	_ io.Seeker   = (*file)(nil)
)

// Stat implements fs.File.
func (f *file) Stat() (fs.FileInfo, error) { return f.info, nil }

// Close implements fs.File.
func (f *file) Close() error {
	if f.closed {
		return pathError("close", f.path, fs.ErrClosed)
	}
	f.closed = true
	return nil
}

// Read implements fs.File.
func (f *file) Read(p []byte) (int, error) {
	n, err := f.ReadAt(p, f.offset)
	f.offset += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// ReadAt implements io.ReaderAt.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if f.closed {
		return 0, pathError("read", f.path, fs.ErrClosed)
	}
	n, err := f.fs.im.ReadAt(f.fs.ctx, f.info.attr.Ino, p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		err = pathError("read", f.path, err)
	}
	return n, err
}

// Seek implements io.Seeker.
func (f *file) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += f.offset
	case io.SeekEnd:
		offset += f.info.Size()
	case io.SeekStart:
	default:
		return 0, pathError("seek", f.path, fs.ErrInvalid)
	}
	if offset < 0 {
		return 0, pathError("seek", f.path, fs.ErrInvalid)
	}
	f.offset = offset
	return offset, nil
}

// dirFile is an open directory.
type dirFile struct {
	path string
	info fileInfo
	dir  Dir
	next int
}

var _ fs.ReadDirFile = (*dirFile)(nil)

// Stat implements fs.File.
func (d *dirFile) Stat() (fs.FileInfo, error) { return d.info, nil }

// Close implements fs.File.
func (d *dirFile) Close() error { return nil }

// Read implements fs.File.
func (d *dirFile) Read([]byte) (int, error) { return 0, pathError("read", d.path, ErrIsDir) }

// ReadDir implements fs.ReadDirFile.
func (d *dirFile) ReadDir(n int) ([]fs.DirEntry, error) {
	left := d.dir.Len() - d.next
	if n > 0 && left == 0 {
		return nil, io.EOF
	}
	if n > 0 {
		left = min(left, n)
	}
	list := make([]fs.DirEntry, 0, left)
	for range left {
		name, a := d.dir.Entry(d.next)
		list = append(list, fileInfo{name, a})
		d.next++
	}
	return list, nil
}
