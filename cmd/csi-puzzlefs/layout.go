package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// splitRef splits LAYOUT:TAG.
func splitRef(cmd *cobra.Command, ref string) (dir, tag string, err error) {
	dir, tag, err = store.SplitRef(ref)
	if err != nil {
		return "", "", usagef(cmd, "%w", err)
	}
	return dir, tag, nil
}

// withTag opens a layout, resolves a tag in it and calls fn.
func withTag(cmd *cobra.Command, ref string, fn func(s *store.Store, root format.Descriptor) error) error {
	dir, tag, err := splitRef(cmd, ref)
	if err != nil {
		return err
	}
	s, err := store.Open(store.Config{Dir: dir})
	if err != nil {
		return err
	}
	root, err := s.Resolve(tag)
	if err == nil {
		err = fn(s, root)
	}
	return errors.Join(err, s.Close())
}

// withImage opens an image, says on stderr what is odd about it, and calls fn.
func withImage(cmd *cobra.Command, ref string, fn func(ctx context.Context, im *image.Image) error) error {
	return withTag(cmd, ref, func(s *store.Store, root format.Descriptor) error {
		im, err := image.Open(cmd.Context(), image.Config{Source: s, Root: root})
		if err != nil {
			return err
		}
		warn(cmd, im.Warnings()...)
		return fn(cmd.Context(), im)
	})
}

func warn(cmd *cobra.Command, warnings ...string) {
	for _, w := range warnings {
		fmt.Fprintf(cmd.ErrOrStderr(), "csi-puzzlefs: warning: %s\n", w)
	}
}
