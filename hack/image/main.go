// Command image makes the container image of csi-puzzlefs, for several platforms, as an OCI
// archive, without a container engine. "make image" runs it.
//
// An image has one layer: the static program, the directories that it wants to find, and the
// licences of what is linked into it. The archive is a tar of an OCI image layout; see archive.go.
// Beside it are written the bills of materials of the programs, which the image carries too.
//
// The same source, version, revision, time and release of Go give the same bytes, on any machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"
)

// repository is where the image is said to be from if nothing else is: a name that belongs to
// nobody, as there is no public image.
const repository = "registry.example.com/csi-puzzlefs"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		os.Exit(1)
	}
}

// run runs one command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, `usage: image [flags]

Makes the container image of csi-puzzlefs as an OCI archive, and beside it a bill of materials for
each platform. SOURCE_DATE_EPOCH, in seconds, is the time that everything in it bears; without it
that of the commit or, outside of a git checkout, 1970.

`)
		flags.PrintDefaults()
	}
	source := flags.String("source", "../..", "the source tree, `directory` of the module csi-puzzlefs")
	out := flags.String("o", "csi-puzzlefs-image.tar", "the archive to write; bills of materials go to the same directory")
	version := flags.String("version", "", "the program's version (default: what cmd/csi-puzzlefs/VERSION says)")
	revision := flags.String("revision", "", "the source's `commit` (default: git's, with -dirty after it if files were changed)")
	platforms := flags.String("platform", "linux/amd64,linux/arm64", "for what to build, OS/ARCH, by commas; docker load gets the first")
	tag := flags.String("name", "", "the image's `reference` in the archive (default: "+repository+":VERSION)")
	tree := flags.String("rootfs", "", "instead of an archive write the files of the first platform's image to this `directory`")
	push := flags.String("push", "", "also push the image to this `reference`, with the Docker config's credentials")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("takes no arguments but flags; %q given", flags.Args())
	}
	s, err := openSource(ctx, *source, *version, *revision)
	if err != nil {
		return err
	}
	if *tag == "" {
		*tag = repository + ":" + s.version
	}
	ref, err := name.NewTag(*tag, name.WithDefaultTag(s.version))
	if err != nil {
		return fmt.Errorf("-name: %w", err)
	}
	var target name.Reference
	if *push != "" {
		if target, err = name.ParseReference(*push, name.WithDefaultTag(s.version)); err != nil {
			return fmt.Errorf("-push: %w", err)
		}
	}
	var parsed []v1.Platform
	for text := range strings.SplitSeq(*platforms, ",") {
		p, err := parsePlatform(text)
		if err != nil {
			return fmt.Errorf("-platform: %w", err)
		}
		parsed = append(parsed, p)
	}
	if *tree != "" {
		_, files, err := s.contents(ctx, parsed[0])
		if err != nil {
			return err
		}
		return writeTree(*tree, files, s.created)
	}
	var images []platformImage
	for _, p := range parsed {
		im, err := s.image(ctx, p)
		if err != nil {
			return fmt.Errorf("make image for %s: %w", p, err)
		}
		images = append(images, im)
	}
	return deliver(ctx, s, images, *out, ref, target, stdout)
}

// deliver writes the archive and the bills of materials, pushes the image if target is not nil,
// and says what it made.
func deliver(ctx context.Context, s *source, images []platformImage, out string, ref name.Tag, target name.Reference, stdout io.Writer) error {
	index := s.index(images)
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	for _, im := range images {
		if err := writeFile(filepath.Join(filepath.Dir(out), im.sbomName()), im.sbom); err != nil {
			return err
		}
	}
	if err := writeArchive(out, index, images[0].image, ref, s.created); err != nil {
		return fmt.Errorf("write %s: %w", out, err)
	}
	fmt.Fprintf(stdout, "%s: %s@%s\n", out, ref.Name(), digest)
	for _, im := range images {
		layers, err := im.image.Layers()
		if err != nil {
			return err
		}
		size, err := layers[0].Size()
		if err != nil {
			return err
		}
		fmt.Fprintf(stdout, "  %s: program %.1f MB, layer %.1f MB\n", im.platform, float64(im.programSize)/1e6, float64(size)/1e6)
	}
	if target == nil {
		return nil
	}
	if err := remote.WriteIndex(target, index, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)); err != nil {
		return fmt.Errorf("push to %s: %w", target, err)
	}
	_, err = fmt.Fprintf(stdout, "pushed: %s\n", target.Context().Digest(digest.String()))
	return err
}

// parsePlatform parses OS/ARCH. Variants of an architecture are not built.
func parsePlatform(text string) (v1.Platform, error) {
	system, arch, ok := strings.Cut(text, "/")
	if !ok || system != "linux" || arch == "" || strings.Contains(arch, "/") {
		return v1.Platform{}, fmt.Errorf("%q: want linux/ARCH, such as linux/amd64", text)
	}
	return v1.Platform{OS: system, Architecture: arch}, nil
}
