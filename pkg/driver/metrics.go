package driver

import (
	"context"
	"errors"
	"iter"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// Where a digest was found not to be what it should be, the values of the label where.
const (
	// verifyPull: a registry or a mirror sent other bytes than it was asked for.
	verifyPull = "pull"
	// verifyManifest: the registry's image is not the one that the pod's digest names.
	verifyManifest = "manifest"
	// verifyRead: a blob in the store was not what was stored.
	verifyRead = "read"
)

// What became of a pull, the values of the label result.
const (
	pullFetched     = "fetched"
	pullPresent     = "present"
	pullRefused     = "refused"
	pullCorrupt     = "corrupt"
	pullNotFound    = "not_found"
	pullDenied      = "denied"
	pullUnavailable = "unavailable"
	pullNoSpace     = "no_space"
	pullCanceled    = "canceled"
	pullFailed      = "error"
)

// What became of an event for a pod, the values of the label result.
const (
	eventSent    = "sent"
	eventLimited = "limited"
	eventFailed  = "failed"
	eventDropped = "dropped"
)

// metrics are what the driver counts, on a registry of its own. docs/metrics.md explains
// them one by one. No label names an image or a pod: their number has no bound.
type metrics struct {
	registry *prometheus.Registry

	operations     *prometheus.HistogramVec
	pulls          *prometheus.CounterVec
	pullSeconds    prometheus.Histogram
	pullsInFlight  prometheus.Gauge
	fetched        *prometheus.CounterVec
	verifyFailures *prometheus.CounterVec
	readBytes      prometheus.Counter
	restores       *prometheus.CounterVec
	events         *prometheus.CounterVec
	registered     prometheus.Gauge
}

// newMetrics makes the metrics. Those with labels of few values show all of these from the
// start, so that the first failure is an increase and not a new series.
func newMetrics(version string) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		operations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			// Name, labels, buckets and help as other CSI drivers have them, for dashboards' sake.
			Name: "csi_plugin_operations_seconds",
			Help: "Container Storage Interface operation duration with gRPC error code status total",
			Buckets: []float64{
				// Volumes of images that are on the node take milliseconds.
				.005, .01, .025, .05,
				.1, .25, .5, 1, 2.5, 5, 10, 15, 25, 50, 120, 300, 600,
			},
		}, []string{"driver_name", "method_name", "grpc_status_code"}),
		pulls: counters("puzzlefs_pulls_total", "Pulls that ended, by what became of them.", "result",
			pullFetched, pullPresent, pullRefused, pullCorrupt, pullNotFound, pullDenied, pullUnavailable, pullNoSpace, pullCanceled, pullFailed),
		pullSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "puzzlefs_pull_duration_seconds",
			Help:    "Duration of pulls that fetched something and succeeded.",
			Buckets: []float64{.1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800},
		}),
		pullsInFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "puzzlefs_pulls_in_flight", Help: "Pulls that are running.",
		}),
		fetched: counters("puzzlefs_fetched_bytes_total", "Bytes of blobs that came over the network, retries included.", "source",
			"registry", "mirror"),
		verifyFailures: counters("puzzlefs_verify_failures_total", "Bytes that did not have the digest they should have, by where it was noticed.", "where",
			verifyPull, verifyManifest, verifyRead),
		readBytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "puzzlefs_store_read_bytes_total", Help: "Bytes that mounted images read from the store and verified.",
		}),
		restores: counters("puzzlefs_restores_total", "Volumes of an earlier driver that this one was to mount again when it started.", "result",
			"mounted", "failed"),
		events: counters("puzzlefs_pod_events_total", "Events for pods, by what became of them.", "result",
			eventSent, eventLimited, eventFailed, eventDropped),
		registered: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "puzzlefs_kubelet_registered", Help: "1 if kubelet has said that it registered the driver.",
		}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "puzzlefs_build_info", Help: "Always 1; the labels say what is running.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	build.Set(1)
	m.registry.MustRegister(
		m.operations, m.pulls, m.pullSeconds, m.pullsInFlight, m.fetched, m.verifyFailures, m.readBytes, m.restores,
		m.events, m.registered, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return m
}

// counters makes a counter with one label and all values that it has.
func counters(name, help, label string, values ...string) *prometheus.CounterVec {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
	for _, value := range values {
		v.WithLabelValues(value)
	}
	return v
}

// watch adds the gauges that look at d whenever they are asked. They take the locks of the
// tables of volumes and mounts, which nobody holds while working on a volume or a mount.
func (m *metrics) watch(d *Driver) {
	gauge := func(name, help string, labels prometheus.Labels, read func() int) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, func() float64 {
			if !d.opened.Load() {
				return 0
			}
			return float64(read())
		}))
	}
	for state, pending := range map[string]bool{"published": false, "pending": true} {
		gauge("puzzlefs_volumes", "Volumes on this node; pending ones are half published or half unpublished.",
			prometheus.Labels{"state": state}, func() int { return d.volumes.count(pending) })
	}
	gauge("puzzlefs_mounts", "Mounts in use, one for each image and its options, for all their volumes.", nil, func() int { return d.mounts.count() })
	gauge("puzzlefs_metadata_memory_bytes", "What the metadata of mounted images takes.", nil, func() int { return int(d.mounts.memory.usage()) })
	gauge("puzzlefs_metadata_memory_limit_bytes", "What it may take.", nil, func() int { return int(d.mounts.memory.limit) })
	gauge("puzzlefs_cache_bytes", "Content of images that is kept decoded in memory.", nil, func() int { return int(d.images.cache.Stats().Bytes) })
	gauge("puzzlefs_cache_limit_bytes", "What of it may be kept.", nil, func() int { return int(d.images.cache.Stats().Limit) })
	counter := func(name, help string, read func() int64) {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 {
			if !d.opened.Load() {
				return 0
			}
			return float64(read())
		}))
	}
	counter("puzzlefs_cache_hits_total", "Pieces of content that were in the cache.", func() int64 { return d.images.cache.Stats().Hits })
	counter("puzzlefs_cache_loads_total", "Pieces of content that were not, and were read from the store.", func() int64 { return d.images.cache.Stats().Loads })
	m.registry.MustRegister(storeCollector{d})
	gauge("puzzlefs_ready", "1 if the driver is ready, as /readyz and the CSI Probe say.", nil, func() int {
		if d.ready.Load() {
			return 1
		}
		return 0
	})
}

