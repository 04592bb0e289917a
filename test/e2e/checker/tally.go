package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// readSize is how much is read at a time.
	readSize = 256 << 10
	// mostErrors is how many errors are told in full. All are counted.
	mostErrors = 10
	// stuckAfter is how long a read takes that is said to hang.
	stuckAfter = 5 * time.Second
)

// summary is what a reader says of itself, in one line of JSON.
type summary struct {
	// State is "started", "reading" or "ended".
	State string `json:"state"`
	// Files is how many are read; 0 until all have been read once. Unreadable are those files and
	// directories that this user may not read.
	Files      int `json:"files"`
	Unreadable int `json:"unreadable"`
	// Operations are files read to their end or to an error: open, read, compare, close.
	Operations int64 `json:"operations"`
	Bytes      int64 `json:"bytes"`
	// Errors counts failed operations by the name of their error; MISMATCH stands for other
	// contents. ENOTCONN and EIO are always there.
	Errors map[string]int `json:"errors"`
	// LongestPauseMillis is the longest time in which no bytes could be read and no file to its end,
	// be it over or not.
	LongestPauseMillis int64 `json:"longestPauseMillis"`
	// Stuck are files that have been being read for more than five seconds.
	Stuck []string `json:"stuck"`
	// FirstErrors are the first ten.
	FirstErrors   []failure `json:"firstErrors"`
	ElapsedMillis int64     `json:"elapsedMillis"`
}

// failure is an operation that failed.
type failure struct {
	At    time.Time `json:"at"`
	Path  string    `json:"path"`
	Error string    `json:"error"`
}

// errMismatch is a file with other contents than it had.
type errMismatch struct{ text string }

func (e errMismatch) Error() string { return "its content changed: " + e.text }

// current is what a worker is doing.
type current struct {
	path  string // "" between files
	since time.Time
}

// tally counts what workers do. Its methods never wait for a file system.
type tally struct {
	mu           sync.Mutex // guards all below
	began        time.Time
	lastSuccess  time.Time
	longestPause time.Duration
	counts       summary
	workers      []current
}

func newTally(workers int) *tally {
	now := time.Now()
	return &tally{
		began: now, lastSuccess: now, workers: make([]current, workers),
		counts: summary{Errors: map[string]int{"ENOTCONN": 0, "EIO": 0}, Stuck: []string{}, FirstErrors: []failure{}},
	}
}

// start begins the count: what was before it is no pause.
func (t *tally) start(files, unreadable int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.Files, t.counts.Unreadable = files, unreadable
	t.began = time.Now()
	t.lastSuccess = t.began
}

// begin says that a worker begins to read a file.
func (t *tally) begin(worker int, path string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.workers[worker] = current{path, time.Now()}
}

// done says that it has, with what came of it.
func (t *tally) done(worker int, path string, size int64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.workers[worker] = current{}
	t.counts.Operations++
	t.counts.Bytes += size
	if err == nil {
		t.success(now)
		return
	}
	name := "MISMATCH"
	if !errors.As(err, new(errMismatch)) {
		name = errorName(err)
	}
	t.counts.Errors[name]++
	if len(t.counts.FirstErrors) < mostErrors {
		t.counts.FirstErrors = append(t.counts.FirstErrors, failure{now.UTC(), path, err.Error()})
	}
}

// progress says that a part of a file could be read.
func (t *tally) progress() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.success(time.Now())
}

// success ends a pause. The caller holds mu.
func (t *tally) success(now time.Time) {
	t.longestPause = max(t.longestPause, now.Sub(t.lastSuccess))
	t.lastSuccess = now
}

// summary returns the counts as they are now.
func (t *tally) summary(state string) summary {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	s := t.counts
	s.State = state
	s.Errors = make(map[string]int)
	for name, n := range t.counts.Errors {
		s.Errors[name] = n
	}
	s.FirstErrors = slices.Clone(t.counts.FirstErrors)
	s.Stuck = []string{}
	for _, w := range t.workers {
		if w.path != "" && now.Sub(w.since) > stuckAfter {
			s.Stuck = append(s.Stuck, w.path)
		}
	}
	s.LongestPauseMillis = max(t.longestPause, now.Sub(t.lastSuccess)).Milliseconds()
	s.ElapsedMillis = now.Sub(t.began).Milliseconds()
	return s
}

// hashFile reads a file to its end, and calls progress for each part. With fresh, pages of it that
// nobody else uses leave the cache first.
func hashFile(path string, fresh bool, buf []byte, progress func()) (size int64, sum string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	if fresh {
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			return 0, "", &os.PathError{Op: "fadvise", Path: path, Err: err}
		}
	}
	h := sha256.New()
	for {
		n, err := f.Read(buf)
		h.Write(buf[:n])
		size += int64(n)
		if errors.Is(err, io.EOF) {
			return size, hex.EncodeToString(h.Sum(nil)), nil
		}
		if err != nil {
			return size, "", err
		}
		progress()
	}
}
