package driver_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

func TestReasonOf(t *testing.T) {
	tests := []struct {
		err  error
		want string
	}{
		{nil, ""},
		{driver.ErrBusy, ""},
		{context.Canceled, ""},
		{driver.ErrNoDigest, "DigestRefused"},
		{driver.ErrMismatch, "DigestRefused"},
		{store.ErrDigestMismatch, "ImageCorrupt"},
		{format.ErrCorrupt, "ImageCorrupt"},
		{driver.ErrNotFound, "ImageNotFound"},
		{registry.ErrNotFound, "ImageNotFound"},
		{format.ErrNotPuzzleFS, "ImageUnusable"},
		{format.ErrUnsupportedVersion, "ImageUnusable"},
		{format.ErrTooLarge, "ImageTooLarge"},
		{fmt.Errorf("%w: %w", format.ErrTooLarge, driver.ErrDenied), "ImageTooLarge"},
		{driver.ErrDenied, "PolicyDenied"},
		{fmt.Errorf("%w: %w", registry.ErrNotFound, driver.ErrDenied), "PolicyDenied"},
		{registry.ErrUnauthorized, "RegistryDenied"},
		{registry.ErrForbidden, "RegistryDenied"},
		{registry.ErrUnavailable, "RegistryUnavailable"},
		{registry.ErrRateLimited, "RegistryUnavailable"},
		{registry.ErrUnexpectedAnswer, "RegistryUnavailable"},
		{syscall.ENOSPC, "StoreFull"},
		{driver.ErrNoRoom, "StoreFull"},
		{driver.ErrNoMemory, "MemoryFull"},
		{driver.ErrInvalid, "InvalidVolume"},
		{driver.ErrExists, "PublishFailed"},
		{driver.ErrUnavailable, "PublishFailed"},
		{errors.New("anything else"), "PublishFailed"},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.err), func(t *testing.T) {
			err := tt.err
			if err != nil {
				err = fmt.Errorf("pull registry.example/app: %w", err)
			}
			if got := driver.ReasonOf(err); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	if !errors.Is(driver.ErrNoDigest, driver.ErrInvalid) || driver.ErrNoDigest.Error() != driver.ErrInvalid.Error() {
		t.Error("a missing digest is not an invalid request any more")
	}
}

func TestEventMessagesAreBounded(t *testing.T) {
	for _, text := range []string{"", strings.Repeat("x", 1024), strings.Repeat("x", 1025), strings.Repeat("ä", 600), strings.Repeat("…", 600)} {
		got := driver.Bounded(text)
		if len(got) > 1024 || !utf8.ValidString(got) {
			t.Errorf("%d bytes became %d, valid %v", len(text), len(got), utf8.ValidString(got))
		}
		if len(text) <= 1024 && got != text {
			t.Errorf("%d bytes were changed", len(text))
		}
		if len(text) > 1024 && (len(got) < 1018 || !strings.HasSuffix(got, "…")) {
			t.Errorf("%d bytes became %d: %s", len(text), len(got), got)
		}
	}
}

func TestEventMessagesAreSentences(t *testing.T) {
	for text, want := range map[string]string{
		"":                      "",
		"pulled an image in 2s": "Pulled an image in 2s.",
		"Ends well.":            "Ends well.",
		"étage 2":               "Étage 2.",
		"\xff no text":          "\uFFFD no text.",
		`answered 404 ("NAME")`: `Answered 404 ("NAME").`,
	} {
		if got := driver.Sentence(text); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
}

// TestProgressIsToldEverMoreRarely, whatever the pull reports. Time is synctest's.
func TestProgressIsToldEverMoreRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		begin := time.Now()
		var at []time.Duration
		driver.Repeat(ctx, 20*time.Second, func() { at = append(at, time.Since(begin)) })
		want := []time.Duration{20 * time.Second, 50 * time.Second, 110 * time.Second, 230 * time.Second, 470 * time.Second}
		if diff := cmp.Diff(want, at); diff != "" {
			t.Error(diff)
		}
	})
}

