// Command image makes container images as OCI archives, without a container engine: that of
// csi-puzzlefs, for several platforms, which "make image" runs it for, or one of any directory
// tree, of which the end-to-end suite's images are made.
//
// An image has one layer. That of csi-puzzlefs is the static program, the directories that it wants
// to find, and the licences of what is linked into it; beside its archive are written the bills of
// materials of the programs, which the image carries too. An archive is a tar of an OCI image
// layout; see archive.go.
//
// The same source, version, revision, time and release of Go give the same bytes, on any machine,
// and so do equal trees.
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
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
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

const usage = `usage: image [-source DIR] [flags]
       image -tree DIR -name REF[,REF...] -o FILE [flags]

Makes the container image of csi-puzzlefs as an OCI archive, and beside it a bill of materials for
each platform; or, with -tree, the image of the files in a directory. SOURCE_DATE_EPOCH, in seconds,
is the time that everything in it bears; without it that of the commit or, outside of a git checkout
and with -tree, 1970.

`

// options are the flags of a command line.
type options struct {
	// Of both ways to make an image.
	out, names, platforms string
	// Of the image of csi-puzzlefs.
	source, version, revision, rootfs, push string
	// Of the image of a tree.
	tree, entrypoint, cmd, user, env string
}

// register adds the flags to those of a command line.
func (o *options) register(flags *flag.FlagSet) {
	flags.StringVar(&o.out, "o", "csi-puzzlefs-image.tar", "the archive to write; bills of materials go to the same directory")
	flags.StringVar(&o.names, "name", "", "the image's `references` in the archive, by commas (default, without -tree: "+repository+":VERSION)")
	flags.StringVar(&o.platforms, "platform", "linux/amd64,linux/arm64", "for what to build, OS/ARCH, by commas; docker load gets the first; with -tree one, by default this machine's")
	flags.StringVar(&o.source, "source", "../..", "the source tree, `directory` of the module csi-puzzlefs")
	flags.StringVar(&o.version, "version", "", "the program's version (default: what cmd/csi-puzzlefs/VERSION says)")
	flags.StringVar(&o.revision, "revision", "", "the source's `commit` (default: git's, with -dirty after it if files were changed)")
	flags.StringVar(&o.rootfs, "rootfs", "", "instead of an archive write the files of the first platform's image to this `directory`")
	flags.StringVar(&o.push, "push", "", "also push the image to this `reference`, with the Docker config's credentials")
	flags.StringVar(&o.tree, "tree", "", "make an image of the files in this `directory`; its programs are static or bring their libraries")
	flags.StringVar(&o.entrypoint, "entrypoint", "", "with -tree: the program that containers run, with arguments, by `commas`")
	flags.StringVar(&o.cmd, "cmd", "", "with -tree: further arguments, or the program where there is no -entrypoint, by `commas`; what a pod's args replace")
	flags.StringVar(&o.user, "user", "", "with -tree: the `user` that containers run as, UID[:GID] (default: root)")
	flags.StringVar(&o.env, "env", "", "with -tree: `variables` that containers have beside PATH, NAME=VALUE by commas")
}

// check refuses flags that do not go together.
func (o *options) check(flags *flag.FlagSet) error {
	given := make(map[string]bool)
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	first := func(names ...string) string {
		for _, n := range names {
			if given[n] {
				return n
			}
		}
		return ""
	}
	if !given["tree"] {
		if n := first("entrypoint", "cmd", "user", "env"); n != "" {
			return fmt.Errorf("-%s is for -tree, which is not given; the image of csi-puzzlefs says itself how it is run", n)
		}
		return nil
	}
	if n := first("source", "version", "revision", "rootfs", "push"); n != "" {
		return fmt.Errorf("-%s is for the image of csi-puzzlefs, not for that of a -tree", n)
	}
	switch {
	case o.tree == "":
		return errors.New("-tree is empty: want a directory")
	case o.names == "":
		return errors.New("-tree needs a -name for the image, such as registry.example.com/tools:1")
	case !given["o"]:
		return errors.New("-tree needs -o, the archive to write")
	}
	if !given["platform"] {
		o.platforms = "linux/" + runtime.GOARCH
	}
	return nil
}