// storeCollector shows what is known of the store. It asks the disk for its free space, and for
// nothing else.
type storeCollector struct{ d *Driver }

var _ prometheus.Collector = storeCollector{}

// Describe implements prometheus.Collector.
func (c storeCollector) Describe(ch chan<- *prometheus.Desc) {
	for m := range c.of(storeUsage{}, true) {
		ch <- m.Desc()
	}
}

// Collect implements prometheus.Collector.
func (c storeCollector) Collect(ch chan<- prometheus.Metric) {
	var u storeUsage
	var err error
	if c.d.opened.Load() {
		u, err = c.d.space.usage()
	}
	if err != nil {
		c.d.log.Warn("cannot ask the disk of the store for its free space", "error", err)
	}
	for m := range c.of(u, err == nil) {
		ch <- m
	}
}

// of yields u as metrics; disk says that it is known what the disk has.
func (storeCollector) of(u storeUsage, disk bool) iter.Seq[prometheus.Metric] {
	return func(yield func(prometheus.Metric) bool) {
		for _, m := range []struct {
			name, help string
			kind       prometheus.ValueType
			value      int64
			known      bool
		}{
			{"puzzlefs_store_bytes", "What blobs take up on the disk.", prometheus.GaugeValue, u.bytes, true},
			{"puzzlefs_store_pinned_bytes", "What blobs of mounted and pinned images take up.", prometheus.GaugeValue, u.pinned, true},
			{"puzzlefs_store_quota_bytes", "What blobs may take up, 0 for any number.", prometheus.GaugeValue, u.quota, true},
			{"puzzlefs_store_disk_free_bytes", "What the disk of the store has free.", prometheus.GaugeValue, u.free, disk},
			{"puzzlefs_store_disk_reserve_bytes", "What of the disk is to stay free.", prometheus.GaugeValue, u.reserve, disk},
			{"puzzlefs_store_evicted_images_total", "Images that were evicted.", prometheus.CounterValue, u.evictedImages, true},
			{"puzzlefs_store_removed_blobs_total", "Blobs that were removed to make room, or because no image had them.", prometheus.CounterValue, u.removedBlobs, true},
			{"puzzlefs_store_removed_bytes_total", "What these blobs took up.", prometheus.CounterValue, u.removedBytes, true},
		} {
			if m.known && !yield(prometheus.MustNewConstMetric(prometheus.NewDesc(m.name, m.help, nil, nil), m.kind, float64(m.value))) {
				return
			}
		}
	}
}

// operation counts a call that was answered with err, which has its gRPC code.
func (m *metrics) operation(method string, err error, took time.Duration) {
	m.operations.WithLabelValues(DriverName, method, status.Code(err).String()).Observe(took.Seconds())
}

// pulled counts a pull that ended with err. fetched says that something was missing here.
func (m *metrics) pulled(err error, fetched bool, took time.Duration) {
	m.pulls.WithLabelValues(pullResult(err, fetched)).Inc()
	if err == nil && fetched {
		m.pullSeconds.Observe(took.Seconds())
	}
	switch {
	case errors.Is(err, ErrMismatch):
		m.verifyFailures.WithLabelValues(verifyManifest).Inc()
	case errors.Is(err, store.ErrDigestMismatch):
		m.verifyFailures.WithLabelValues(verifyPull).Inc()
	}
}

// pullResult is the label for a pull that ended with err.
func pullResult(err error, fetched bool) string {
	switch {
	case err == nil && fetched:
		return pullFetched
	case err == nil:
		return pullPresent
	case errors.Is(err, context.Canceled):
		return pullCanceled
	case errors.Is(err, ErrDenied):
		return pullRefused
	case errors.Is(err, store.ErrDigestMismatch), errors.Is(err, format.ErrCorrupt):
		return pullCorrupt
	case errors.Is(err, registry.ErrUnavailable), errors.Is(err, registry.ErrRateLimited), errors.Is(err, registry.ErrUnexpectedAnswer):
		return pullUnavailable
	}
	switch codeOf(err) {
	case codes.InvalidArgument, codes.FailedPrecondition, codes.DataLoss:
		return pullRefused
	case codes.NotFound:
		return pullNotFound
	case codes.Unauthenticated, codes.PermissionDenied:
		return pullDenied
	case codes.ResourceExhausted:
		return pullNoSpace
	default:
		return pullFailed
	}
}

// progress returns a function that counts what a pull fetched, for the reports of that pull,
// which come one at a time.
func (m *metrics) progress() func(registry.Progress) {
	direct, mirrored := m.fetched.WithLabelValues("registry"), m.fetched.WithLabelValues("mirror")
	var last registry.Progress
	return func(p registry.Progress) {
		mirror := p.MirrorBytes - last.MirrorBytes
		mirrored.Add(float64(mirror))
		direct.Add(float64(p.MovedBytes - last.MovedBytes - mirror))
		last = p
	}
}