// TestEventsOfFailures: a pod is told what kubelet is told, once, with a count, and without
// any secret; a pod that nobody names is not told.
func TestEventsOfFailures(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, other := makeImage(t, "hello\n", 1), makeImage(t, "other\n", 1)
	ref := reg.push(t, im, "app", "1")
	api := n.sendEvents()
	n.serveHTTP()
	n.start()
	const password = "sesame-open"
	tests := []struct {
		name, reason, image, digest string
		secrets                     map[string]string
		set                         func(*testRegistry)
	}{
		{name: "no-digest", reason: "DigestRefused", image: ref},
		{name: "mismatch", reason: "DigestRefused", image: ref, digest: "verity:" + other.verity.String()},
		{name: "not-there", reason: "ImageNotFound", image: ref, digest: other.digest.String()},
		{name: "invalid", reason: "InvalidVolume", image: "!", digest: im.digest.String()},
		{name: "down", reason: "RegistryUnavailable", image: ref, digest: im.digest.String(), set: func(r *testRegistry) { r.down = true }},
		{
			name: "denied", reason: "RegistryDenied", image: ref, digest: im.digest.String(), secrets: dockerSecret(reg.host, password),
			set: func(r *testRegistry) { r.password = "another" },
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.set != nil {
				reg.set(tt.set)
				defer reg.set(func(r *testRegistry) { r.down, r.password = false, "" })
			}
			req := n.podRequest(tt.name, tt.image, tt.digest)
			req.Secrets = tt.secrets
			var said string
			for range 2 {
				_, err := n.NodePublishVolume(t.Context(), req)
				if err == nil {
					t.Fatal("it was published")
				}
				said = driver.Sentence(strings.TrimPrefix(status.Convert(err).Message(), "NodePublishVolume: "))
			}
			eventually(t, "an event that counts both", func() bool {
				all := api.all(tt.name)
				return len(all) == 1 && all[0].Count == 2
			})
			got := api.all(tt.name)[0]
			want := corev1.Event{
				Type: "Warning", Reason: tt.reason, Message: said, Count: 2,
				Source:              corev1.EventSource{Component: "csi-puzzlefs", Host: "node-1"},
				ReportingController: "csi-puzzlefs", ReportingInstance: "node-1",
				InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: "team", Name: tt.name, UID: types.UID("uid-of-" + tt.name)},
			}
			if got.Namespace != "team" || got.FirstTimestamp.IsZero() || got.LastTimestamp.IsZero() {
				t.Errorf("event is %+v", got)
			}
			want.TypeMeta, want.ObjectMeta, want.FirstTimestamp, want.LastTimestamp = got.TypeMeta, got.ObjectMeta, got.FirstTimestamp, got.LastTimestamp
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
			if text := fmt.Sprint(got); strings.Contains(text, password) {
				t.Errorf("the event holds the password: %s", text)
			}
		})
	}
	before := len(api.all(""))
	n.refused(n.request("nobody", "!", im.digest.String()), codes.InvalidArgument)
	good := n.podRequest("good", ref, im.digest.String())
	n.publish(good)
	// Events are sent in order, so this one comes after the one that there must not be.
	eventually(t, "the good pod is told of its pull", func() bool { return len(api.all("good")) == 1 })
	if all := api.all(""); len(all) != before+1 {
		t.Errorf("somebody was told of a volume of nobody's: %v", all)
	}
	if got := api.all("good")[0]; got.Type != "Normal" || got.Reason != "ImagePulled" || !strings.Contains(got.Message, im.digest.String()) {
		t.Errorf("event is %s %s: %s", got.Type, got.Reason, got.Message)
	}
	n.metricsAre(map[string]string{
		`puzzlefs_pod_events_total{result="sent"}`: strconv.Itoa(2*len(tests) + 1), `puzzlefs_pod_events_total{result="failed"}`: "0",
		`puzzlefs_pod_events_total{result="dropped"}`: "0", `puzzlefs_pod_events_total{result="limited"}`: "0",
	})
	n.unpublish(good)
	n.nothingLeft()
}

