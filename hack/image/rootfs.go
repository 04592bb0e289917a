package main

import (
	"archive/tar"
	"cmp"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"
)

// file is a file, directory or symlink of the image.
type file struct {
	name     string // without a leading slash
	mode     int64  // permissions, set-id and sticky bits
	uid, gid int
	dir      bool
	target   string // of a symlink
	content  []byte
}

// The users that the image knows. Processes run as root unless the pod says otherwise, as Jobs that
// build images do.
const (
	users = `root:x:0:0:root:/:/sbin/nologin
nobody:x:65534:65534:nobody:/:/sbin/nologin
nonroot:x:65532:65532:nonroot:/:/sbin/nologin
`
	groups = `root:x:0:
nobody:x:65534:
nonroot:x:65532:
`
)

// rootfs returns the content of the image: the program, the licences, and what the program or
// those who run it expect to be there.
func rootfs(bin []byte, licenses []file) []file {
	return append([]file{
		{name: program, mode: 0o755, content: bin},
		{name: "etc/passwd", mode: 0o644, content: []byte(users)},
		{name: "etc/group", mode: 0o644, content: []byte(groups)},
		{name: "etc/csi-puzzlefs/certs.d", mode: 0o755, dir: true},
		{name: "etc/csi-puzzlefs/keys", mode: 0o755, dir: true},
		{name: "tmp", mode: 0o1777, dir: true},
		{name: "var/lib/csi-puzzlefs", mode: 0o755, dir: true},
	}, licenses...)
}

// sorted returns files with the directories above them, in the order of their names, in which a
// directory comes before what is in it.
func sorted(files []file) []file {
	all := make(map[string]file)
	for _, f := range files {
		all[f.name] = f
		for dir := path.Dir(f.name); dir != "."; dir = path.Dir(dir) {
			if _, ok := all[dir]; !ok {
				all[dir] = file{name: dir, mode: 0o755, dir: true}
			}
		}
	}
	return slices.SortedFunc(maps.Values(all), func(a, b file) int { return cmp.Compare(a.name, b.name) })
}

// writeTar writes files and the directories above them as a tar, all of one time. Equal files give
// equal bytes.
func writeTar(w io.Writer, files []file, mtime time.Time) error {
	tw := tar.NewWriter(w)
	for _, f := range sorted(files) {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: f.mode, Uid: f.uid, Gid: f.gid, Size: int64(len(f.content)), ModTime: mtime}
		switch {
		case f.dir:
			h.Typeflag, h.Name = tar.TypeDir, f.name+"/"
		case f.target != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.target
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("write %s: %w", f.name, err)
		}
		if _, err := tw.Write(f.content); err != nil {
			return fmt.Errorf("write %s: %w", f.name, err)
		}
	}
	return tw.Close()
}

// writeTree writes files and directories, no symlinks, into a directory, which is made if it does not exist. They belong to the
// user who runs this; times other than files' own are not set, as copying them sets new ones.
func writeTree(dir string, files []file, mtime time.Time) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, f := range sorted(files) {
		name := filepath.Join(dir, filepath.FromSlash(f.name))
		mode := fs.FileMode(f.mode & 0o777)
		if f.mode&0o1000 != 0 {
			mode |= fs.ModeSticky
		}
		var err error
		if f.dir {
			err = os.MkdirAll(name, mode.Perm())
		} else if err = os.WriteFile(name, f.content, mode.Perm()); err == nil {
			err = os.Chtimes(name, mtime, mtime)
		}
		if err == nil {
			err = os.Chmod(name, mode) // whatever the umask is
		}
		if err != nil {
			return err
		}
	}
	return nil
}
