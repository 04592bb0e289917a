package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// parseEndpoint returns the path of unix:///path.
func parseEndpoint(endpoint string) (string, error) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "unix" || u.Host != "" || !filepath.IsAbs(u.Path) || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("read endpoint %q: want unix:/// and an absolute path, as in unix:///run/csi/csi.sock", endpoint)
	}
	return u.Path, nil
}

// listen listens on a unix socket that only our own user may use. A socket that a dead
// process left is replaced; one that somebody listens on is not. The parent directory is
// made if there is none. Closing the listener removes the socket.
func listen(path string) (net.Listener, error) {
	if most := len(unix.RawSockaddrUnix{}.Path) - 1; len(path) > most {
		return nil, fmt.Errorf("listen on %s: Linux takes %d bytes for the path of a socket, this is %d; choose a shorter one", path, most, len(path))
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := removeStaleSocket(path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close())
	}
	return l, nil
}

func removeStaleSocket(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return errors.New("there is something that is not a socket; remove it, or choose another path")
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		return errors.Join(errors.New("another process listens there; stop it first"), conn.Close())
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("find out whether somebody listens there: %w", err)
	}
	return os.Remove(path)
}

// interceptor gives each call a number, turns panics into errors, logs each failed call
// once, and gives errors their gRPC codes. It logs no request as a whole: they hold secrets.
func interceptor(log *slog.Logger) grpc.UnaryServerInterceptor {
	var last atomic.Uint64
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
		begin := time.Now()
		log := log.With("request", last.Add(1), "method", info.FullMethod)
		if r, ok := req.(interface{ GetVolumeId() string }); ok {
			log = log.With("volume", r.GetVolumeId())
		}
		if r, ok := req.(interface{ GetTargetPath() string }); ok {
			log = log.With("target", r.GetTargetPath())
		}
		defer func() {
			if r := recover(); r != nil {
				// Nothing was undone, so kubelet has to come back.
				resp, err = nil, fmt.Errorf("panic: %v: %w", r, ErrUnavailable)
				log = log.With("stack", string(debug.Stack()))
			}
			took := time.Since(begin)
			if err != nil {
				answer := toStatus(filepath.Base(info.FullMethod), err)
				level := slog.LevelError
				if status.Code(answer) == codes.Aborted {
					level = slog.LevelInfo // kubelet asks again, as it should
				}
				log.Log(ctx, level, "call failed", "code", status.Code(answer).String(), "error", err, "took", took)
				resp, err = nil, answer
				return
			}
			log.Debug("call done", "took", took)
		}()
		return handle(ctx, req)
	}
}
