package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/seal"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// mountFlags are the flags of the mount command, as they were given.
type mountFlags struct {
	foreground, writable            bool
	initPipe, digest, verity, upper string
	options                         []string
}

func newMountCommand() *cobra.Command {
	var flags mountFlags
	form := argForm{layoutTag, "DIR"}
	cmd := &cobra.Command{
		Use:   "mount [-f] [-i PIPE] [-o OPTIONS] [-d DIGEST] [-w] [-p UPPER] LAYOUT:TAG DIR",
		Short: "Mount an image on a directory",
		Long: `Mount an image, read-only, on the directory DIR. The command returns when the mount can be used, or
says why there is none; a server stays in the background until the image is unmounted, by
'csi-puzzlefs umount DIR' or otherwise, or it gets SIGTERM. With --foreground the command is the server,
until then or Ctrl-C. LAYOUT TAG may be two arguments, too.

As root every user may read the mount, with the permissions that the image gives; otherwise only the
user who mounts it. Device files and set-user-ID bits do not work unless asked for.

With --writable, which is for root, DIR can be written: the image is mounted on DIR/ro, and an overlay on
DIR keeps what changes in DIR/upper, or in the directory that --persist names. Mounted again with the same
one, the changes are there again.

With --digest nothing is mounted unless the whole image is the one that the digest names: where the
file system of LAYOUT has fs-verity, the kernel must have sealed it ('csi-puzzlefs enable-fs-verity'),
elsewhere the same is proved without the kernel.

A server in the background logs to systemd's journal, with the fields IMAGE and DIR, or else to syslog;
one in the foreground to stderr. --log-level debug logs each request.

-o takes a list of these, with commas between; a comma in a value is written \,
  allow_other        let all users in, as mounts by root do; others need user_allow_other in /etc/fuse.conf
  allow_root         let only root in, where root mounts
  auto_unmount       unmount, by fusermount3, also when the server is killed
  fsname=NAME        the source in the table of mounts, instead of the image's digest
  subtype=NAME       the type in the table of mounts is fuse.NAME, instead of fuse.puzzlefs
  dev suid noexec    let device files and set-user-ID bits work (for root), programs not; and the opposite:
  nodev nosuid exec  the default
  noatime atime      do not, or do, keep access times, for --writable; images have none
  default_permissions ro async sync dirsync
                     what a read-only mount is, or has no use for
  rw                 only with --writable, and the default there`,
		Example: `  mkdir -p /tmp/tree /tmp/mnt && echo hello > /tmp/tree/greeting
  csi-puzzlefs build /tmp/tree /tmp/images:v1
  csi-puzzlefs mount /tmp/images:v1 /tmp/mnt`,
		Args: cobra.ArbitraryArgs, // the init pipe is told if they are wrong
		RunE: func(cmd *cobra.Command, args []string) error { return runMount(cmd, args, form, &flags) },
	}
	f := cmd.Flags()
	f.BoolVarP(&flags.foreground, "foreground", "f", false, "stay in the foreground")
	f.StringVarP(&flags.initPipe, "init-pipe", "i", "", "write s to this `named pipe` when the mount can be used, or f when there is none")
	f.StringArrayVarP(&flags.options, "options", "o", nil, "mount with these `options`; see above")
	f.StringVarP(&flags.digest, "digest", "d", "", "mount only if this is the fs-verity `digest` of the image manifest, which build prints first")
	f.StringVar(&flags.verity, "verity", seal.Auto.String(), "how to check --digest, `auto|require|hash`: by the kernel's fs-verity where the layout's file system has it, only so, or by hashing")
	f.BoolVarP(&flags.writable, "writable", "w", false, "mount a writable overlay on the image; for root")
	f.StringVarP(&flags.upper, "persist", "p", "", "--writable, and keep what changes in this `directory`")
	return cmd
}

// mountPlan is what a command line asks for.
type mountPlan struct {
	ref        layoutRef
	dir, upper string // upper is "" for DIR/upper
	writable   bool
	options    *mountOptions
	digest     verity.Digest // zero for any
	verity     seal.Mode     // how to check the digest
	warn       func(warnings ...string)
}

