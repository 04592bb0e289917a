package driver

import (
	"errors"

	"google.golang.org/grpc/codes"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// eventReason is the reason of an event, a word that people search and scripts test for.
type eventReason string

// Reasons of warnings about a publish that failed.
const (
	// reasonDigestRefused: the image is not the one that the digest names, or no digest is named.
	reasonDigestRefused eventReason = "DigestRefused"
	// reasonImageCorrupt: what the registry has, or sends, is damaged.
	reasonImageCorrupt eventReason = "ImageCorrupt"
	// reasonImageNotFound: there is no such image, or no such directory in it.
	reasonImageNotFound eventReason = "ImageNotFound"
	// reasonImageUnusable: it is no PuzzleFS image, or one that this driver does not read.
	reasonImageUnusable eventReason = "ImageUnusable"
	// reasonImageTooLarge: the image has more than this driver, or this node, takes.
	reasonImageTooLarge eventReason = "ImageTooLarge"
	// reasonRegistryDenied: the registry wants other credentials.
	reasonRegistryDenied eventReason = "RegistryDenied"
	// reasonRegistryUnavailable: the registry cannot be reached, or fails.
	reasonRegistryUnavailable eventReason = "RegistryUnavailable"
	// reasonPolicyDenied: the node's administrator does not allow the image.
	reasonPolicyDenied eventReason = "PolicyDenied"
	// reasonStoreFull: there is no room on the node.
	reasonStoreFull eventReason = "StoreFull"
	// reasonMemoryFull: the images in use on the node leave no memory for this one's metadata.
	reasonMemoryFull eventReason = "MemoryFull"
	// reasonInvalidVolume: the pod's volume is not written as it has to be.
	reasonInvalidVolume eventReason = "InvalidVolume"
	// reasonPublishFailed: anything else.
	reasonPublishFailed eventReason = "PublishFailed"
)

// Reasons of other events.
const (
	// reasonPullSlow says how far a pull is that lasts long.
	reasonPullSlow eventReason = "PullSlow"
	// reasonImagePulled says that an image was fetched for this pod, and how long it took.
	reasonImagePulled eventReason = "ImagePulled"
	// reasonCorruptRead: content turned out to be corrupt while the pod was running.
	reasonCorruptRead eventReason = "CorruptRead"
)

// reasonOf is the one place where the error of a publish becomes the reason of an event. Those
// after which kubelet only has to ask again have none: "".
func reasonOf(err error) eventReason {
	for _, known := range []struct {
		err    error
		reason eventReason
	}{
		// First those that may be wrapped together with another of these.
		{ErrBusy, ""},
		{errNoDigest, reasonDigestRefused},
		{ErrMismatch, reasonDigestRefused},
		{format.ErrTooLarge, reasonImageTooLarge},
		{ErrDenied, reasonPolicyDenied},
		{errNoMemory, reasonMemoryFull},
		{store.ErrDigestMismatch, reasonImageCorrupt},
		{format.ErrCorrupt, reasonImageCorrupt},
		{format.ErrNotPuzzleFS, reasonImageUnusable},
		{format.ErrUnsupportedVersion, reasonImageUnusable},
		{registry.ErrUnavailable, reasonRegistryUnavailable},
		{registry.ErrRateLimited, reasonRegistryUnavailable},
		{registry.ErrUnexpectedAnswer, reasonRegistryUnavailable},
	} {
		if errors.Is(err, known.err) {
			return known.reason
		}
	}
	switch codeOf(err) {
	case codes.OK, codes.Canceled:
		return ""
	case codes.InvalidArgument:
		return reasonInvalidVolume
	case codes.NotFound:
		return reasonImageNotFound
	case codes.Unauthenticated, codes.PermissionDenied:
		return reasonRegistryDenied
	case codes.ResourceExhausted:
		return reasonStoreFull
	default:
		return reasonPublishFailed
	}
}
