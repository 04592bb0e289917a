package driver_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"google.golang.org/grpc/codes"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// series matches a line with a value: name, suffix of histograms, labels.
var series = regexp.MustCompile(`^([a-z_]+?)(_bucket|_sum|_count)?(?:\{(.*)\})? \S+$`)

// served returns "type label label" of the metrics in an exposition, those of the client
// library's collectors left out.
func served(t *testing.T, text string) map[string]string {
	t.Helper()
	types, labels := map[string]string{}, map[string]map[string]bool{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			if !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
				types[name], labels[name] = kind, map[string]bool{}
			}
			continue
		}
		m := series.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		name := m[1]
		if types[name] == "" {
			name += m[2]
		}
		for _, l := range regexp.MustCompile(`([a-z_]+)="`).FindAllStringSubmatch(m[3], -1) {
			if labels[name] != nil && l[1] != "le" {
				labels[name][l[1]] = true
			}
		}
	}
	for name := range types {
		types[name] = strings.Join(append([]string{types[name]}, slices.Sorted(maps.Keys(labels[name]))...), " ")
	}
	return types
}

// documented returns the same of the table of docs/metrics.md.
func documented(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| (counter|gauge|histogram) \\|([^|]*)\\|")
	got := map[string]string{}
	for _, m := range row.FindAllStringSubmatch(string(b), -1) {
		var labels []string
		for _, l := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(m[3], -1) {
			labels = append(labels, l[1])
		}
		slices.Sort(labels)
		if _, twice := got[m[1]]; twice {
			t.Errorf("%s is there twice", m[1])
		}
		got[m[1]] = strings.Join(append([]string{m[2]}, labels...), " ")
	}
	return got
}

