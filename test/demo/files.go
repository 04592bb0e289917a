package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/node"
)

// goSource returns the Go tool's own sources: a real tree that is there.
func goSource(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("find GOROOT: %w", err)
	}
	return filepath.EvalSymlinks(filepath.Join(strings.TrimSpace(string(out)), "src"))
}

// puzzlefs runs the program and returns what it prints.
func (d *demo) puzzlefs(args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(d.ctx, d.program, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("csi-puzzlefs %s: %w\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return stdout.String(), nil
}

// mounts returns the mount points below the demo's directory.
func (d *demo) mounts() ([]string, error) { return node.Mounts(d.dir) }

// measure counts the paths below dir and the bytes of its regular files.
func measure(dir string) (paths int, bytes int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		paths++
		if !e.Type().IsRegular() {
			return nil
		}
		info, err := e.Info()
		if err == nil {
			bytes += info.Size()
		}
		return err
	})
	return paths, bytes, err
}

// readTree reads every file below dir and prints how much that was.
func readTree(dir string) error {
	files, read := 0, int64(0)
	h := sha256.New()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		n, err := io.Copy(h, f)
		files, read = files+1, read+n
		return err
	})
	if err != nil {
		return err
	}
	if files == 0 {
		return errors.New("there are no files")
	}
	fmt.Printf("%d files, %s\n", files, mb(read))
	return nil
}

// largestChunk returns the file of the largest chunk in a store. The metadata blobs, which
// are read when the image is mounted, are JSON or begin with a Cap'n Proto segment table.
func largestChunk(layout string) (string, error) {
	names, err := filepath.Glob(filepath.Join(layout, "blobs", "sha256", "*"))
	if err != nil {
		return "", err
	}
	best := ""
	for _, name := range names {
		// A chunk has at most 256 KiB; manifest and rootfs of this tree have more.
		if n := size(name); n <= 256<<10 && n > size(best) {
			best = name
		}
	}
	if best == "" {
		return "", fmt.Errorf("no chunks in %s", layout)
	}
	return best, nil
}

// size returns a file's length, 0 if there is no such file.
func size(name string) int64 {
	info, err := os.Stat(name)
	if err != nil {
		return 0
	}
	return info.Size()
}

// flip changes one bit in the middle of a file.
func flip(name string) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	b[len(b)/2] ^= 1
	return os.WriteFile(name, b, 0o600)
}

func copyFile(from, to string, mode os.FileMode) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, mode)
}

func mb(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// short shortens a digest for a line of text.
func short(digest string) string { return digest[:min(len(digest), 19)] + "…" }
