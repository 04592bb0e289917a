package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/chunk"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// buildFlags are the flags of the build command, as they were given.
type buildFlags struct {
	base, baseRef, push, chunker      string
	workDir, platform, terminationLog string
	cache                             string
	compress, json                    bool
	level                             string
	upper, upperXattrs                string
	mounted                           format.Digest // the base of a commit
	upperDir                          *os.File      // of a commit
	minimal                           minimalFlags
	registry                          registryFlags
}

func newBuildCommand() *cobra.Command {
	var flags buildFlags
	cmd := &cobra.Command{
		Use:   "build SOURCE [LAYOUT:TAG] [--push REF]",
		Short: "Build an image from a directory, an archive or a container image",
		Long: `Build an image from SOURCE, tag it in the OCI image layout LAYOUT, which is made if it does not
exist, and push it to a registry. Without LAYOUT:TAG, or LAYOUT TAG as two arguments, it is only
pushed.

SOURCE is one of
  DIRECTORY        which must not change meanwhile; mounts in it are not entered. One whose name
                   begins like one of the following is written ./NAME
  tar:FILE         a tar archive, plain or compressed with gzip or zstd; tar:- is standard input
  oci:LAYOUT:TAG   a container image in an OCI image layout
  docker://REF     a container image in a registry
or, with --overlay-upper DIR, there is none.

The same tree gives the same image, whichever source it comes from, and without --compression
and with the canonical chunker the same digests as the reference implementation's. The first line
that is printed is the fs-verity digest of the image manifest, which the PuzzleFS tools take, the
second its content digest, which registries and Kubernetes take.

Archives and container images are not unpacked: the content of their files goes to a file without
a name in --work-dir, which needs as much room as they have, and the image, where it is only
pushed, to a temporary layout there.

A delta (--base-layer, --base-ref) lists what changed since another image; --base-ref fetches
only the metadata of that image, and its chunks, where the registry has them, are not sent.

--overlay-upper DIR takes a delta from the upper directory of an overlay mount over the base image: a
mount of the base, or a directory that it was extracted to. Only what is in DIR is read; the rest of
the tree is the base's. Whiteouts, opaque and renamed directories and files that were copied up
without their content are understood, whatever cannot be is refused. 'csi-puzzlefs commit' does it
for a mount of 'csi-puzzlefs mount -w'. With --base-ref only new chunks are in the layout.

--no-xattrs, --no-devices, --owner and --exclude leave out what readers of the image do not need. What
was used is in the annotation io.puzzlefs.csi.minimal of the manifest, and the digests are not those
of an image with everything. A PATTERN has the syntax of a line of .dockerignore: it is matched
with the whole path from the root of the tree; * and ? stand for anything but a slash, [a-z]
for one character, ** between slashes for any number of directories. So '*.o' is in the root only,
'**/*.o' everywhere, and 'cache/**' is what is in cache.

Credentials come from the Docker config. Registries are spoken to by HTTPS, but for
loopback addresses and what --certs-dir says otherwise.

--json prints "reference", where the image was pushed to, with its digest, "digest", "verity", its
"inodes", the "bytes" of its files, "storedBytes", what its blobs take up, "newBytes", what of
it the registry, or else the layout, did not have, and "seconds". With --overlay-upper "inodes" and
"bytes" are what the new layer has.`,
		Example: `  mkdir -p /tmp/tree && echo hello > /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v1
  echo world >> /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v2 --base-layer v1
  mkdir -p /tmp/upper && echo hi > /tmp/upper/greeting
  csi-puzzlefs build --overlay-upper /tmp/upper --overlay-xattrs user /tmp/images:v3 --base-layer v2
  tar -C /tmp/tree -c . | csi-puzzlefs build tar:- --push localhost:5000/greeting:v1
  csi-puzzlefs build /tmp/tree --push localhost:5000/greeting:v2 --base-ref localhost:5000/greeting:v1 --json`,
		Args: cobra.ArbitraryArgs, // what is missing is said in the termination log too
		RunE: func(cmd *cobra.Command, args []string) error {
			result, err := runBuild(cmd, args, &flags)
			if err == nil {
				err = result.print(cmd, flags.json)
			}
			if flags.terminationLog == "" {
				return err
			}
			return errors.Join(err, result.writeTo(flags.terminationLog, err))
		},
	}
	f := cmd.Flags()
	f.StringVar(&flags.push, "push", "", "push the image to this `REF`: registry.example/name[:tag]")
	f.StringVarP(&flags.base, "base-layer", "b", "", "build a delta on the image of this `tag` in the same layout")
	f.StringVar(&flags.baseRef, "base-ref", "", "build a delta on the image `REF` in a registry, of which only the metadata is fetched")
	flags.addCompression(cmd)
	f.StringVar(&flags.chunker, "chunker", "canonical", "how to cut: `canonical|jotfs[:AVERAGE]`; an average of 16K to 4M, for images that need not share chunks with others")
	f.StringVar(&flags.platform, "platform", "", "`OS/ARCHITECTURE[/VARIANT]` to take of a container image that is there for several; default linux and this program's")
	f.StringVar(&flags.workDir, "work-dir", "", "`directory` for temporary files; default $TMPDIR or /tmp")
	f.StringVar(&flags.cache, "cache", "", "`file` that remembers which files were read, and how they were cut, for the next build of a directory into the same layout; none for no file; default one in the user's cache directory")
	f.StringVar(&flags.terminationLog, "termination-log", "", "also write the result as JSON, or what went wrong, to this `file`; in a pod /dev/termination-log")
	jsonFlag(cmd, &flags.json)
	f.StringVar(&flags.upper, "overlay-upper", "", "take the delta from this upper `directory` of an overlay over the base image, instead of SOURCE")
	f.StringVar(&flags.upperXattrs, "overlay-xattrs", "auto", "whose attributes in it are the overlay's: `auto|trusted|user`; user for mounts with the option userxattr")
	flags.minimal.add(cmd)
	flags.registry.add(cmd)
	return cmd
}

