package fuse

import (
	"context"
	"fmt"
	"log"
	"log/slog"
	"strings"
	"sync"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// How many lines a server logs: so many at once, and one more each interval. Whoever can
// read a broken file can make it fail as often as they like.
const (
	logBurst    = 20
	logInterval = 3 * time.Second
)

// failureLog writes a line for what went wrong, and drops lines when there are too many.
type failureLog struct {
	log     *slog.Logger
	image   format.Digest
	limiter limiter
}

// readFailed logs a read that is answered EIO. Offset and length are in bytes.
func (l *failureLog) readFailed(ino, offset uint64, length int, err error) {
	l.write(slog.LevelError, "cannot read from an image, the reader gets EIO",
		slog.Uint64("ino", ino), slog.Uint64("offset", offset), slog.Int("length", length), slog.Any("error", err))
}

// panicked logs a panic that answered a request, and is what the caller gets.
func (l *failureLog) panicked(v any, stack []byte) gofuse.Status {
	l.write(slog.LevelError, "panic while answering a request, the caller gets EIO",
		slog.String("panic", fmt.Sprint(v)), slog.String("stack", string(stack)))
	return gofuse.EIO
}

func (l *failureLog) write(level slog.Level, msg string, attrs ...slog.Attr) {
	dropped, ok := l.limiter.allow(time.Now())
	if !ok {
		return
	}
	attrs = append(attrs, slog.String("image", l.image.String()))
	if dropped > 0 {
		attrs = append(attrs, slog.Int("dropped", dropped))
	}
	l.log.LogAttrs(context.Background(), level, msg, attrs...)
}

// library returns the logger for the FUSE library: its complaints, or in debug mode a line
// for each request, all of them.
func (l *failureLog) library(debug bool) *log.Logger {
	return log.New(libraryLog{l, debug}, "", 0)
}

// libraryLog takes the lines of the library.
type libraryLog struct {
	*failureLog
	debug bool
}

// Write takes one line. It never fails.
func (l libraryLog) Write(line []byte) (int, error) {
	text := slog.String("message", strings.TrimRight(string(line), "\n"))
	if l.debug {
		l.log.LogAttrs(context.Background(), slog.LevelDebug, "fuse", text)
	} else {
		l.write(slog.LevelWarn, "message of the FUSE library", text)
	}
	return len(line), nil
}

// limiter lets logBurst events pass, and one more each logInterval. Its zero value is
// ready, and safe for concurrent use.
type limiter struct {
	mu      sync.Mutex // guards what follows
	spent   time.Time  // when all that passed will have been paid for
	dropped int
}

// allow reports whether an event may pass, and if so how many did not since the last one.
func (l *limiter) allow(now time.Time) (dropped int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.spent.Before(now) {
		l.spent = now
	}
	if l.spent.Sub(now) > (logBurst-1)*logInterval {
		l.dropped++
		return 0, false
	}
	l.spent = l.spent.Add(logInterval)
	dropped, l.dropped = l.dropped, 0
	return dropped, true
}
