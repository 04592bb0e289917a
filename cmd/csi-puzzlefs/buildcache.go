package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

// recordsKept is how long the record of a build is kept that no later one replaces.
const recordsKept = 30 * 24 * time.Hour

// noCache is the value of --cache for a build that remembers nothing.
const noCache = "none"

// recordPath returns the file in which the build finds and leaves what it knows of the source; "" for none.
func (p *buildPlan) recordPath(flag string) (string, error) {
	switch {
	case p.source.dir == "" || flag == noCache:
		return "", nil
	case flag != "":
		return flag, nil
	case p.layout == "":
		return "", nil // its blobs do not stay
	}
	// What nobody asked for is nobody's worry where it cannot be had.
	user, err := os.UserCacheDir()
	if err != nil {
		slog.Debug("remembering nothing of the build", "error", err)
		return "", nil
	}
	dir := filepath.Join(user, "csi-puzzlefs", "build")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		slog.Debug("remembering nothing of the build", "error", err)
		return "", nil
	}
	pruneRecords(dir)
	source, err := filepath.Abs(p.source.dir)
	if err != nil {
		return "", err
	}
	layout, err := filepath.Abs(p.layout)
	if err != nil {
		return "", err
	}
	// Builds of one tree in different ways have a record each.
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %s %t %s %q", source, layout, p.cfg.Chunker, p.cfg.Compress, p.cfg.Level, p.cfg.Minimal.Exclude))
	return filepath.Join(dir, hex.EncodeToString(sum[:16])+".record"), nil
}

// pruneRecords removes the records that have not been replaced for long.
func pruneRecords(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		slog.Debug("looking for old records of builds", "error", err)
		return
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || time.Since(info.ModTime()) < recordsKept {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			slog.Debug("removing an old record of a build", "error", err)
		}
	}
}