// addCompression adds the flags that say whether and how hard to compress.
func (f *buildFlags) addCompression(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.BoolVarP(&f.compress, "compression", "c", false, "store chunks as seekable zstd where that is smaller")
	flags.StringVar(&f.level, "compression-level", builder.CompressionFastest.String(),
		"with --compression, how much time to spend for a smaller image: `fastest|medium|better|best`")
}

// buildPlan is what a command line asks for.
type buildPlan struct {
	source      buildSource
	layout, tag string // of the result; the layout is "" where it is not to be kept
	push, base  registry.Reference
	cfg         builder.Config
	workDir     string
	client      *registry.Client
}

// plan makes sense of the command line, without looking at what it names.
func (f *buildFlags) plan(cmd *cobra.Command, args []string) (*buildPlan, error) {
	p := &buildPlan{tag: "image", workDir: f.workDir}
	if p.workDir == "" {
		p.workDir = os.TempDir()
	}
	args, err := p.place(cmd, f, args)
	if err != nil {
		return nil, err
	}
	for _, r := range []struct {
		flag, text string
		to         *registry.Reference
	}{{"--push", f.push, &p.push}, {"--base-ref", f.baseRef, &p.base}} {
		if r.text == "" {
			continue
		}
		if *r.to, err = registry.ParseReference(r.text); err != nil {
			return nil, usagef(cmd, "%s: %w", r.flag, err)
		}
	}
	p.cfg = builder.Config{Base: f.base, BaseManifest: f.mounted, Compress: f.compress, Tag: p.tag}
	if p.cfg.Chunker, err = chunk.ParseAlgorithm(f.chunker); err != nil {
		return nil, usagef(cmd, "--chunker: %w", err)
	}
	if p.cfg.Level, err = builder.ParseCompressionLevel(f.level); err != nil {
		return nil, usagef(cmd, "--compression-level: %w", err)
	}
	if cmd.Flags().Changed("compression-level") && !f.compress {
		return nil, usagef(cmd, "--compression-level %s: it is for --compression, which was not given", f.level)
	}
	if p.cfg.Minimal, err = f.minimal.parse(cmd); err != nil {
		return nil, err
	}
	if f.upper != "" {
		p.source, err = f.upperSource(cmd)
	} else {
		p.source, err = parseSource(cmd, args[0], f.platform)
	}
	if err != nil {
		return nil, err
	}
	p.cfg.UpperXattrs = p.source.upperXattrs
	if p.cfg.Record, err = p.recordPath(f.cache); err != nil {
		return nil, err
	}
	if p.client, err = registry.New(f.registry.config()); err != nil {
		return nil, err
	}
	return p, nil
}