// plan makes sense of the command line, without looking at what it names.
func (f *mountFlags) plan(cmd *cobra.Command, args []string, form argForm) (*mountPlan, error) {
	ref, others, err := form.split(cmd, args)
	if err != nil {
		return nil, err
	}
	p := &mountPlan{
		ref: ref, dir: others[0], upper: f.upper, writable: f.writable || f.upper != "",
		warn: func(warnings ...string) { warn(cmd, warnings...) },
	}
	root := os.Geteuid() == 0
	switch {
	case p.dir == "":
		return nil, usagef(cmd, "the directory to mount on is empty")
	case cmd.Flags().Changed("persist") && f.upper == "":
		return nil, usagef(cmd, "--persist: the directory is empty")
	case p.writable && !root:
		return nil, usagef(cmd, "--writable and --persist are for root: only root can mount overlays")
	}
	if p.options, err = parseMountOptions(cmd, f.options, root, p.writable); err != nil {
		return nil, err
	}
	if cmd.Flags().Changed("digest") {
		if p.digest, err = parseVerity(cmd, f.digest); err != nil {
			return nil, err
		}
	} else if cmd.Flags().Changed("verity") {
		return nil, usagef(cmd, "--verity says how to check --digest: give that, too")
	}
	if p.verity, err = seal.ParseMode(f.verity); err != nil {
		return nil, usagef(cmd, "--verity: %w", err)
	}
	return p, nil
}

// absolute makes the paths independent of the working directory.
func (p *mountPlan) absolute() error {
	for _, path := range []*string{&p.ref.dir, &p.dir, &p.upper} {
		if *path == "" {
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	return nil
}

// runMount mounts, here or in the background, and lets whoever reads the init pipe know.
func runMount(cmd *cobra.Command, args []string, form argForm, flags *mountFlags) (err error) {
	self := asServer(cmd.ErrOrStderr())
	pipe, err := openInitPipe(flags.initPipe)
	if err != nil {
		return err
	}
	defer pipe.close()
	defer func() {
		// The parent of a server tells that it failed: it knows even if the server was killed.
		if err == nil || self != nil {
			return
		}
		if tellErr := pipe.tellFailure(cmd.Context()); tellErr != nil {
			warn(cmd, tellErr.Error())
		}
	}()
	p, err := flags.plan(cmd, args, form)
	if err != nil {
		return err
	}
	switch {
	case flags.foreground:
		p.warn(p.options.warnings()...)
		return p.run(cmd, pipe, nil)
	case self != nil:
		if err := p.absolute(); err != nil {
			return err
		}
		if err := os.Chdir("/"); err != nil {
			return err
		}
		return p.run(cmd, pipe, self)
	}
	p.warn(p.options.warnings()...)
	return p.start(cmd)
}

// start starts a server in the background.
func (p *mountPlan) start(cmd *cobra.Command) error {
	// What is mounted there already no failure must take away.
	before := findMounted(p.dir)
	err := startServer(cmd.Context(), cmd.ErrOrStderr())
	if errors.Is(err, errKilled) && !before {
		if undoErr := unmount(p.dir, true); undoErr != nil && findMounted(p.dir) {
			err = errors.Join(err, undoErr)
		}
	}
	var reported *reportedError
	if err != nil && !errors.As(err, &reported) {
		return fmt.Errorf("mount %s on %s: %w", p.ref, p.dir, err)
	}
	return err
}

// run checks and opens the image, and serves it until it is unmounted.
func (p *mountPlan) run(cmd *cobra.Command, pipe *initPipe, self *server) error {
	return withTag(p.ref, func(s *store.Store, root format.Descriptor) error {
		if err := p.check(cmd, s, root); err != nil {
			return err
		}
		im, err := openImage(cmd, s, root)
		if err != nil {
			return err
		}
		if self == nil {
			return p.serve(cmd.Context(), im, pipe, func() error { return nil })
		}
		defer self.closeLog()
		self.openLog(cmd.Flag("log-level").Value.String(), map[string]string{"IMAGE": im.Digest().String(), "DIR": p.dir})
		err = p.serve(cmd.Context(), im, pipe, self.ready)
		if err != nil {
			slog.Error("the server failed", "error", err) // stderr may be gone
		}
		return err
	})
}

// check makes sure that the image is the one that --digest names.
func (p *mountPlan) check(cmd *cobra.Command, s *store.Store, root format.Descriptor) error {
	if p.digest == (verity.Digest{}) {
		return nil
	}
	report, err := seal.Check(cmd.Context(), seal.Config{Store: s, Root: root, Digest: p.digest, Mode: p.verity})
	if err != nil {
		return fmt.Errorf("mount %s: %w", p.ref, err)
	}
	p.warn(report.Warnings...)
	return nil
}
