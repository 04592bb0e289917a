package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/tree"
	"golang.org/x/sys/unix"
)

func readFiles(c *call) error {
	duration := c.flags.Duration("for", 0, "how long to read, such as 30s (default: until SIGTERM or SIGINT)")
	fresh := c.flags.Bool("fresh", false, "drop the pages of a file before reading it, so that the file system is asked again; names and open files stay cached")
	against := c.flags.String("against", "", `a `+"`file`"+` with what the files should be, as "checker tree" describes them (default: what they are at the start)`)
	workers := c.flags.Int("workers", 2, "how many files to read at a time")
	interval := c.flags.Duration("interval", 5*time.Millisecond, "how long each worker rests after a file: pauses are not told more exactly")
	args, err := c.parse()
	if err != nil {
		return err
	}
	if *workers < 1 || *workers > 1024 {
		return usageError{fmt.Errorf("--workers is %d: want 1 to 1024", *workers)}
	}
	if *duration < 0 || *interval < 0 {
		return usageError{errors.New("--for and --interval: want a time that is not negative")}
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGUSR1)
	defer signal.Stop(signals)
	var end <-chan time.Time
	if *duration > 0 {
		end = time.After(*duration)
	}
	r := &reader{dir: args[0], fresh: *fresh, interval: *interval, tally: newTally(*workers)}
	enc := json.NewEncoder(c.stdout)
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()

	// Whatever touches the file system is done by others than this goroutine, which no file system
	// can keep from reporting. Where one hangs they are left behind, and end with the program.
	planned := make(chan error, 1)
	go func() { planned <- r.plan(*against) }()
	for {
		select {
		case err := <-planned:
			if err != nil {
				return err
			}
			planned = nil
			r.tally.start(len(r.files), r.unreadable)
			if err := enc.Encode(r.tally.summary("started")); err != nil {
				return err
			}
			for i := range *workers {
				go r.read(ctx, i, *workers)
			}
		case s := <-signals:
			if s != unix.SIGUSR1 {
				return r.end(enc)
			}
			if err := enc.Encode(r.tally.summary("reading")); err != nil {
				return err
			}
		case <-end:
			return r.end(enc)
		case <-c.ctx.Done():
			return r.end(enc)
		}
	}
}

// reader reads the files of a tree over and over.
type reader struct {
	dir        string
	fresh      bool
	interval   time.Duration
	tally      *tally
	files      []wanted
	unreadable int
}

// wanted is a file, and what it should hold.
type wanted struct {
	path   string
	size   int64
	sha256 string
}

// plan finds out what to read, and what it should be.
func (r *reader) plan(against string) error {
	var err error
	if against != "" {
		err = r.planFrom(against)
	} else {
		err = r.planFromFiles()
	}
	if err == nil && len(r.files) == 0 {
		err = fmt.Errorf("there is no file to read below %s", r.dir)
	}
	return err
}

// planFrom takes the files of a description.
func (r *reader) planFrom(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	t, err := tree.Parse(f)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, e := range t.Entries {
		if e.Type == testtree.File {
			r.files = append(r.files, wanted{filepath.Join(r.dir, e.Path), e.Size, e.SHA256})
		}
	}
	return nil
}

// planFromFiles reads every file that this user may read.
func (r *reader) planFromFiles() error {
	buf := make([]byte, readSize)
	return filepath.WalkDir(r.dir, func(path string, d os.DirEntry, err error) error {
		if errors.Is(err, os.ErrPermission) && path != r.dir {
			r.unreadable++
			return filepath.SkipDir
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		size, sum, err := hashFile(path, false, buf, func() {})
		if errors.Is(err, os.ErrPermission) {
			r.unreadable++
			return nil
		}
		r.files = append(r.files, wanted{path, size, sum})
		return err
	})
}

// read reads every file once and begins again: of several workers each begins elsewhere, so that
// they do not wait for the same file.
func (r *reader) read(ctx context.Context, worker, workers int) {
	buf := make([]byte, readSize)
	for i := worker * len(r.files) / workers; ctx.Err() == nil; i++ {
		f := r.files[i%len(r.files)]
		r.tally.begin(worker, f.path)
		size, sum, err := hashFile(f.path, r.fresh, buf, r.tally.progress)
		if err == nil && (size != f.size || sum != f.sha256) {
			err = errMismatch{fmt.Sprintf("%d bytes, SHA-256 %s; want %d, %s", size, sum, f.size, f.sha256)}
		}
		r.tally.done(worker, f.path, size, err)
		select {
		case <-ctx.Done():
		case <-time.After(r.interval):
		}
	}
}

// end prints what came of it all, and returns an error if there were errors.
func (r *reader) end(enc *json.Encoder) error {
	s := r.tally.summary("ended")
	if err := enc.Encode(s); err != nil {
		return err
	}
	total := 0
	for _, n := range s.Errors {
		total += n
	}
	switch {
	case s.Files == 0:
		return fmt.Errorf("ended before all files below %s had been read once", r.dir)
	case total > 0:
		return fmt.Errorf("%d of %d operations below %s failed; the first: %s", total, s.Operations, r.dir, s.FirstErrors[0].Error)
	case s.Operations == 0:
		return fmt.Errorf("no file below %s could be read to its end", r.dir)
	}
	return nil
}
