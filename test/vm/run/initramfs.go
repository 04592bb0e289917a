package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// File types and modes of an archive's entries.
const (
	typeDir  = 0o040000
	typeFile = 0o100000
	typeLink = 0o120000
)

// initramfs writes the file system that the kernel begins with, as a cpio archive in its "newc"
// form (Linux, Documentation/driver-api/early-userspace/buffer-format.rst):
//
//	header   "070701" and 13 numbers of 8 hex digits
//	name     ended by NUL, then zeros up to a multiple of 4
//	content  then zeros up to a multiple of 4
//
// Names are absolute paths in the machine. The first entry of a name counts.
type initramfs struct {
	w     *bufio.Writer
	n     int64 // bytes written
	inode int
	seen  map[string]bool
}

func newInitramfs(w io.Writer) *initramfs {
	return &initramfs{w: bufio.NewWriterSize(w, 1<<20), seen: map[string]bool{"/": true}}
}

// close ends the archive.
func (a *initramfs) close() error {
	if err := a.entry("TRAILER!!!", 0, 0, strings.NewReader("")); err != nil {
		return err
	}
	return a.w.Flush()
}

// entry writes one entry with size bytes of content.
func (a *initramfs) entry(name string, mode uint32, size int64, content io.Reader) error {
	a.inode++
	// inode, mode, uid, gid, nlink, mtime, size, device, device of the node (2 each), length of the name, checksum
	fields := []any{a.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name) + 1, 0}
	n, err := fmt.Fprintf(a.w, "070701"+strings.Repeat("%08X", len(fields))+"%s\x00", append(fields, name)...)
	a.n += int64(n)
	if err = errors.Join(err, a.pad()); err != nil {
		return err
	}
	copied, err := io.CopyN(a.w, content, size)
	a.n += copied
	return errors.Join(err, a.pad())
}

// pad fills up to a multiple of 4 bytes.
func (a *initramfs) pad() error {
	for ; a.n%4 != 0; a.n++ {
		if err := a.w.WriteByte(0); err != nil {
			return err
		}
	}
	return nil
}

// first notes a name and reports whether it is new.
func (a *initramfs) first(name string) bool {
	if a.seen[name] {
		return false
	}
	a.seen[name] = true
	return true
}

// dir adds a directory and those above it.
func (a *initramfs) dir(name string) error {
	if !a.first(name) {
		return nil
	}
	if err := a.dir(path.Dir(name)); err != nil {
		return err
	}
	return a.entry(name[1:], typeDir|0o755, 0, strings.NewReader(""))
}

// file adds a file with that content.
func (a *initramfs) file(name string, perm fs.FileMode, size int64, content io.Reader) error {
	if err := a.dir(path.Dir(name)); err != nil {
		return err
	}
	if !a.first(name) {
		return nil
	}
	return a.entry(name[1:], typeFile|uint32(perm.Perm()), size, content)
}

// copy adds a file of the host, or a tree. A symlink inside a tree stays one.
func (a *initramfs) copy(from, to string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		name := path.Join(to, filepath.ToSlash(rel))
		switch {
		case d.IsDir():
			return a.dir(name)
		case d.Type().IsRegular():
			return a.copyFile(p, name)
		case d.Type() != fs.ModeSymlink:
			return fmt.Errorf("%s is no file, directory or symlink", p)
		}
		target, err := os.Readlink(p)
		if err != nil || !a.first(name) {
			return err
		}
		return a.entry(name[1:], typeLink|0o777, int64(len(target)), strings.NewReader(target))
	})
}

func (a *initramfs) copyFile(from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return a.file(to, st.Mode(), st.Size(), f)
}