// run runs one command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	var o options
	o.register(flags)
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("takes no arguments but flags; %q given", flags.Args())
	}
	if err := o.check(flags); err != nil {
		return err
	}
	var platforms []v1.Platform
	for text := range strings.SplitSeq(o.platforms, ",") {
		p, err := parsePlatform(text)
		if err != nil {
			return fmt.Errorf("-platform: %w", err)
		}
		platforms = append(platforms, p)
	}
	if o.tree != "" {
		return o.runTree(platforms, stdout)
	}
	return o.runSource(ctx, platforms, stdout)
}

// runTree makes the image of a tree.
func (o *options) runTree(platforms []v1.Platform, stdout io.Writer) error {
	if len(platforms) != 1 {
		return fmt.Errorf("-platform: %q: the programs of a -tree are for one platform", o.platforms)
	}
	names, err := parseNames(o.names, "latest")
	if err != nil {
		return err
	}
	created, err := parseEpoch(os.Getenv(epochVariable))
	if err != nil {
		return err
	}
	env := splitList(o.env)
	for _, v := range env {
		if n, _, ok := strings.Cut(v, "="); !ok || n == "" {
			return fmt.Errorf("-env: %q: want NAME=VALUE", v)
		}
	}
	ti := treeImage{dir: o.tree, names: names, platform: platforms[0], created: created, config: v1.Config{
		Entrypoint: splitList(o.entrypoint), Cmd: splitList(o.cmd), User: o.user, WorkingDir: "/",
		// Where programs are looked for on any Linux.
		Env: append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, env...),
	}}
	return ti.deliver(o.out, stdout)
}

// runSource makes the image of csi-puzzlefs.
func (o *options) runSource(ctx context.Context, platforms []v1.Platform, stdout io.Writer) error {
	s, err := openSource(ctx, o.source, o.version, o.revision)
	if err != nil {
		return err
	}
	if o.names == "" {
		o.names = repository + ":" + s.version
	}
	names, err := parseNames(o.names, s.version)
	if err != nil {
		return err
	}
	var target name.Reference
	if o.push != "" {
		if target, err = name.ParseReference(o.push, name.WithDefaultTag(s.version)); err != nil {
			return fmt.Errorf("-push: %w", err)
		}
	}
	if o.rootfs != "" {
		_, files, err := s.contents(ctx, platforms[0])
		if err != nil {
			return err
		}
		return writeTree(o.rootfs, files, s.created)
	}
	var images []platformImage
	for _, p := range platforms {
		im, err := s.image(ctx, p)
		if err != nil {
			return fmt.Errorf("make image for %s: %w", p, err)
		}
		images = append(images, im)
	}
	return deliver(ctx, s, images, o.out, names, target, stdout)
}

// deliver writes the archive and the bills of materials, pushes the image if target is not nil,
// and says what it made.
func deliver(ctx context.Context, s *source, images []platformImage, out string, names []name.Tag, target name.Reference, stdout io.Writer) error {
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
	if err := writeArchive(out, mutate.IndexAddendum{Add: index}, images[0].image, names, s.created); err != nil {
		return fmt.Errorf("write %s: %w", out, err)
	}
	if err := report(stdout, out, names, digest); err != nil {
		return err
	}
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

// report says what an archive holds, a line for each name.
func report(stdout io.Writer, out string, names []name.Tag, digest v1.Hash) error {
	for _, n := range names {
		if _, err := fmt.Fprintf(stdout, "%s: %s@%s\n", out, fullName(n), digest); err != nil {
			return err
		}
	}
	return nil
}

// parseNames parses references by commas. One without a tag gets defaultTag.
func parseNames(text, defaultTag string) ([]name.Tag, error) {
	var names []name.Tag
	for part := range strings.SplitSeq(text, ",") {
		n, err := name.NewTag(part, name.WithDefaultTag(defaultTag))
		if err != nil {
			return nil, fmt.Errorf("-name: %w", err)
		}
		if slices.ContainsFunc(names, func(other name.Tag) bool { return other.Name() == n.Name() }) {
			return nil, fmt.Errorf("-name: %s is given twice", n)
		}
		names = append(names, n)
	}
	return names, nil
}

// parsePlatform parses OS/ARCH. Variants of an architecture are not built.
func parsePlatform(text string) (v1.Platform, error) {
	system, arch, ok := strings.Cut(text, "/")
	if !ok || system != "linux" || arch == "" || strings.Contains(arch, "/") {
		return v1.Platform{}, fmt.Errorf("%q: want linux/ARCH, such as linux/amd64", text)
	}
	return v1.Platform{OS: system, Architecture: arch}, nil
}