// TestEventsAreLimited: a pod that fails in ever other ways is not told without end.
func TestEventsAreLimited(t *testing.T) {
	n := newNode(t)
	api := n.sendEvents()
	n.serveHTTP()
	n.start()
	const calls = 60
	for i := range calls {
		req := n.podRequest("a", "!", "")
		req.VolumeContext[fmt.Sprintf("wrong%d", i)] = "x"
		n.refused(req, codes.InvalidArgument)
	}
	eventually(t, "all events are dealt with", func() bool {
		sent, _ := strconv.Atoi(n.metric(`puzzlefs_pod_events_total{result="sent"}`))
		limited, _ := strconv.Atoi(n.metric(`puzzlefs_pod_events_total{result="limited"}`))
		return sent+limited == calls && limited > 0
	})
	if all := api.all("a"); len(all) > 10 {
		t.Errorf("%d event objects, want those of many texts in one", len(all))
	}
}

// TestEventsDelayNothing: an API server that does not answer holds up neither publish nor the
// end of the driver; what does not fit into the queue is counted.
func TestEventsDelayNothing(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	api := n.sendEvents()
	hang := make(chan struct{})
	defer close(hang)
	api.set(func(s *apiServer) { s.hang = hang })
	n.serveHTTP()
	n.start()
	const calls, room = 300, 256 + 1
	for i := range calls {
		req := n.podRequest(fmt.Sprintf("p%d", i), "!", im.digest.String())
		if _, err := n.NodePublishVolume(t.Context(), req); status.Code(err) != codes.InvalidArgument {
			t.Fatal(err)
		}
	}
	good := n.podRequest("good", ref, im.digest.String())
	n.publish(good)
	n.unpublish(good)
	if dropped, _ := strconv.Atoi(n.metric(`puzzlefs_pod_events_total{result="dropped"}`)); dropped < calls-room || dropped > calls {
		t.Errorf("%d events are counted as dropped, want at least %d", dropped, calls-room)
	}
	if code, body := n.get("/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d %s", code, body)
	}
	n.stop()
	n.nothingLeft()
}

// TestEventsAreFlushed: what was queued when the driver stopped is sent.
func TestEventsAreFlushed(t *testing.T) {
	n := newNode(t)
	api := n.sendEvents()
	hang := make(chan struct{})
	api.set(func(s *apiServer) { s.hang = hang })
	n.start()
	const calls = 20
	for i := range calls {
		n.refused(n.podRequest(fmt.Sprintf("p%d", i), "!", ""), codes.InvalidArgument)
	}
	close(hang)
	n.stop()
	if all := api.all(""); len(all) != calls {
		t.Errorf("%d events were sent, want %d", len(all), calls)
	}
}

// TestEventsRefused: an API server that refuses events is not asked again for the same one,
// and one line says so.
func TestEventsRefused(t *testing.T) {
	n := newNode(t)
	api, log := n.sendEvents(), n.logJSON()
	api.set(func(s *apiServer) { s.refuse = true })
	n.serveHTTP()
	n.start()
	for i := range 5 {
		n.refused(n.podRequest(fmt.Sprintf("p%d", i), "!", ""), codes.InvalidArgument)
	}
	eventually(t, "all are counted", func() bool { return n.metric(`puzzlefs_pod_events_total{result="failed"}`) == "5" })
	api.set(func(s *apiServer) {
		if len(s.asked) != 5 {
			t.Errorf("the API server was asked %d times, want 5: %v", len(s.asked), s.asked)
		}
		s.refuse = false
	})
	n.refused(n.podRequest("later", "!", ""), codes.InvalidArgument)
	n.stop()
	warnings := 0
	for _, l := range log.lines(t, "") {
		if strings.Contains(fmt.Sprint(l["error"]), "no events for you") {
			warnings++
		}
	}
	if again := log.lines(t, "events reach the API server again"); warnings != 1 || len(again) != 1 {
		t.Errorf("%d lines about the refusal and %d about its end, want one each", warnings, len(again))
	}
	if len(api.all("later")) != 1 {
		t.Error("the event after the refusal did not arrive")
	}
}

