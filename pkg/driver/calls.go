package driver

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"strconv"
	"sync/atomic"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// What kubelet adds to the attributes of a volume where the CSIDriver object says
// podInfoOnMount.
const (
	attrPodName      = kubeletPrefix + "pod.name"
	attrPodNamespace = kubeletPrefix + "pod.namespace"
	attrPodUID       = kubeletPrefix + "pod.uid"
)

// pod says which pod a volume is for. The zero value is none: the CSIDriver object does not
// ask for it, or there is no kubelet.
type pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// podOf returns the pod that a request is for.
func podOf(req *csi.NodePublishVolumeRequest) pod {
	vc := req.GetVolumeContext()
	return pod{Namespace: vc[attrPodNamespace], Name: vc[attrPodName], UID: vc[attrPodUID]}
}

// attrs are what a log line says about the pod, nothing where it is not known.
func (p pod) attrs() []any {
	if p.Name == "" {
		return nil
	}
	return []any{"pod", p.Namespace + "/" + p.Name, "podUID", p.UID}
}

// call is one call of kubelet's, as the work done for it sees it.
type call struct {
	// id is unique among all calls of all drivers, restarted ones included.
	id  string
	pod pod
	// fetched is set when the call began or waited for a pull that fetched something.
	fetched atomic.Bool
	// repeated is set when there was nothing to do.
	repeated atomic.Bool
}

// callKey is the key of the *call in a context.
type callKey struct{}

func withCall(ctx context.Context, c *call) context.Context {
	return context.WithValue(ctx, callKey{}, c)
}

// callOf returns the call that ctx belongs to, or an empty one for work of the driver's own.
func callOf(ctx context.Context) *call {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c
	}
	return new(call)
}

// requestIDs makes ids for calls: eight digits that are this process's, and a number.
type requestIDs struct {
	boot string
	last atomic.Uint64
}

func newRequestIDs() *requestIDs {
	b := make([]byte, 4)
	_, _ = rand.Read(b) // never fails
	return &requestIDs{boot: hex.EncodeToString(b)}
}

func (r *requestIDs) next() string {
	return r.boot + "-" + strconv.FormatUint(r.last.Add(1), 10)
}

// callHandler adds the request id to each line that is logged with the context of a call, be
// it in the call itself, in the pull that it began, or in a package that knows no calls.
type callHandler struct{ slog.Handler }

// Handle implements slog.Handler.
func (h callHandler) Handle(ctx context.Context, r slog.Record) error {
	if id := callOf(ctx).id; id != "" {
		r = r.Clone()
		r.AddAttrs(slog.String("request", id))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h callHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return callHandler{h.Handler.WithAttrs(attrs)}
}

// WithGroup implements slog.Handler.
func (h callHandler) WithGroup(name string) slog.Handler {
	return callHandler{h.Handler.WithGroup(name)}
}