// place makes sense of where the image goes and what it is built on. It returns the other
// arguments.
func (p *buildPlan) place(cmd *cobra.Command, f *buildFlags, args []string) ([]string, error) {
	form := argForm{"SOURCE", layoutTag}
	switch {
	case f.upper != "":
		form = argForm{layoutTag}
	case cmd.Flags().Changed("overlay-upper"):
		return nil, usagef(cmd, "--overlay-upper: the name of the directory is empty")
	}
	if len(args) == len(form)-1 && f.push == "" {
		return nil, usagef(cmd, "%s needs to know where the image goes: LAYOUT:TAG or LAYOUT TAG, --push REF, or both", cmd.Name())
	}
	if len(args) != len(form)-1 {
		local, others, err := form.split(cmd, args)
		if err != nil {
			return nil, err
		}
		p.layout, p.tag, args = local.dir, local.tag, others
	}
	switch {
	case f.base != "" && f.baseRef != "":
		return nil, usagef(cmd, "--base-layer and --base-ref exclude each other")
	case f.base != "" && p.layout == "":
		return nil, usagef(cmd, "--base-layer names a tag of LAYOUT: give LAYOUT:TAG, or --base-ref REF for an image in a registry")
	case f.upper != "" && f.base == "" && f.baseRef == "" && f.mounted.IsZero():
		return nil, usagef(cmd, "--overlay-upper needs the image that the overlay is over: --base-layer TAG or --base-ref REF")
	}
	return args, nil
}

// runBuild builds and pushes.
func runBuild(cmd *cobra.Command, args []string, flags *buildFlags) (_ *buildResult, err error) {
	started := time.Now()
	collectLate()
	p, err := flags.plan(cmd, args)
	if err != nil {
		return nil, err
	}
	// A layout that is there can say now that it cannot be used. One that is not is made
	// when the source has been read, so that a mistyped source does not leave an empty one.
	s, err := p.openLayout(false)
	if err != nil {
		return nil, err
	}
	defer func() {
		if s != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s != nil {
		if err := flags.checkMounted(s); err != nil {
			return nil, err
		}
	}
	closeSource, err := p.read(cmd)
	if err != nil {
		return nil, fmt.Errorf("build %s: %w", p.name(), err)
	}
	defer func() { err = errors.Join(err, closeSource()) }()
	if s == nil && p.layout == "" {
		var remove func() error
		if remove, err = p.makeTempLayout(); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, remove()) }()
	}
	if s == nil {
		if s, err = p.openLayout(true); err != nil {
			return nil, err
		}
	}
	result, err := p.build(cmd, s)
	if err != nil {
		return nil, err
	}
	if p.push != (registry.Reference{}) {
		if err := p.pushTo(cmd, s, result); err != nil {
			return nil, err
		}
	}
	result.Seconds = secondsSince(started)
	return result, nil
}

// name is what the image is called in messages.
func (p *buildPlan) name() string {
	if p.push != (registry.Reference{}) {
		return p.push.String()
	}
	return p.layout + ":" + p.tag
}

// openLayout opens the layout for the image. Without create it returns nil where there is
// none.
func (p *buildPlan) openLayout(create bool) (*store.Store, error) {
	if !create && !p.onLayout() {
		if _, err := os.Stat(p.layout); p.layout == "" || errors.Is(err, fs.ErrNotExist) {
			return nil, nil //nolint:nilnil // no layout yet is no error, and there is nothing else to say
		}
	}
	return store.Open(store.Config{Dir: p.layout, Create: !p.onLayout()})
}

