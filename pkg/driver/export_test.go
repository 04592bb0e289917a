package driver

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// Steps returns the labels of all steps, in order: of publish with its pull, then of unpublish.
func Steps() (publish, unpublish []string) {
	return []string{stepPullHeld, stepPullStored, stepPullTagged, stepPublishObtained, stepPublishBegun, stepPublishPinned, stepPublishMounted, stepPublishTarget, stepPublishBound, stepPublishCommitted},
		[]string{stepUnpublishRetired, stepUnpublishUnmounted, stepUnpublishRemoved, stepUnpublishDropped, stepUnpublishReleased}
}

// StepPullHeld is the label of the step before a pull looks which blobs are there.
const StepPullHeld = stepPullHeld

// StepPullStored is the label of the step after its blobs are there.
const StepPullStored = stepPullStored

// StepUnpublishEnded is the label of the step after unpublish, beside it, when its image's mount has ended.
const StepUnpublishEnded = stepUnpublishEnded

// StepRestore is the label of the step of mounting a volume again.
const StepRestore = stepRestoreOpened

// ParsePublish validates a request and returns what it pins and when it pulls.
func ParsePublish(req *csi.NodePublishVolumeRequest, requireDigest bool) (ref, verity, policy string, err error) {
	spec, err := parsePublish(req)
	if err == nil {
		err = (&Policy{RequireDigest: requireDigest}).checkPinned(spec)
	}
	if err != nil {
		return "", "", "", err
	}
	return spec.ref.String(), spec.verity.String(), string(spec.policy), nil
}

// MountName validates a request and returns the name of the directory of its shared mount.
func MountName(req *csi.NodePublishVolumeRequest) (string, error) {
	spec, err := parsePublish(req)
	if err != nil {
		return "", err
	}
	return mountKey{manifest: spec.ref.Digest, options: spec.options}.name(), nil
}

func CodeOf(err error) codes.Code                { return codeOf(err) }
func Bind(from, subPath, to string) error        { return bindFor(from, subPath, to, bindTree) }
func BindClassic(from, subPath, to string) error { return bindFor(from, subPath, to, bindClassic) }
func DetachAll(path string) error                { return detachAll(path) }
func HumanBytes(n int64) string                  { return humanBytes(n) }
func RemoveTarget(path string) error             { return target{given: path, real: path}.remove() }

func bindFor(from, subPath, to string, how func(source, parent *os.File, name string, flags mountFlags) error) error {
	source, err := openBeneath(context.Background(), from, subPath)
	if err != nil {
		return err
	}
	defer source.Close()
	t, err := resolveTarget(to)
	if err != nil {
		return err
	}
	parent, err := t.openParent()
	if err != nil {
		return err
	}
	defer parent.Close()
	return how(source, parent, filepath.Base(t.real), mountFlags{noexec: true})
}

// Pulls is the pull queue, for tests of its own.
type Pulls struct{ p *pulls }

func NewPulls() Pulls  { return Pulls{newPulls()} }
func (p Pulls) Close() { p.p.close() }

// Len is the number of pulls that run or are remembered.
func (p Pulls) Len() int {
	p.p.mu.Lock()
	defer p.p.mu.Unlock()
	return len(p.p.running)
}

func (p Pulls) Do(ctx context.Context, what, identity string, fn func(context.Context, func(string)) (format.Digest, error)) (format.Digest, error) {
	return p.p.do(ctx, pullKey{what: what, identity: identity, fetch: true}, fn)
}

// ReasonOf returns the reason of the event for a publish that failed with err.
func ReasonOf(err error) string { return string(reasonOf(err)) }

// Repeat is how often a slow pull is told of.
func Repeat(ctx context.Context, first time.Duration, f func()) { repeat(ctx, first, progressGap, f) }

// Bounded is how messages of events are cut.
func Bounded(text string) string { return bounded(text, maxEventMessage) }

// Sentence is how messages of events are made to read.
func Sentence(text string) string { return sentence(text) }

// ErrNoDigest is the error of a volume without the digest that is demanded.
var ErrNoDigest = errNoDigest

// ErrNoMemory is the error of an image whose metadata finds no room for now.
var ErrNoMemory = errNoMemory

// PullResult is the label that a pull gets which ended with err.
func PullResult(err error, fetched bool) string { return pullResult(err, fetched) }
