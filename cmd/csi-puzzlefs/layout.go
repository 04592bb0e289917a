package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// layoutTag is the argument that names an image in a local layout: LAYOUT:TAG, or LAYOUT and
// TAG as two arguments, which mean the same. How many arguments there are tells which it is.
const layoutTag = "LAYOUT:TAG"

// layoutRef is what that argument says.
type layoutRef struct{ dir, tag string }

func (r layoutRef) String() string { return r.dir + ":" + r.tag }

// splitRef splits LAYOUT:TAG.
func splitRef(cmd *cobra.Command, text string) (layoutRef, error) {
	dir, tag, err := store.SplitRef(text)
	if err != nil {
		return layoutRef{}, usagef(cmd, "%w", err)
	}
	return layoutRef{dir, tag}, nil
}

// argForm names the arguments of a command, one of which is layoutTag.
type argForm []string

func (f argForm) String() string {
	one := strings.Join(f, " ")
	return one + ", or " + strings.Replace(one, layoutTag, "LAYOUT TAG", 1)
}

// check implements cobra.PositionalArgs.
func (f argForm) check(cmd *cobra.Command, args []string) error {
	_, _, err := f.split(cmd, args)
	return err
}

// split returns the image that the arguments name, and the other arguments in their order.
func (f argForm) split(cmd *cobra.Command, args []string) (ref layoutRef, others []string, err error) {
	at := slices.Index(f, layoutTag)
	switch len(args) {
	case len(f):
		if ref, err = splitRef(cmd, args[at]); err != nil {
			return ref, nil, usagef(cmd, "%s takes %s: %w", cmd.Name(), f, err)
		}
		return ref, slices.Concat(args[:at], args[at+1:]), nil
	case len(f) + 1:
		ref = layoutRef{args[at], args[at+1]}
		err = store.ValidateTag(ref.tag)
		if ref.dir == "" {
			err = errors.New("the directory is empty")
		}
		if err != nil {
			return ref, nil, usagef(cmd, "%s takes %s: %w", cmd.Name(), f, err)
		}
		return ref, slices.Concat(args[:at], args[at+2:]), nil
	}
	return ref, nil, usagef(cmd, "%s takes %s; %d given", cmd.Name(), f, len(args))
}

// withTag opens a layout, resolves a tag in it and calls fn.
func withTag(ref layoutRef, fn func(s *store.Store, root format.Descriptor) error) error {
	s, err := store.Open(store.Config{Dir: ref.dir})
	if err != nil {
		return err
	}
	root, err := s.Resolve(ref.tag)
	if err == nil {
		err = fn(s, root)
	}
	return errors.Join(err, s.Close())
}

// withImage opens an image, says on stderr what is odd about it, and calls fn.
func withImage(cmd *cobra.Command, ref layoutRef, fn func(ctx context.Context, im *image.Image) error) error {
	return withTag(ref, func(s *store.Store, root format.Descriptor) error {
		im, err := openImage(cmd, s, root)
		if err != nil {
			return err
		}
		return fn(cmd.Context(), im)
	})
}

// openImage opens an image, and says on stderr what is odd about it.
func openImage(cmd *cobra.Command, s *store.Store, root format.Descriptor) (*image.Image, error) {
	im, err := image.Open(cmd.Context(), image.Config{Source: s, Early: s.GetEarly, Root: root})
	if err == nil {
		warn(cmd, im.Warnings()...)
	}
	return im, err
}

func warn(cmd *cobra.Command, warnings ...string) {
	for _, w := range warnings {
		fmt.Fprintf(cmd.ErrOrStderr(), "csi-puzzlefs: warning: %s\n", w)
	}
}
