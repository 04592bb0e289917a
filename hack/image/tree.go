package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// treeImage is an image that is to be made of a directory tree.
type treeImage struct {
	dir      string
	names    []name.Tag
	platform v1.Platform // what the programs in the tree are for
	created  time.Time   // of everything in the image
	config   v1.Config
}

// deliver makes the image, writes it to an archive and says under what names.
func (ti *treeImage) deliver(out string, stdout io.Writer) error {
	files, err := readTree(ti.dir)
	if err != nil {
		return fmt.Errorf("read the tree %s: %w", ti.dir, err)
	}
	if len(files) == 0 {
		return fmt.Errorf("read the tree %s: it is empty", ti.dir)
	}
	im, err := oneLayer(files, ti.platform, ti.created, "image -tree", ti.config)
	if err != nil {
		return fmt.Errorf("make an image of %s: %w", ti.dir, err)
	}
	digest, err := im.Digest()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	archived := mutate.IndexAddendum{Add: untyped{im}, Descriptor: v1.Descriptor{Platform: &ti.platform}}
	if err := writeArchive(out, archived, im, ti.names, ti.created); err != nil {
		return fmt.Errorf("write %s: %w", out, err)
	}
	return report(stdout, out, ti.names, digest)
}

// readTree reads what is below dir as files of an image. They keep their modes, without times and
// extended attributes; names that are links to one file become files of their own. What belongs to
// the user or group that runs this belongs to root's in the image, so that it is the same whoever
// makes it; other owners stay.
func readTree(dir string) ([]file, error) {
	if info, err := os.Stat(dir); err != nil {
		return nil, err
	} else if !info.IsDir() {
		return nil, fmt.Errorf("not a directory")
	}
	var files []file
	// The slash leads to the directory where dir is a symlink.
	root := filepath.Clean(dir) + "/"
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == root {
			return err
		}
		f, err := readFile(name, d)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		f.name = filepath.ToSlash(rel)
		files = append(files, f)
		return err
	})
	return files, err
}

// readFile reads one file, all but its name in the image.
func readFile(name string, d fs.DirEntry) (file, error) {
	info, err := d.Info()
	if err != nil {
		return file{}, err
	}
	//nolint:errcheck // what Lstat gives on Linux
	st := info.Sys().(*syscall.Stat_t)
	f := file{mode: int64(st.Mode & 0o7777), uid: int(st.Uid), gid: int(st.Gid)}
	if f.uid == os.Geteuid() {
		f.uid = 0
	}
	if f.gid == os.Getegid() {
		f.gid = 0
	}
	switch info.Mode().Type() {
	case 0:
		f.content, err = os.ReadFile(name)
	case fs.ModeDir:
		f.dir = true
	case fs.ModeSymlink:
		f.target, err = os.Readlink(name)
	default:
		err = fmt.Errorf("%s is a %s: want files, directories and symlinks; runtimes make devices and pipes themselves", name, kind(info.Mode()))
	}
	return f, err
}

// kind says in a word what is no file, directory or symlink.
func kind(mode fs.FileMode) string {
	switch {
	case mode&fs.ModeDevice != 0:
		return "device"
	case mode&fs.ModeNamedPipe != 0:
		return "named pipe"
	default:
		return "socket"
	}
}

// splitList splits a list at its commas. Nothing is no list.
func splitList(text string) []string {
	if text == "" {
		return nil
	}
	return strings.Split(text, ",")
}
