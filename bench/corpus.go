package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// tree is a directory to be measured with.
type tree struct {
	name, dir string
	corpusSize
}

// corpusSize says how large a tree is.
type corpusSize struct {
	bytes int64
	paths int
}

// Files of the tree of large files.
const (
	randomFile = "incompressible"
	textFile   = "text"
)

// makeTrees makes the trees in dir: one like that of a root file system with enough bytes, GOROOT, and files of large
// bytes each, and many small files.
func makeTrees(ctx context.Context, dir string, enough, large int64) ([]tree, error) {
	goroot, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("find GOROOT: %w", err)
	}
	root := tree{name: "root file system", dir: filepath.Join(dir, "root")}
	if root.corpusSize, err = makeCorpus(ctx, root.dir, strings.TrimSpace(string(goroot)), enough); err != nil {
		return nil, err
	}
	src := tree{name: "GOROOT", dir: filepath.Join(dir, "goroot")}
	if err := copyTree(ctx, strings.TrimSpace(string(goroot)), src.dir, math.MaxInt64, &src.corpusSize); err != nil {
		return nil, err
	}
	files := tree{name: "large files", dir: filepath.Join(dir, "large"), corpusSize: corpusSize{2 * large, 3}}
	if err := os.Mkdir(files.dir, 0o755); err != nil {
		return nil, err
	}
	if err := writeFile(filepath.Join(files.dir, randomFile), rand.NewChaCha8([32]byte{1}), large); err != nil {
		return nil, err
	}
	if err := writeFile(filepath.Join(files.dir, textFile), &words{rng: rand.New(rand.NewPCG(1, 2))}, large); err != nil {
		return nil, err
	}
	many := tree{name: fmt.Sprintf("%d small files", smallFiles), dir: filepath.Join(dir, "many")}
	if many.corpusSize, err = writeSmallFiles(many.dir); err != nil {
		return nil, err
	}
	return []tree{root, src, files, many}, syncFS(dir)
}

// smallFiles is how many files the tree of small files has.
const smallFiles = 50_000

// writeSmallFiles writes files of up to 2 KiB, a hundred to a directory.
func writeSmallFiles(dir string) (corpusSize, error) {
	size := corpusSize{paths: 1}
	rng := rand.New(rand.NewPCG(3, 4))
	text := &words{rng: rng}
	for i := range smallFiles {
		sub := filepath.Join(dir, fmt.Sprintf("%03d", i/100))
		if i%100 == 0 {
			if err := os.MkdirAll(sub, 0o755); err != nil {
				return size, err
			}
			size.paths++
		}
		n := rng.Int64N(2 << 10)
		if err := writeFile(filepath.Join(sub, fmt.Sprintf("%05d.txt", i)), text, n); err != nil {
			return size, err
		}
		size.bytes += n
		size.paths++
	}
	return size, nil
}

// writeFile writes so many bytes from r.
func writeFile(path string, r io.Reader, size int64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = io.CopyN(f, r, size)
	return err
}

// words are lines of text that zstd makes about a third of, as of a log or of source code.
type words struct{ rng *rand.Rand }

// Read implements io.Reader.
func (w *words) Read(p []byte) (int, error) {
	b := p[:0]
	for len(b) < len(p) {
		// Some words are much more frequent than others, and most lines end soon.
		n := uint64(1) << w.rng.IntN(16)
		b = append(strconv.AppendUint(append(b, "word"...), w.rng.Uint64N(n)*2654435761%(1<<32), 36), ' ')
		if w.rng.IntN(9) == 0 {
			b = append(b, '\n')
		}
	}
	return copy(p, b), nil
}

// makeCorpus copies real trees of the machine to dir: GOROOT, /usr/share, then the
// directories of /usr/lib, until there are enough bytes. Only directories and regular files
// are copied, because the reference's extract fails on symlinks that lead nowhere.
func makeCorpus(ctx context.Context, dir, goroot string, enough int64) (corpusSize, error) {
	var size corpusSize
	sources := []string{goroot, "/usr/share"}
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
	return size, nil
}

// change says which files of a tree grow: in the order of a walk one file of each so many, until it was one of
// so many of all.
type change struct {
	name       string
	every, all int // zero for none
}

// grow adds a byte to files of a tree of so many paths, and returns what takes it away again.
func grow(dir string, which change, paths int) (restore func() error, err error) {
	sizes := make(map[string]int64)
	restore = func() error {
		var errs []error
		for path, size := range sizes {
			errs = append(errs, os.Truncate(path, size))
		}
		return errors.Join(errs...)
	}
	if which.all == 0 {
		return restore, nil
	}
	n := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if len(sizes) == paths/which.all {
			return fs.SkipAll
		}
		if n++; n%which.every != 0 {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		sizes[path] = info.Size()
		return os.Truncate(path, info.Size()+1)
	})
	if err != nil {
		return nil, errors.Join(err, restore())
	}
	return restore, nil
}

// someFile returns the path of a file in dir, relative to it.
func someFile(dir string) (string, error) {
	var found string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if found, err = filepath.Rel(dir, path); err != nil {
			return err
		}
		return fs.SkipAll
	})
	return found, err
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

// readAll reads every regular file below dir, or dir itself, one after another, in the order of a walk.
func readAll(ctx context.Context, dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		if !d.Type().IsRegular() {
			return nil
		}
		_, err = readFile(ctx, path)
		return err
	})
}

// readFile reads a file from its beginning to its end, or until ctx is done.
func readFile(ctx context.Context, path string) (n int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for buf := make([]byte, 256<<10); ; {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		k, err := f.Read(buf)
		n += int64(k)
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
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
