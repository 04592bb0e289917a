package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientrecord "k8s.io/client-go/tools/record"
	recordutil "k8s.io/client-go/tools/record/util"
)

const (
	// eventComponent is what events name as their source, with the node's name as its host.
	eventComponent = "csi-puzzlefs"
	// maxEventMessage is how many bytes of a message the API server takes.
	maxEventMessage = 1024
	// eventQueue is how many events wait to be sent before further ones are dropped.
	eventQueue = 256
	// eventTimeout bounds one request to the API server.
	eventTimeout = 10 * time.Second
	// eventAttempts is how often an event is sent that does not reach the API server, with
	// eventPause, doubled each time, in between.
	eventAttempts = 3
	eventPause    = time.Second
	// eventFlush is how long the end of the driver waits for events that are still to be sent.
	eventFlush = 3 * time.Second
)

// events tells pods what happens to their volumes. It sends core/v1 events, which kubectl
// describe shows and kubelet itself writes, and which client-go has aggregation and limits
// for; those of events.k8s.io are the same objects to the API server, but their recorder has
// neither. The queue is our own, because client-go's drops without saying so and cannot be
// emptied at the end.
//
// Methods may be called on nil, which tells nobody.
type events struct {
	api        rest.Interface
	http       *http.Client
	source     corev1.EventSource
	correlator *clientrecord.EventCorrelator
	metrics    *metrics
	log        *slog.Logger

	queue    chan *corev1.Event
	stop     chan struct{} // closed to send what is queued and end
	stopped  atomic.Bool
	done     chan struct{} // closed when run has ended
	cancel   context.CancelFunc
	troubled bool // of run alone: the last event could not be sent
}

// newEvents returns where events go, or nil where there is no API server to send them to,
// having said so. A kubeconfig that cannot be used is an error.
func newEvents(cfg Config, m *metrics, log *slog.Logger) (*events, error) {
	if !cfg.PodEvents {
		return nil, nil
	}
	var to *rest.Config
	var err error
	if cfg.Kubeconfig == "" {
		if to, err = rest.InClusterConfig(); err != nil {
			log.Info("pods get no events: this is not a pod with a service account, and no kubeconfig is given", "error", err)
			return nil, nil // off, and said so
		}
	} else if to, err = clientcmd.BuildConfigFromFlags("", cfg.Kubeconfig); err != nil {
		return nil, fmt.Errorf("read kubeconfig %s: %w", cfg.Kubeconfig, err)
	}
	to.UserAgent = eventComponent + "/" + cfg.Version
	to.Timeout = eventTimeout
	to.QPS = -1 // one after the other, and limited per pod
	to.WarningHandler = rest.NoWarnings{}
	client, err := rest.HTTPClientFor(to)
	if err != nil {
		return nil, fmt.Errorf("configure Kubernetes client: %w", err)
	}
	// The typed clients of client-go know every API of Kubernetes, which makes a program half as
	// large again. This one knows events, and what answers them.
	scheme := runtime.NewScheme()
	scheme.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.Event{})
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	to.APIPath, to.GroupVersion = "/api", &corev1.SchemeGroupVersion
	to.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	api, err := rest.RESTClientForConfigAndClient(to, client)
	if err != nil {
		return nil, fmt.Errorf("configure Kubernetes client: %w", err)
	}
	return &events{
		api: api, http: client,
		source: corev1.EventSource{Component: eventComponent, Host: cfg.NodeID},
		correlator: clientrecord.NewEventCorrelatorWithOptions(clientrecord.CorrelatorOptions{
			// Each reason has a budget of its own: what is told often must not use up what
			// is told once.
			SpamKeyFunc: func(e *corev1.Event) string {
				return strings.Join([]string{e.InvolvedObject.Namespace, e.InvolvedObject.Name, string(e.InvolvedObject.UID), e.Reason}, "/")
			},
		}),
		metrics: m, log: log,
		queue: make(chan *corev1.Event, eventQueue),
		stop:  make(chan struct{}),
		done:  make(chan struct{}),
	}, nil
}