// onLayout reports whether the base is in the layout.
func (p *buildPlan) onLayout() bool { return p.cfg.Base != "" || !p.cfg.BaseManifest.IsZero() }

// makeTempLayout chooses a temporary layout and returns what removes it.
func (p *buildPlan) makeTempLayout() (remove func() error, err error) {
	dir, err := os.MkdirTemp(p.workDir, "csi-puzzlefs-build-")
	if err != nil {
		return nil, fmt.Errorf("make a temporary layout: %w: choose a directory with --work-dir that is writable and has room for the image", err)
	}
	p.layout = filepath.Join(dir, "layout")
	return func() error { return os.RemoveAll(dir) }, nil
}

// read prepares the source. What it returns releases what is kept of it.
func (p *buildPlan) read(cmd *cobra.Command) (func() error, error) {
	if dir := p.source.dir + p.source.upper; dir != "" {
		p.cfg.Dir, p.cfg.Upper, p.cfg.UpperDir = p.source.dir, p.source.upper, p.source.upperDir
		if p.cfg.UpperDir != nil {
			return func() error { return nil }, nil
		}
		fi, err := os.Stat(dir)
		if err == nil && !fi.IsDir() {
			err = fmt.Errorf("%s is not a directory", dir)
		}
		return func() error { return nil }, err
	}
	m := newMeter(cmd.ErrOrStderr(), "reading")
	tree, err := p.source.read(cmd.Context(), p.client, m, builder.ReadConfig{
		Name: p.source.name, WorkDir: p.workDir, Warn: func(message string) { warn(cmd, message) },
	})
	m.close()
	if err != nil {
		return nil, err
	}
	p.cfg.Tree = tree
	return tree.Close, nil
}

// build makes the image in the layout.
func (p *buildPlan) build(cmd *cobra.Command, s *store.Store) (*buildResult, error) {
	if p.base != (registry.Reference{}) {
		desc, err := p.client.PullMetadata(cmd.Context(), p.base, s)
		if err != nil {
			return nil, err
		}
		p.cfg.BaseManifest = desc.Digest
	}
	counted := &countingStore{Store: s}
	p.cfg.Store = counted
	m := newMeter(cmd.ErrOrStderr(), "building")
	p.cfg.Progress = func(done builder.Progress) { m.set(done.Bytes, 0) }
	r, err := builder.Build(cmd.Context(), p.cfg)
	m.close()
	if err != nil {
		return nil, err
	}
	if p.source.upper != "" && p.base != (registry.Reference{}) && p.push == (registry.Reference{}) {
		warn(cmd, fmt.Sprintf("%s has only the chunks that are new: 'csi-puzzlefs pull %s' into the same layout brings the others", p.name(), p.base))
	}
	return &buildResult{
		Digest: r.Manifest.Digest.String(), Verity: "verity:" + r.Verity.String(),
		Inodes: r.Inodes, Bytes: r.Bytes, StoredBytes: r.StoredBytes, NewBytes: counted.new.Load(),
		manifest: r.Manifest,
	}, nil
}

// pushTo pushes the image from the layout and completes the result.
func (p *buildPlan) pushTo(cmd *cobra.Command, s *store.Store, result *buildResult) error {
	opts := registry.PushOptions{Warn: func(message string) { warn(cmd, message) }}
	if p.base.Registry == p.push.Registry {
		opts.MountFrom = p.base.Repository
	}
	var last registry.Progress
	m := newMeter(cmd.ErrOrStderr(), "pushing")
	opts.Progress = func(done registry.Progress) {
		last = done
		m.set(done.DoneBytes, done.TotalBytes)
	}
	d, err := p.client.Push(cmd.Context(), s, result.manifest, p.push, opts)
	m.close()
	if err != nil {
		return err
	}
	pushed := p.push
	pushed.Digest = d.Digest
	result.Reference = pushed.String()
	result.NewBytes = last.TotalBytes - last.ReusedBytes
	return nil
}
