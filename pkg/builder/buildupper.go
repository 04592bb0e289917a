package builder

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// buildUpper makes an image of what an overlay mount shows, from its upper directory and the
// metadata of the image below it.
//
// The new layer describes what the upper directory has, and of that only what differs from
// the base. Everything else is found in the base's layers, by its number.
func buildUpper(ctx context.Context, cfg *Config, base *baseTree) (_ *Result, err error) {
	var dir *hostDir
	defer func() {
		if dir != nil {
			err = errors.Join(err, dir.close())
		}
	}()
	return buildUpperNodes(ctx, cfg, base, func(w *walker) (*upperNode, directory, error) {
		var root *upperNode
		var err error
		root, dir, err = readUpper(w.ctx, cfg, w.found)
		return root, dir, err
	})
}

// buildUpperNodes makes an image of what read returns: an upper directory, and where the content
// of its files is.
func buildUpperNodes(ctx context.Context, cfg *Config, base *baseTree, read func(*walker) (*upperNode, directory, error)) (*Result, error) {
	var p *upperPlan
	t, err := runPipeline(ctx, cfg, base, nil, func(w *walker) error {
		root, dir, err := read(w)
		if err != nil {
			return err
		}
		if p, err = planUpper(w.ctx, base, root, w.tree); err != nil {
			return err
		}
		return root.send(w, dir)
	})
	if err != nil {
		return nil, err
	}
	if t.kept, err = p.keptChunks(); err != nil {
		return nil, err
	}
	t.minimal = base.minimal
	t.dropKnown(base)
	return finish(cfg, base, t)
}

// keptChunks returns the chunks of the base's manifest that files of the new image need.
func (p *upperPlan) keptChunks() ([]format.Descriptor, error) {
	needed := make(map[format.Digest]bool) // true once it was found
	var last format.Digest                 // many small files in a row share a chunk
	need := func(i *format.Inode) {
		for k := range i.Chunks {
			if d := i.Chunks[k].Blob.Digest; d != last {
				needed[d], last = false, d
			}
		}
	}
	for ino, u := range p.unchanged {
		if p.taken[ino] == nil {
			need(u.inode)
		}
	}
	for _, c := range p.links {
		if c.at.data != nil {
			need(c.at.data)
		}
	}
	var chunks []format.Descriptor
	for _, d := range p.base.chunks {
		if _, ok := needed[d.Digest]; ok {
			needed[d.Digest] = true
			chunks = append(chunks, d)
		}
	}
	for d, found := range needed {
		if !found {
			return nil, fmt.Errorf("the base image's manifest does not name the chunk %s, which its files need: %w", d, format.ErrCorrupt)
		}
	}
	return chunks, nil
}

// dropKnown takes out the inodes that the base has just so.
func (t *tree) dropKnown(base *baseTree) {
	for i, block := range t.blocks {
		t.blocks[i] = slices.DeleteFunc(block, func(i format.Inode) bool {
			b := base.find(i.Ino)
			return b != nil && equalInodes(b, &i)
		})
	}
	t.count, t.present = 0, 0
	for _, block := range t.blocks {
		t.count += len(block)
		for i := range block {
			if block[i].Kind != format.KindWhiteout {
				t.present++
			}
		}
	}
}
