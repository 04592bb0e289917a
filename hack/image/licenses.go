package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// licenseDir is where the image holds the licences.
const licenseDir = "licenses"

// linkedPackage is what the Go tool tells about a package that is part of the program.
type linkedPackage struct {
	Dir      string
	Standard bool
	Module   *struct{ Path, Dir string }
}

// licenses returns the licences and notices of the program and of all that is linked into it, for
// their terms demand that they come with it: those beside each package and in the directories
// above it, up to its module's, and Go's own.
func (s *source) licenses(ctx context.Context, p v1.Platform) ([]file, error) {
	out, err := s.goTool(ctx, p, "list", "-deps", "-json=Dir,Standard,Module", mainPackage)
	if err != nil {
		return nil, err
	}
	goroot, err := s.goTool(ctx, p, "env", "GOROOT")
	if err != nil {
		return nil, err
	}
	found := make(map[string]string) // directory in the image -> directory on this machine
	modules := make(map[string]string)
	found[path.Join(licenseDir, "go")] = strings.TrimSpace(string(goroot))
	modules[path.Join(licenseDir, "go")] = "Go's standard library"
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var pkg linkedPackage
		if err := dec.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("parse go list's answer: %w", err)
		}
		if pkg.Standard {
			continue
		}
		top := path.Join(licenseDir, pkg.Module.Path)
		modules[top] = pkg.Module.Path
		for dir := pkg.Dir; ; dir = filepath.Dir(dir) {
			rel, err := filepath.Rel(pkg.Module.Dir, dir)
			if err != nil {
				return nil, err
			}
			found[path.Join(top, filepath.ToSlash(rel))] = dir
			if rel == "." {
				break
			}
		}
	}
	var files []file
	for inImage, dir := range found {
		here, err := licensesIn(dir, inImage)
		if err != nil {
			return nil, err
		}
		files = append(files, here...)
	}
	for top, module := range modules {
		if !slices.ContainsFunc(files, func(f file) bool { return strings.HasPrefix(f.name, top+"/") }) {
			return nil, fmt.Errorf("no licence found for %s: it cannot be given away with the program", module)
		}
	}
	return files, nil
}

// licensesIn returns the licences in one directory as files of the image.
func licensesIn(dir, inImage string) ([]file, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []file
	for _, e := range entries {
		if !e.Type().IsRegular() || !isLicense(e.Name()) {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		files = append(files, file{name: path.Join(inImage, e.Name()), mode: 0o644, content: content})
	}
	return files, nil
}

// isLicense says whether a file of this name holds a licence or a notice.
func isLicense(name string) bool {
	name = strings.ToUpper(name)
	if strings.HasSuffix(name, ".GO") {
		return false
	}
	for _, prefix := range []string{"LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "PATENTS"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}
