package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// corpusSize says how large a corpus is.
type corpusSize struct {
	bytes int64
	paths int
}

// makeCorpus copies real trees of the machine to dir: GOROOT, /usr/share, then the
// directories of /usr/lib, until there are enough bytes. Only directories and regular files
// are copied, because the reference's extract fails on symlinks that lead nowhere.
func makeCorpus(ctx context.Context, dir string, enough int64) (corpusSize, error) {
	var size corpusSize
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return size, fmt.Errorf("find GOROOT: %w", err)
	}
	sources := []string{strings.TrimSpace(string(out)), "/usr/share"}
	entries, err := os.ReadDir("/usr/lib")
	if err != nil {
		return size, err
	}
	for _, e := range entries {
		if e.IsDir() {
			sources = append(sources, filepath.Join("/usr/lib", e.Name()))
		}
	}
	for i, src := range sources {
		if size.bytes >= enough {
			break
		}
		to := filepath.Join(dir, fmt.Sprintf("%02d-%s", i, filepath.Base(src)))
		if err := copyTree(ctx, src, to, enough, &size); err != nil {
			return size, err
		}
	}
	return size, syncFS(dir)
}

// copyTree copies src until there are enough bytes.
func copyTree(ctx context.Context, src, to string, enough int64, size *corpusSize) error {
	return filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case size.bytes >= enough:
			return fs.SkipAll
		case d.IsDir():
			size.paths++
			return os.MkdirAll(target, 0o755)
		case !d.Type().IsRegular():
			return nil
		}
		n, err := copyFile(path, target)
		size.bytes += n
		size.paths++
		return err
	})
}

func copyFile(from, to string) (n int64, err error) {
	in, err := os.Open(from)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	return io.Copy(out, in)
}

// readAll reads every regular file below dir, one after another, in the order of a walk.
func readAll(ctx context.Context, dir string) error {
	buf := make([]byte, 1<<20)
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		if !d.Type().IsRegular() {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for {
			if _, err := f.Read(buf); err != nil {
				if errors.Is(err, io.EOF) {
					return nil
				}
				return err
			}
		}
	})
}

// syncFS waits until the file system of dir has written everything.
func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

// dropCaches empties the page, dentry and inode caches.
func dropCaches() error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("drop caches: %w", err)
	}
	return nil
}