// TestEventsThatExpired: what the API server has forgotten is told anew.
func TestEventsThatExpired(t *testing.T) {
	n := newNode(t)
	api := n.sendEvents()
	n.start()
	req := n.podRequest("a", "!", "")
	n.refused(req, codes.InvalidArgument)
	eventually(t, "the pod is told", func() bool { return len(api.all("a")) == 1 })
	api.set(func(s *apiServer) { s.events, s.order = map[string]*corev1.Event{}, nil })
	n.refused(req, codes.InvalidArgument)
	n.stop()
	all := api.all("a")
	if len(all) != 1 || all[0].Count != 2 || all[0].Reason != "InvalidVolume" {
		t.Errorf("the pod was told %v, want one event that counts both", all)
	}
}

// TestEventsWithoutCluster: outside of a cluster there are none, which is said once; a
// kubeconfig that is no use is an error.
func TestEventsWithoutCluster(t *testing.T) {
	if os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		t.Skip("this is a pod, which has an API server")
	}
	n := newNode(t)
	log := n.logJSON()
	n.cfg.PodEvents = true
	n.start()
	n.refused(n.podRequest("a", "!", ""), codes.InvalidArgument)
	n.stop()
	var off int
	for _, l := range log.lines(t, "") {
		if strings.HasPrefix(fmt.Sprint(l["msg"]), "pods get no events") {
			off++
		}
	}
	if off != 1 {
		t.Errorf("%d lines say that there are no events, want 1", off)
	}
	n.cfg.Kubeconfig = filepath.Join(n.dir, "none")
	if _, err := driver.New(n.cfg); err == nil || !strings.Contains(err.Error(), n.cfg.Kubeconfig) {
		t.Errorf("a kubeconfig that is not there: %v, want an error that names it", err)
	}
}

// TestEventsOfASlowPull: all pods that wait hear how far it is and when it is done; a pod
// whose image is there already hears nothing.
func TestEventsOfASlowPull(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 10)
	ref := reg.push(t, im, "app", "1")
	api := n.sendEvents()
	n.serveHTTP()
	n.cfg.SlowPull = time.Second
	release := make(chan struct{})
	reg.set(func(r *testRegistry) {
		r.stalled = release
		r.hold = map[format.Digest]bool{im.chunks[0]: true}
	})
	n.start()
	var wg sync.WaitGroup
	for _, pod := range []string{"a", "b"} {
		wg.Go(func() { n.publish(n.podRequest(pod, ref, im.digest.String())) })
	}
	eventually(t, "both pods hear how far the pull is", func() bool { return len(api.all("a")) == 1 && len(api.all("b")) == 1 })
	n.metricsAre(map[string]string{"puzzlefs_pulls_in_flight": "1"})
	close(release)
	wg.Wait()
	c := n.podRequest("c", ref, im.digest.String())
	n.publish(c)
	n.stop()
	for _, pod := range []string{"a", "b"} {
		all := api.all(pod)
		if len(all) != 2 || all[0].Reason != "PullSlow" || all[0].Type != "Normal" || !strings.Contains(all[0].Message, "% of ") || all[1].Reason != "ImagePulled" {
			t.Errorf("pod %s heard %v", pod, all)
		}
	}
	if all := api.all("c"); len(all) > 0 {
		t.Errorf("the pod that did not wait heard %v", all)
	}
	n.start()
	for _, pod := range []string{"a", "b", "c"} {
		n.unpublish(n.podRequest(pod, ref, im.digest.String()))
	}
	n.nothingLeft()
}

