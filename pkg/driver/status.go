package driver

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// Errors of this package. A client sees their gRPC codes, see codeOf.
var (
	// ErrInvalid says that a request can never succeed as it is.
	ErrInvalid = errors.New("invalid request")
	// ErrExists says that the target is published with other arguments.
	ErrExists = errors.New("already published differently")
	// ErrNotFound says that a volume, an image or a path in an image is not there.
	ErrNotFound = errors.New("not found")
	// ErrBusy says that another call, or the image's pull, is still at work: ask again.
	ErrBusy = errors.New("operation pending")
	// ErrUnavailable says that something needed is down for now: ask again.
	ErrUnavailable = errors.New("unavailable")
	// ErrNoRoom says that the store would exceed its quota, or the disk its reserve, and that
	// nothing more can be evicted.
	ErrNoRoom = errors.New("no room in the store")
	// ErrMismatch says that an image is not the one that the pod's digest names.
	ErrMismatch = errors.New("digest mismatch")
	// ErrDenied says that the node's policy does not allow an image.
	ErrDenied = errors.New("denied by the node's policy")
)

// errNoMemory says that there is no room for the metadata of one more image for now.
var errNoMemory = errors.New("no memory for metadata")

// errNoDigest is ErrInvalid for a volume without the digest that this node demands.
var errNoDigest = fmt.Errorf("%w", ErrInvalid)

// codeOf is the one place where errors become gRPC codes. Kubelet takes Canceled,
// DeadlineExceeded, Unavailable, ResourceExhausted and Aborted as "not final": it keeps the
// target and will call NodeUnpublishVolume. After any other code it may never come back, so
// those must leave nothing behind.
func codeOf(err error) codes.Code {
	is := func(targets ...error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
	switch {
	case err == nil:
		return codes.OK
	case is(ErrInvalid, registry.ErrInvalidReference):
		return codes.InvalidArgument
	case is(ErrExists):
		return codes.AlreadyExists
	case is(ErrBusy):
		return codes.Aborted
	case is(context.Canceled):
		return codes.Canceled
	case is(ErrNoRoom, syscall.ENOSPC, syscall.EDQUOT, errNoMemory):
		return codes.ResourceExhausted
	case is(registry.ErrUnauthorized):
		return codes.Unauthenticated
	case is(registry.ErrForbidden, ErrDenied):
		return codes.PermissionDenied
	case is(ErrMismatch, store.ErrDigestMismatch, format.ErrCorrupt):
		return codes.DataLoss
	case is(format.ErrNotPuzzleFS, format.ErrUnsupportedVersion, format.ErrTooLarge):
		// The image exists, but no retry makes it mountable: the pod names the wrong one.
		return codes.InvalidArgument
	case is(ErrNotFound, registry.ErrNotFound):
		return codes.NotFound
	case is(ErrUnavailable, registry.ErrUnavailable, registry.ErrRateLimited, registry.ErrUnexpectedAnswer, store.ErrLocked):
		return codes.Unavailable
	case is(context.DeadlineExceeded):
		return codes.DeadlineExceeded
	default:
		return codes.Internal
	}
}

// toStatus returns err as a gRPC status error with the code of codeOf and what was being done.
func toStatus(doing string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codeOf(err), fmt.Sprintf("%s: %v", doing, err))
}
