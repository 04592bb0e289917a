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
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
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

// intercept gives each call an id, turns panics into errors, gives errors their gRPC codes,
// logs and counts each call once, and tells the pod when its volume cannot be published. It
// logs no request as a whole: they hold secrets.
func (d *Driver) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	begin := time.Now()
	c := &call{id: d.requests.next()}
	log := d.log.With("method", info.FullMethod)
	if r, ok := req.(interface{ GetVolumeId() string }); ok {
		log = log.With("volume", r.GetVolumeId())
	}
	if r, ok := req.(interface{ GetTargetPath() string }); ok {
		log = log.With("target", r.GetTargetPath())
	}
	if r, ok := req.(*csi.NodePublishVolumeRequest); ok {
		c.pod = podOf(r)
		log = log.With("image", r.GetVolumeContext()[attrImage]).With(c.pod.attrs()...)
	}
	ctx = withCall(ctx, c)
	defer func() {
		if r := recover(); r != nil {
			// Nothing was undone, so kubelet has to come back.
			err = fmt.Errorf("panic: %v: %w", r, ErrUnavailable)
			log = log.With("stack", string(debug.Stack()))
		}
		took := time.Since(begin)
		answer := toStatus(filepath.Base(info.FullMethod), err)
		d.metrics.operation(info.FullMethod, answer, took)
		if err == nil {
			logDone(ctx, log, req, c, took)
			return
		}
		level := slog.LevelError
		if status.Code(answer) == codes.Aborted {
			level = slog.LevelInfo // kubelet asks again, as it should
		}
		log.Log(ctx, level, "call failed", "code", status.Code(answer).String(), "error", err, "took", took)
		if reason := reasonOf(err); reason != "" {
			// The pod's author knows no method of CSI.
			message := strings.TrimPrefix(status.Convert(answer).Message(), filepath.Base(info.FullMethod)+": ")
			d.events.tell(c.pod, corev1.EventTypeWarning, reason, message)
		}
		resp, err = nil, answer
	}()
	return handle(ctx, req)
}

// logDone logs a call that succeeded: at info level where a volume came or went.
func logDone(ctx context.Context, log *slog.Logger, req any, c *call, took time.Duration) {
	switch req.(type) {
	case *csi.NodePublishVolumeRequest:
		if !c.repeated.Load() {
			log.InfoContext(ctx, "published a volume", "took", took, "cached", !c.fetched.Load())
			return
		}
	case *csi.NodeUnpublishVolumeRequest:
		log.InfoContext(ctx, "unpublished a volume", "took", took)
		return
	}
	log.DebugContext(ctx, "call done", "took", took)
}
