package fuse

import (
	"log/slog"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// How much the log takes.
const (
	LogBurst    = logBurst
	LogInterval = logInterval
	Forever     = forever
)

// NewFilesystem returns what answers the kernel's requests, without a kernel.
func NewFilesystem(img *image.Image, log *slog.Logger) gofuse.RawFileSystem {
	return newFilesystem(img, time.Time{}, &failureLog{log: log, image: img.Digest()})
}

// Limiter is what bounds the log.
type Limiter struct{ l limiter }

// Allow is limiter.allow.
func (l *Limiter) Allow(now time.Time) (int, bool) { return l.l.allow(now) }

// Discard is what Mount does when it fails late.
func Discard(dir string) error { return discard(dir) }

// EncodeDevice is how device numbers are sent.
func EncodeDevice(major, minor uint32) uint32 { return encodeDevice(major, minor) }

// QuoteSELinux is how an option is given to the kernel.
func QuoteSELinux(option string) string { return quoteSELinux(option) }