// tell queues an event for p. It never waits: what does not fit into the queue is counted.
// Without a pod there is nobody to tell.
func (e *events) tell(p pod, eventType string, reason eventReason, message string) {
	if e == nil || p.Name == "" || p.Namespace == "" || p.UID == "" {
		return
	}
	now := metav1.Now()
	event := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: recordutil.GenerateEventName(p.Name, now.UnixNano()), Namespace: p.Namespace},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID),
		},
		Type: eventType, Reason: string(reason), Message: bounded(sentence(message), maxEventMessage),
		Source: e.source, ReportingController: e.source.Component, ReportingInstance: e.source.Host,
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}
	if !e.stopped.Load() {
		select {
		case e.queue <- event:
			return
		default:
		}
	}
	e.metrics.events.WithLabelValues(eventDropped).Inc()
}

// sentence makes a sentence of what errors and progress say: people read events one below the other,
// among those of kubelet.
func sentence(text string) string {
	first, size := utf8.DecodeRuneInString(text)
	if size == 0 {
		return ""
	}
	text = string(unicode.ToUpper(first)) + text[size:]
	if !strings.HasSuffix(text, ".") {
		text += "."
	}
	return text
}

// bounded cuts text to at most limit bytes.
func bounded(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	const more = "…"
	return strings.ToValidUTF8(text[:limit-len(more)], "") + more
}

// start begins to send. It ends with close.
func (e *events) start() {
	if e == nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	e.cancel = cancel
	go e.run(ctx)
}

// close sends what is queued, for at most eventFlush, and ends.
func (e *events) close() {
	if e == nil {
		return
	}
	e.stopped.Store(true)
	close(e.stop)
	timer := time.AfterFunc(eventFlush, e.cancel)
	defer timer.Stop()
	<-e.done
	e.cancel()
	utilnet.CloseIdleConnectionsFor(e.http.Transport)
}

func (e *events) run(ctx context.Context) {
	defer close(e.done)
	for {
		select {
		case event := <-e.queue:
			e.send(ctx, event)
			continue
		case <-e.stop:
		}
		for {
			select {
			case event := <-e.queue:
				e.send(ctx, event)
			default:
				return
			}
		}
	}
}

// send sends one event, or adds it to one like it that was sent before, unless the pod had
// too many of its kind.
func (e *events) send(ctx context.Context, event *corev1.Event) {
	result, err := e.correlator.EventCorrelate(event)
	if err == nil && result.Skip {
		e.metrics.events.WithLabelValues(eventLimited).Inc()
		return
	}
	if err == nil {
		err = e.write(ctx, result)
	}
	if err == nil {
		e.metrics.events.WithLabelValues(eventSent).Inc()
		if e.troubled {
			e.log.Info("events reach the API server again")
		}
	} else {
		e.metrics.events.WithLabelValues(eventFailed).Inc()
		if !e.troubled {
			e.log.Warn("cannot send an event for a pod; further ones that fail are only counted", "pod", event.Namespace+"/"+event.InvolvedObject.Name, "reason", event.Reason, "error", err)
		}
	}
	e.troubled = err != nil
}

// write makes or changes an event object. It tries again where the API server does not
// answer; what it refuses stays refused.
func (e *events) write(ctx context.Context, result *clientrecord.EventCorrelateResult) error {
	pause := eventPause
	for attempt := 1; ; attempt++ {
		written, err := e.writeOnce(ctx, result)
		if err == nil {
			e.correlator.UpdateState(written)
			return nil
		}
		var refused *apierrors.StatusError
		if errors.As(err, &refused) || attempt == eventAttempts {
			return err
		}
		select {
		case <-time.After(pause):
			pause *= 2
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (e *events) writeOnce(ctx context.Context, result *clientrecord.EventCorrelateResult) (*corev1.Event, error) {
	event, written := result.Event, new(corev1.Event)
	if event.Count > 1 {
		err := e.api.Patch(types.StrategicMergePatchType).Namespace(event.Namespace).Resource("events").Name(event.Name).
			Body(result.Patch).Do(ctx).Into(written)
		if !apierrors.IsNotFound(err) {
			return written, err
		}
		// It is older than the API server keeps events.
	}
	event.ResourceVersion = ""
	err := e.api.Post().Namespace(event.Namespace).Resource("events").Body(event).Do(ctx).Into(written)
	return written, err
}
