package fuse

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"
	"unicode"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// Errors of this package, wrapped with the mount point at hand. Errors of the system pass
// through, with what to do about them.
var (
	// ErrConfig says that a Config is not usable.
	ErrConfig = errors.New("invalid mount configuration")
	// ErrNotDir says that a mount point is not a directory.
	ErrNotDir = errors.New("not a directory")
	// ErrMounted says that an image is mounted there already.
	ErrMounted = errors.New("an image is mounted there already")
	// ErrNotMounted says that no image is mounted there.
	ErrNotMounted = errors.New("no image is mounted there")
	// ErrBusy says that somebody uses the file system that was to be unmounted.
	ErrBusy = errors.New("the file system is in use")
)

const (
	// Subtype is the part of the type that is ours, in the table of mounts.
	Subtype = "puzzlefs"
	// FSType is the type of our mounts in the table of mounts.
	FSType = typePrefix + Subtype

	typePrefix = "fuse."
)

// Limits that the kernel is asked for.
const (
	// maxRead is the most that one READ asks for, in bytes; 1 MiB is the kernel's own limit
	// unless the machine's owner raised it.
	maxRead = 1 << 20
	// maxBackground is how many read-ahead requests are under way at once. The kernel's
	// default, 12, is soon used up by readers that wait for the network.
	maxBackground = 256
)

// maxSubtype is how long a subtype may be, in bytes: more than anybody needs.
const maxSubtype = 64

// Config says what to mount where.
type Config struct {
	// Image is what to serve.
	Image *image.Image
	// Dir is the mount point, an existing directory.
	Dir string
	// FSName is the source in the table of mounts; the image's digest if empty.
	FSName string
	// Subtype is what the type is in the table of mounts, behind "fuse."; [Subtype] if empty.
	// A mount with both a subtype and an FSName of its own cannot be told from other people's
	// any longer, and Unmount refuses it.
	Subtype string
	// AllowOther lets other users in when the mount is made by a user who is not root, which
	// needs user_allow_other in /etc/fuse.conf. Mounts made by root always let them in, unless
	// RootOnly is set, which only root may ask for.
	AllowOther, RootOnly bool
	// AutoUnmount has fusermount3 unmount what is left when this process ends in whatever way.
	AutoUnmount bool
	// ModTime is the access, modification and change time of every file, from 1970 on;
	// images store none. The zero Time means 1970.
	ModTime time.Time
	// Dev and Suid let device files and set-user-ID bits of the image work, which they do
	// not by default. NoExec keeps programs from being run. Only root may ask for Dev or Suid.
	Dev, Suid, NoExec bool
	// NoAtime keeps the kernel from updating access times, which it does not do anyhow.
	NoAtime bool
	// SELinux are options of the superblock, [SELinuxOptions] with a label each and without
	// quotes, as in "context=system_u:object_r:container_file_t:s0:c1,c2". A kernel without
	// SELinux refuses them. Only root may ask for them.
	SELinux []string
	// Logger is for reads that fail; slog.Default() if nil.
	Logger *slog.Logger
	// Debug logs every request and its answer at the debug level.
	Debug bool
}

func (c *Config) validate() error {
	switch {
	case c.Image == nil:
		return fmt.Errorf("no image to mount: %w", ErrConfig)
	case c.Dir == "":
		return fmt.Errorf("no directory to mount on: %w", ErrConfig)
	case strings.ContainsFunc(c.FSName, func(r rune) bool { return unicode.IsControl(r) || oddSpace(r) }):
		return fmt.Errorf("the source %q has control characters or odd white space: %w", c.FSName, ErrConfig)
	case strings.ContainsFunc(c.Dir, oddSpace):
		return fmt.Errorf("the directory %q has white space that nobody finds again in the table of mounts: %w", c.Dir, ErrConfig)
	case len(c.FSName) > unix.PathMax:
		return fmt.Errorf("the source has %d bytes, at most %d are possible: %w", len(c.FSName), unix.PathMax, ErrConfig)
	case strings.ContainsFunc(c.Subtype, func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) }):
		return fmt.Errorf("the subtype %q has control characters or white space: %w", c.Subtype, ErrConfig)
	case len(c.Subtype) > maxSubtype:
		return fmt.Errorf("the subtype has %d bytes, at most %d are possible: %w", len(c.Subtype), maxSubtype, ErrConfig)
	case c.AutoUnmount && len(c.SELinux) > 0:
		return fmt.Errorf("fusermount3, which unmounts automatically, takes no SELinux contexts: %w", ErrConfig)
	case !c.ModTime.IsZero() && c.ModTime.Unix() < 0:
		return fmt.Errorf("the time %v is before 1970: %w", c.ModTime, ErrConfig)
	}
	for _, o := range c.SELinux {
		if err := checkSELinux(o); err != nil {
			return err
		}
	}
	return nil
}

// oddSpace finds what the parser of the table of mounts takes for the end of a field and the
// kernel does not escape, as it does with spaces, tabs and newlines.
func oddSpace(r rune) bool { return unicode.IsSpace(r) && !strings.ContainsRune(" \t\n", r) }

// Server serves one image at one mount point. Its methods are safe for concurrent use.
type Server struct {
	dir    string // clean, absolute, without symlinks
	device mountinfo.Device
	done   chan struct{}
}