// TestMetricsAreDocumented: docs/metrics.md and the driver agree, and both keep to the
// conventions of Prometheus.
func TestMetricsAreDocumented(t *testing.T) {
	n := newNode(t)
	n.serveHTTP()
	n.start()
	code, text := n.get("/metrics")
	if code != 200 {
		t.Fatalf("%d %s", code, text)
	}
	want := documented(t)
	if len(want) < 10 {
		t.Fatalf("found only %d metrics in the table", len(want))
	}
	if diff := cmp.Diff(want, served(t, text)); diff != "" {
		t.Errorf("documented (-) and served (+) differ:\n%s", diff)
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, want := range []string{"go_goroutines", "process_open_fds"} {
		if !strings.Contains(text, "\n"+want+" ") {
			t.Errorf("there is no %s", want)
		}
	}
	// What alerts and queries ask for exists.
	b, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range regexp.MustCompile(`\b(?:puzzlefs|csi_plugin)_[a-z_]+`).FindAllString(string(b), -1) {
		if want[name] == "" && want[strings.TrimSuffix(name, "_bucket")] == "" {
			t.Errorf("the page asks for %s, which there is not", name)
		}
	}
}

// fetchedSize is how many bytes of an image's blobs a pull fetches: the configuration is in the
// manifest.
func fetchedSize(im *testImage) int {
	size := -len(format.EmptyConfig)
	for _, blob := range im.blobs {
		size += len(blob)
	}
	return size
}

// TestMetricsOfPulls follows images from the registry to the reader.
func TestMetricsOfPulls(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, other := makeImage(t, "hello\n", 10), makeImage(t, "other\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.serveHTTP()
	n.start()
	size := fetchedSize(im)
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	second := n.request("b", ref, im.digest.String())
	n.publish(second)
	n.shows(req.TargetPath, im)
	always := n.request("c", ref, im.digest.String())
	always.VolumeContext["pullPolicy"] = "Always"
	n.publish(always)
	n.refused(n.request("d", ref, "verity:"+other.verity.String()), codes.DataLoss)
	n.refused(n.request("e", ref, other.digest.String()), codes.NotFound)
	reg.set(func(r *testRegistry) { r.down = true })
	n.refused(n.request("f", ref, other.digest.String()), codes.Unavailable)
	reg.set(func(r *testRegistry) { r.down, r.password = false, "secret" })
	n.refused(n.request("g", ref, other.digest.String()), codes.Unauthenticated)
	n.metricsAre(map[string]string{
		`puzzlefs_pulls_total{result="fetched"}`:           "1",
		`puzzlefs_pulls_total{result="present"}`:           "1",
		`puzzlefs_pulls_total{result="refused"}`:           "1",
		`puzzlefs_pulls_total{result="not_found"}`:         "1",
		`puzzlefs_pulls_total{result="unavailable"}`:       "1",
		`puzzlefs_pulls_total{result="denied"}`:            "1",
		`puzzlefs_pulls_total{result="error"}`:             "0",
		`puzzlefs_pull_duration_seconds_count`:             "1",
		`puzzlefs_pulls_in_flight`:                         "0",
		`puzzlefs_verify_failures_total{where="manifest"}`: "1",
		`puzzlefs_verify_failures_total{where="pull"}`:     "0",
		`puzzlefs_mounts`:                                  "1",
		`puzzlefs_volumes{state="published"}`:              "3",
		`puzzlefs_volumes{state="pending"}`:                "0",
		`csi_plugin_operations_seconds_count{driver_name="csi.puzzlefs.io",grpc_status_code="OK",method_name="/csi.v1.Node/NodePublishVolume"}`:          "3",
		`csi_plugin_operations_seconds_count{driver_name="csi.puzzlefs.io",grpc_status_code="Unavailable",method_name="/csi.v1.Node/NodePublishVolume"}`: "1",
	})
	fetched, err := strconv.ParseFloat(n.metric(`puzzlefs_fetched_bytes_total{source="registry"}`), 64)
	if err != nil || int(fetched) != size {
		t.Errorf("fetched %v bytes (%v), want %d", fetched, err, size)
	}
	if read, err := strconv.ParseFloat(n.metric(`puzzlefs_store_read_bytes_total`), 64); err != nil || int(read) < 10*chunkSize {
		t.Errorf("read %v bytes from the store (%v), want at least the file's %d", read, err, 10*chunkSize)
	}
	for _, series := range []string{"puzzlefs_cache_loads_total", "puzzlefs_cache_bytes", "puzzlefs_metadata_memory_bytes"} {
		if v, err := strconv.ParseFloat(n.metric(series), 64); err != nil || v <= 0 {
			t.Errorf("%s is %v (%v), want more after a read", series, v, err)
		}
	}
	for _, r := range []string{"a", "b", "c"} {
		n.unpublish(n.request(r, ref, im.digest.String()))
	}
	n.metricsAre(map[string]string{`puzzlefs_mounts`: "0", `puzzlefs_volumes{state="published"}`: "0"})
	n.nothingLeft()
}

func TestPullResult(t *testing.T) {
	tests := []struct {
		err     error
		fetched bool
		want    string
	}{
		{nil, true, "fetched"},
		{nil, false, "present"},
		{context.Canceled, true, "canceled"},
		{driver.ErrMismatch, false, "refused"},
		{driver.ErrDenied, false, "refused"},
		{fmt.Errorf("%w: %w", format.ErrTooLarge, driver.ErrDenied), false, "refused"},
		{format.ErrNotPuzzleFS, false, "refused"},
		{store.ErrDigestMismatch, true, "corrupt"},
		{format.ErrCorrupt, false, "corrupt"},
		{registry.ErrNotFound, false, "not_found"},
		{registry.ErrUnauthorized, false, "denied"},
		{registry.ErrForbidden, false, "denied"},
		{registry.ErrUnavailable, true, "unavailable"},
		{registry.ErrRateLimited, false, "unavailable"},
		{driver.ErrNoRoom, true, "no_space"},
		{syscall.ENOSPC, true, "no_space"},
		{errors.New("anything else"), true, "error"},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.err, tt.fetched), func(t *testing.T) {
			err := tt.err
			if err != nil {
				err = fmt.Errorf("pull registry.example/app: %w", err)
			}
			if got := driver.PullResult(err, tt.fetched); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// TestMetricsOfTheStore: an image that makes room for another is counted, and the pod for
// which there is no room is told.
func TestMetricsOfTheStore(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	first, second, huge := makeImage(t, "first\n", 10), makeImage(t, "second\n", 10), makeImage(t, "huge\n", 20)
	refs := []string{reg.push(t, first, "first", "1"), reg.push(t, second, "second", "1"), reg.push(t, huge, "huge", "1")}
	n.serveHTTP()
	api := n.sendEvents()
	n.cfg.StoreQuota = 1 << 20
	n.start()
	a := n.request("a", refs[0], first.digest.String())
	n.publish(a)
	number := func(series string) float64 {
		t.Helper()
		v, err := strconv.ParseFloat(n.metric(series), 64)
		if err != nil {
			t.Fatalf("%s: %v", series, err)
		}
		return v
	}
	if used := number("puzzlefs_store_bytes"); used < float64(fetchedSize(first)) || used > 1<<20 {
		t.Errorf("the store has %v bytes, want at least the image's %d", used, fetchedSize(first))
	}
	n.metricsAre(map[string]string{"puzzlefs_store_quota_bytes": "1.048576e+06", "puzzlefs_store_evicted_images_total": "0", "puzzlefs_store_disk_reserve_bytes": "0"})
	n.unpublish(a)
	b := n.request("b", refs[1], second.digest.String())
	n.publish(b)
	n.metricsAre(map[string]string{"puzzlefs_store_evicted_images_total": "1"})
	if removed, blobs := number("puzzlefs_store_removed_bytes_total"), number("puzzlefs_store_removed_blobs_total"); removed < 10*chunkSize || blobs < 10 {
		t.Errorf("%v blobs of %v bytes were removed, want those of the first image", blobs, removed)
	}
	if free := number("puzzlefs_store_disk_free_bytes"); free <= 0 {
		t.Errorf("the disk has %v bytes free", free)
	}
	n.refused(n.podRequest("c", refs[2], huge.digest.String()), codes.ResourceExhausted, "--store-quota")
	n.metricsAre(map[string]string{`puzzlefs_pulls_total{result="no_space"}`: "1"})
	n.unpublish(b)
	n.stop()
	if all := api.all("c"); len(all) != 1 || all[0].Reason != "StoreFull" {
		t.Errorf("the pod without room was told %v", all)
	}
	n.nothingLeft()
}

// TestMetricsOfMirrors: what a mirror gives counts as its own, and what a registry sends that
// has another digest is seen.
func TestMetricsOfMirrors(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, bad := makeImage(t, "hello\n", 10), makeImage(t, "bad\n", 1)
	reg.push(t, im, "app", "1")
	// A registry that keeps what it is given by the digest that it is told: of wrong content.
	liar := newLiar(t, bad, bad.chunks[0])
	certs := filepath.Join(n.dir, "certs", "registry.invalid")
	if err := os.MkdirAll(certs, 0o755); err != nil {
		t.Fatal(err)
	}
	hosts := fmt.Sprintf("[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", reg.host)
	if err := os.WriteFile(filepath.Join(certs, "hosts.toml"), []byte(hosts), 0o644); err != nil {
		t.Fatal(err)
	}
	n.cfg.Registry.CertsDir = filepath.Dir(certs)
	n.serveHTTP()
	n.start()
	req := n.request("a", "registry.invalid/app:1", im.digest.String())
	n.publish(req)
	n.refused(n.request("b", liar+"/app", bad.digest.String()), codes.DataLoss)
	size := fetchedSize(im)
	if got, err := strconv.ParseFloat(n.metric(`puzzlefs_fetched_bytes_total{source="mirror"}`), 64); err != nil || int(got) != size {
		t.Errorf("%v bytes came from the mirror (%v), want %d", got, err, size)
	}
	n.metricsAre(map[string]string{
		`puzzlefs_verify_failures_total{where="pull"}`: "1",
		`puzzlefs_pulls_total{result="corrupt"}`:       "1",
	})
	n.unpublish(req)
	n.nothingLeft()
}

// TestMetricsOfCorruptManifest: metadata that went bad on the node is counted when it is read.
func TestMetricsOfCorruptManifest(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.serveHTTP()
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.publish(req)
	n.unpublish(req)
	for _, d := range []format.Digest{im.digest, im.rootfs} {
		blob := filepath.Join(n.dir, "state/store/blobs/sha256", d.Hex())
		if err := os.Chmod(blob, 0o644); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(blob)
		if err != nil {
			t.Fatal(err)
		}
		b[3] ^= 1
		if err := os.WriteFile(blob, b, 0o644); err != nil {
			t.Fatal(err)
		}
		n.publish(req)
		n.shows(req.TargetPath, im)
		n.unpublish(req)
	}
	n.metricsAre(map[string]string{
		`puzzlefs_verify_failures_total{where="read"}`: "2",
		`puzzlefs_pulls_total{result="fetched"}`:       "3",
	})
	n.nothingLeft()
}
