package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// writeArchive writes an OCI archive, replacing what was there:
//
//	oci-layout
//	index.json         an entry for each name, with it: what is archived, an image or an index of them
//	manifest.json      for docker load, which knows one platform: that of single
//	blobs/sha256/...   index, manifests, configs, layers, bills of materials
//
// Readers of OCI layouts ignore manifest.json, and readers of manifest.json the rest. Each name is
// given twice: containerd wants all of it, the OCI specification the tag.
func writeArchive(out string, archived mutate.IndexAddendum, single v1.Image, refs []name.Tag, mtime time.Time) error {
	dir, err := os.MkdirTemp("", "csi-puzzlefs-layout-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var entries []mutate.IndexAddendum
	for _, ref := range refs {
		entry := archived
		entry.Annotations = map[string]string{
			"io.containerd.image.name":          fullName(ref),
			"org.opencontainers.image.ref.name": ref.TagStr(),
		}
		entries = append(entries, entry)
	}
	top := mutate.IndexMediaType(mutate.AppendManifests(empty.Index, entries...), types.OCIImageIndex)
	if _, err := layout.Write(dir, top); err != nil {
		return err
	}
	manifest, err := dockerManifest(single, refs)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, "manifest.json"), manifest); err != nil {
		return err
	}
	files, err := layoutFiles(dir)
	if err != nil {
		return err
	}
	temp, err := os.CreateTemp(filepath.Dir(out), ".csi-puzzlefs-image-*")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // fails when all went well
	w := bufio.NewWriter(temp)
	err = writeTar(w, files, mtime)
	if err == nil {
		err = w.Flush()
	}
	// CreateTemp makes files that only their owner may read.
	if err = errors.Join(err, temp.Chmod(0o644), temp.Close()); err != nil {
		return err
	}
	return os.Rename(temp.Name(), out)
}

// fullName returns a name as container engines spell it: they call the registry that is meant where
// none is named by another name than the library does.
func fullName(ref name.Tag) string {
	if path, ok := strings.CutPrefix(ref.Name(), name.DefaultRegistry+"/"); ok {
		return "docker.io/" + path
	}
	return ref.Name()
}

// dockerManifest returns the manifest.json that leads docker load to the blobs of one image.
func dockerManifest(im v1.Image, refs []name.Tag) ([]byte, error) {
	m, err := im.Manifest()
	if err != nil {
		return nil, err
	}
	blob := func(h v1.Hash) string { return fmt.Sprintf("blobs/%s/%s", h.Algorithm, h.Hex) }
	entry := struct {
		Config   string
		RepoTags []string
		Layers   []string
	}{Config: blob(m.Config.Digest)}
	for _, ref := range refs {
		entry.RepoTags = append(entry.RepoTags, fullName(ref))
	}
	for _, l := range m.Layers {
		entry.Layers = append(entry.Layers, blob(l.Digest))
	}
	return json.Marshal([]any{entry})
}

// layoutFiles reads the files of an OCI layout as files of an archive.
func layoutFiles(dir string) ([]file, error) {
	var files []file
	tree := os.DirFS(dir)
	err := fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := fs.ReadFile(tree, name)
		files = append(files, file{name: name, mode: 0o644, content: content})
		return err
	})
	return files, err
}

// writeFile writes a file that everybody may read.
func writeFile(name string, content []byte) error {
	return os.WriteFile(name, content, 0o644)
}