// Mount serves an image: read-only, nosuid and nodev unless cfg says otherwise, with mount(2)
// as root and with fusermount3 otherwise. The file system answers when Mount returns. It goes on until it
// is unmounted everywhere: from Dir, and from where it was bound to.
//
// It fails with ErrConfig, ErrNotDir, ErrMounted, fs.ErrNotExist, or what the system says.
// Nothing is mounted then, and nothing goes on running.
func Mount(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("mount image: %w", err)
	}
	if cfg.FSName == "" {
		cfg.FSName = cfg.Image.Digest().String()
	}
	if cfg.Subtype == "" {
		cfg.Subtype = Subtype
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	s, err := mount(&cfg)
	if err != nil {
		return nil, fmt.Errorf("mount image %s on %s: %w", cfg.Image.Digest(), cfg.Dir, err)
	}
	return s, nil
}

func mount(cfg *Config) (*Server, error) {
	acls := cfg.Image.HasXattrPrefix(aclPrefix)
	dir, err := mountPoint(cfg.Dir)
	if err != nil {
		return nil, err
	}
	conn, err := attach(dir, cfg)
	if err != nil {
		return nil, err
	}
	s := &Server{dir: dir, done: make(chan struct{})}
	if err := s.serve(conn, cfg, acls); err != nil {
		err = errors.Join(err, discard(dir))
		conn.release()
		return nil, err
	}
	if err := s.check(cfg); err != nil {
		if failed := discard(dir); failed != nil {
			return nil, errors.Join(err, failed)
		}
		// The server ends when nobody uses the mount any longer: nobody but us has seen it.
		<-s.done
		return nil, err
	}
	if err := raiseReadAhead(s.device); err != nil {
		cfg.Logger.Debug("large files are read slower than they could be", "image", cfg.Image.Digest().String(), "error", err)
	}
	s.forcePoll()
	return s, nil
}

// discard undoes a mount just made. That somebody else did so before is fine.
func discard(dir string) error {
	if err := detach(dir, true); err != nil && !errors.Is(err, ErrNotMounted) {
		return err
	}
	return nil
}

// serve begins to answer requests from a connection, which it takes over.
//
// READDIRPLUS always, not only where the kernel guesses that it helps: a cold ls -lR takes
// half the time. Not asked for is CAP_ASYNC_DIO: a direct read would wait in the kernel for
// all its parts, and could be neither interrupted nor killed while content does not come.
func (s *Server) serve(kernel *connection, cfg *Config, acls bool) error {
	failures := &failureLog{log: cfg.Logger, image: cfg.Image.Digest()}
	fs := newFilesystem(cfg.Image, cfg.ModTime, failures)
	conn, err := gofuse.NewServer(fs, fmt.Sprintf("/dev/fd/%d", kernel.fd), &gofuse.MountOptions{
		Name:          cfg.Subtype,
		FsName:        cfg.FSName,
		MaxBackground: maxBackground,
		MaxWrite:      maxRead, // there is no other way to say it
		// Our answers are in memory: going through a pipe would only cost.
		DisableSplice:            true,
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		EnableAcl:                acls,
		// Pods with user namespaces get volumes by ID-mapped mounts. Nothing here looks at
		// the caller's IDs, so there is nothing to map.
		IDMappedMount: true,
		// Nobody counts.
		RememberInodes: true,
		Debug:          cfg.Debug,
		Logger:         failures.library(cfg.Debug),
		PanicHandler:   func(v any) gofuse.Status { return failures.panicked(v, debug.Stack()) },
	})
	if err != nil {
		return fmt.Errorf("begin to serve: %w", err)
	}
	fs.beside.store = storeIn(conn)
	go func() {
		defer close(s.done)
		conn.Serve()
		kernel.release()
	}()
	return nil
}

// check makes sure that the mount is what it must be, and notes which one is ours.
func (s *Server) check(cfg *Config) error {
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return err
	}
	stack := table.At(s.dir)
	if len(stack) == 0 || stack[0].Type != typePrefix+cfg.Subtype {
		return errors.New("the table of mounts does not show the mount just made: is somebody unmounting it?")
	}
	if missing := missingOptions(&stack[0], cfg); len(missing) > 0 {
		return fmt.Errorf("the mount lacks %s, so it would be unsafe to use", strings.Join(missing, ", "))
	}
	s.device = stack[0].Device
	return nil
}

// Wait returns when the file system is served no longer, because it was unmounted by
// whomever. All of the server's goroutines have ended then.
func (s *Server) Wait() { <-s.done }

// Done is closed when Wait would return.
func (s *Server) Done() <-chan struct{} { return s.done }

// Dir returns the mount point, as the table of mounts shows it.
func (s *Server) Dir() string { return s.dir }

// Unmount takes the mount off its directory. It fails with ErrBusy if somebody has a file
// or a working directory there; Detach does not mind. That it is unmounted already is
// fine. The file system is served for as long as it is bound to other directories.
func (s *Server) Unmount() error { return s.unmount(false) }

// Detach takes the mount off its directory at once, as umount --lazy does: nobody finds it
// any longer, whoever uses it can go on, and the server ends when the last of them does.
func (s *Server) Detach() error { return s.unmount(true) }

func (s *Server) unmount(lazy bool) error {
	select {
	case <-s.done:
		return nil
	default:
	}
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", s.dir, err)
	}
	for i, m := range table.At(s.dir) {
		if m.Device != s.device {
			continue
		}
		if i > 0 {
			top := table.At(s.dir)[0]
			return fmt.Errorf("unmount %s: another file system (%s, type %s) lies on top: unmount that first", s.dir, top.Source, top.Type)
		}
		return detach(s.dir, lazy)
	}
	return nil
}