// TestEventsOfACorruptRead: a blob that turns out to be corrupt is told to all pods of its
// image, also by a driver that mounted them again, and to no others.
func TestEventsOfACorruptRead(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, other := makeImage(t, "hello\n", 3), makeImage(t, "other\n", 1)
	ref, otherRef := reg.push(t, im, "app", "1"), reg.push(t, other, "other", "1")
	api := n.sendEvents()
	n.serveHTTP()
	n.start()
	a, b, c := n.podRequest("a", ref, im.digest.String()), n.podRequest("b", ref, im.digest.String()), n.podRequest("c", otherRef, other.digest.String())
	n.publish(a)
	n.publish(b)
	n.publish(c)
	n.stop()
	n.start()
	n.shows(c.TargetPath, other)
	blob := filepath.Join(n.dir, "state/store/blobs/sha256", im.chunks[1].Hex())
	content, err := os.ReadFile(blob)
	if err != nil {
		t.Fatal(err)
	}
	content[7] ^= 1
	if err := errors.Join(os.Chmod(blob, 0o644), os.WriteFile(blob, content, 0o644)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(filepath.Join(a.TargetPath, "big")); !errors.Is(err, unix.EIO) {
		t.Errorf("read of a corrupt blob: %v, want EIO", err)
	}
	corrupt := func(pod string) (list []string) {
		for _, e := range api.all(pod) {
			if e.Reason == "CorruptRead" && e.Type == "Warning" {
				list = append(list, e.Message)
			}
		}
		return list
	}
	eventually(t, "both pods are told", func() bool { return len(corrupt("a")) > 0 && len(corrupt("b")) > 0 })
	for _, want := range []string{im.chunks[1].String(), im.digest.String(), "node-1"} {
		if got := corrupt("a")[0]; !strings.Contains(got, want) {
			t.Errorf("the message does not say %s: %s", want, got)
		}
	}
	n.metricsAre(map[string]string{`puzzlefs_verify_failures_total{where="read"}`: "1"})
	for _, req := range []*csi.NodePublishVolumeRequest{a, b, c} {
		n.unpublish(req)
	}
	n.stop()
	if n := len(corrupt("c")); n > 0 {
		t.Errorf("the pod of another image was told, too")
	}
	n.nothingLeft()
}

// TestNothingRunsAfterTheEnd: with everything on and used, a driver that has stopped leaves
// no goroutine.
func TestNothingRunsAfterTheEnd(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 5)
	ref := reg.push(t, im, "app", "1")
	api := n.sendEvents()
	n.cfg.KubeletRootDir = filepath.Join(n.dir, "kubelet")
	n.cfg.SlowPull = time.Millisecond
	run := func() {
		n.serveHTTP()
		n.start()
		req := n.podRequest("a", ref, im.digest.String())
		n.publish(req)
		n.refused(n.podRequest("b", "!", ""), codes.InvalidArgument)
		n.get("/metrics")
		n.get("/healthz")
		n.unpublish(req)
		n.stop()
	}
	run() // what the process keeps is there after the first
	eventually(t, "the goroutines of the first driver end", func() bool { return !strings.Contains(stacks(), "pkg/driver.(*") })
	before := runtime.NumGoroutine()
	for range 5 {
		run()
	}
	if len(api.all("")) == 0 {
		t.Error("no event was sent")
	}
	// Connections end in their own time, on both sides.
	eventually(t, fmt.Sprintf("no more than %d goroutines are left", before), func() bool { return runtime.NumGoroutine() <= before })
	n.nothingLeft()
}

// stacks returns the stacks of all goroutines.
func stacks() string {
	b := make([]byte, 4<<20)
	return string(b[:runtime.Stack(b, true)])
}
