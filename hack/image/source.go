package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	program     = "csi-puzzlefs"
	mainPackage = "./cmd/csi-puzzlefs"
	versionFile = "cmd/csi-puzzlefs/VERSION"

	// epochVariable names the time, in seconds, that everything in an image bears.
	epochVariable = "SOURCE_DATE_EPOCH"
)

// source is the source tree that is made into images, and what is said about it.
type source struct {
	dir      string // absolute
	version  string // without a leading v
	revision string // "" if unknown
	created  time.Time
}

// openSource looks at the source tree dir. An empty version or revision is found out.
func openSource(ctx context.Context, dir, version, revision string) (*source, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	recorded, err := os.ReadFile(filepath.Join(dir, versionFile))
	if err != nil {
		return nil, fmt.Errorf("open source tree: %w; -source must name the directory of the module", err)
	}
	s := &source{dir: dir, version: strings.TrimPrefix(version, "v"), revision: revision}
	if s.version == "" {
		s.version = strings.TrimSpace(string(recorded))
	}
	_, err = os.Stat(filepath.Join(dir, ".git"))
	checkout := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if s.revision == "" && checkout {
		if s.revision, err = s.commit(ctx); err != nil {
			return nil, fmt.Errorf("find out the commit: %w; -revision can name it", err)
		}
	}
	epoch := os.Getenv(epochVariable)
	if epoch == "" && checkout {
		if epoch, err = s.git(ctx, "log", "-1", "--format=%ct"); err != nil {
			return nil, fmt.Errorf("find out the commit's time: %w; %s can name it", err, epochVariable)
		}
	}
	if s.created, err = parseEpoch(epoch); err != nil {
		return nil, err
	}
	return s, nil
}

// parseEpoch parses a time as the environment gives it. Without one it is 1970.
func parseEpoch(epoch string) (time.Time, error) {
	if epoch == "" {
		epoch = "0"
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil || seconds < 0 {
		return time.Time{}, fmt.Errorf("%s is %q: want seconds since 1970", epochVariable, epoch)
	}
	return time.Unix(seconds, 0).UTC(), nil
}

// commit returns the commit that is checked out, and whether it is what would be built.
func (s *source) commit(ctx context.Context) (string, error) {
	id, err := s.git(ctx, "rev-parse", "HEAD")
	if err != nil {
		return "", err
	}
	changed, err := s.git(ctx, "status", "--porcelain")
	if err != nil {
		return "", err
	}
	if changed != "" {
		id += "-dirty"
	}
	return id, nil
}

func (s *source) git(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", args...) //nolint:gosec // the arguments are ours
	cmd.Dir = s.dir
	out, err := output(cmd)
	return strings.TrimSpace(string(out)), err
}

// goTool runs the Go tool in the source tree for a platform. Settings of the environment that
// would change what is built have no effect; those that say where modules come from do.
func (s *source) goTool(ctx context.Context, p v1.Platform, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // the arguments are ours
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "GOOS="+p.OS, "GOARCH="+p.Architecture, "CGO_ENABLED=0",
		"GOAMD64=v1", "GOARM64=v8.0", "GOARM=7", "GO386=sse2", "GOMIPS=hardfloat", "GOMIPS64=hardfloat", "GOPPC64=power8",
		"GORISCV64=rva20u64", "GOFIPS140=off", "GOFLAGS=-mod=readonly", "GOWORK=off", "GOEXPERIMENT=")
	return output(cmd)
}

// build compiles the program for a platform and returns the name of the file, in dir.
func (s *source) build(ctx context.Context, p v1.Platform, dir string) (string, error) {
	// The program has its version from a file that is embedded; ours takes its place.
	version := filepath.Join(dir, "VERSION")
	if err := writeFile(version, []byte(s.version+"\n")); err != nil {
		return "", err
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(s.dir, versionFile): version}})
	if err != nil {
		return "", err
	}
	overlayFile := filepath.Join(dir, "overlay.json")
	if err := writeFile(overlayFile, overlay); err != nil {
		return "", err
	}
	bin := filepath.Join(dir, program)
	// Without what depends on the directory, the checkout and the build cache; without symbols
	// for debuggers, which would be half as much again.
	_, err = s.goTool(ctx, p, "build", "-trimpath", "-buildvcs=false", "-pgo=off", "-ldflags=-s -w -buildid=",
		"-overlay", overlayFile, "-o", bin, mainPackage)
	return bin, err
}

// output runs a command and returns what it prints; its complaints become part of the error.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", filepath.Base(cmd.Path), cmd.Args[1], err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}
