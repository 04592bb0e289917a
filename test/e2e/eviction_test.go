package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"
)

// testEviction tests what a node does whose store is full.
func (s *suite) testEviction(t *testing.T) {
	s.Test(t, s.quotaReached(), s.reserveReached())
}

// quotaReached is the feature of a store with room for three images out of four.
func (s *suite) quotaReached() features.Feature {
	const (
		size  = 8 << 20
		quota = 30 << 20
	)
	var (
		namespace, node string
		dirs            = map[string]string{}
		images          = map[string]image{}
		steady          *pod
	)
	// visit runs a pod of an image for as long as it takes to look at the volume.
	visit := func(ctx context.Context, t *testing.T, name string) {
		t.Helper()
		p := s.start(ctx, t, on(node, s.reader(namespace, name, inline("data", images[name].attributes()))))
		s.checkVolume(ctx, t, p, dirs[name])
		p.delete(ctx, t)
	}
	// there holds what the node has of the images against what it should have, as the store commands say it and
	// as it is on the disk.
	there := func(ctx context.Context, t *testing.T, want ...string) {
		t.Helper()
		var digests []string
		for _, name := range want {
			digests = append(digests, images[name].Digest)
		}
		slices.Sort(digests)
		// A pull that is about to be refused has a pin for a moment.
		var list storeList
		mustAwait(ctx, t, patience, fmt.Sprintf("store ls to name the images %v (%v)", want, digests), func(ctx context.Context) (bool, string, error) {
			list = s.storeList(ctx, t, node)
			return slices.Equal(digests, list.digests()), fmt.Sprint(list.digests()), nil
		})
		for name, img := range images {
			_, err := s.agent(node).try(ctx, "test", "-e", s.blobFile(img.Digest))
			if here := err == nil; here != slices.Contains(want, name) {
				t.Errorf("the manifest of image %s is on the disk: %v; the images there should be %v", name, here, want)
			}
		}
		m := s.waitMetrics(ctx, t, node, "what store ls says", func(m metrics) bool {
			return m["puzzlefs_store_bytes"] == float64(list.Bytes)
		})
		if m["puzzlefs_store_quota_bytes"] != quota || m["puzzlefs_store_bytes"] > quota {
			t.Errorf("the driver says that %g bytes are in use of its quota of %g; want at most %d", m["puzzlefs_store_bytes"], m["puzzlefs_store_quota_bytes"], quota)
		}
	}
	return features.New("store with a quota").
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			s.emptyStores(ctx, t)
			s.driver(ctx, t, map[string]any{
				"store": map[string]any{"quota": "30Mi"},
				// Readers are to be served from the disk.
				"memory": map[string]any{"contentCache": "1Mi"},
			})
			namespace = s.namespace(ctx, t, "eviction", restrictedPods)
			nodes, err := s.nodes(ctx)
			must(t, err)
			node = nodes[len(nodes)-1]
			for i, name := range []string{"a", "b", "c", "d", "large", "huge"} {
				n := size
				switch name {
				case "large": // fits alone
					n = 3 * size
				case "huge":
					n = 5 * size
				}
				dirs[name] = s.contentTree(t, uint64(40+i), n)
				images[name] = s.open.pushTree(ctx, t, dirs[name], "eviction/"+name+":v1")
			}
			steady = s.start(ctx, t, s.steady(namespace, "a", node, images["a"]))
			steady.waitReading(ctx, t)
			return ctx
		}).
		Assess("keeps what fits", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			visit(ctx, t, "b")
			visit(ctx, t, "c")
			there(ctx, t, "a", "b", "c")
			return ctx
		}).
		Assess("evicts what was used least recently, and not what is in use", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			visit(ctx, t, "d")
			there(ctx, t, "a", "c", "d")
			m, err := s.driverMetrics(ctx, node)
			must(t, err)
			if m["puzzlefs_store_evicted_images_total"] != 1 || m["puzzlefs_store_removed_bytes_total"] < size || m["puzzlefs_store_removed_blobs_total"] < 1 {
				t.Errorf("the driver evicted image b, and says that it evicted %g images, %g blobs, %g bytes", m["puzzlefs_store_evicted_images_total"],
					m["puzzlefs_store_removed_blobs_total"], m["puzzlefs_store_removed_bytes_total"])
			}
			return ctx
		}).
		Assess("fetches again what was evicted", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			before, err := s.driverMetrics(ctx, node)
			must(t, err)
			visit(ctx, t, "b")
			there(ctx, t, "a", "b", "d")
			after, err := s.driverMetrics(ctx, node)
			must(t, err)
			fetched := `puzzlefs_fetched_bytes_total{source="registry"}`
			if n := after[fetched] - before[fetched]; n < size {
				t.Errorf("a pod of the evicted image fetched %g bytes, want %d at least", n, size)
			}
			return ctx
		}).
		Assess("refuses what cannot fit, and says what to do", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			for _, name := range []string{"large", "huge"} {
				p := s.launch(ctx, t, on(node, s.reader(namespace, name, inline("data", images[name].attributes()))))
				e := p.waitEvent(ctx, t, "StoreFull", `quota of 30\.0 MiB.*raise --store-quota`)
				t.Logf("pod %s is told: %s", name, e.Message)
				p.waitEvent(ctx, t, "FailedMount", `quota of 30\.0 MiB.*raise --store-quota`)
			}
			there(ctx, t, "a", "b", "d") // nothing was evicted in vain
			return ctx
		}).
		Assess("never reaches a pod that reads", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			before, err := s.driverMetrics(ctx, node)
			must(t, err)
			r := steady.waitMore(ctx, t)
			t.Logf("the reader: %v", r)
			if r.failed() > 0 || len(r.Stuck) > 0 {
				t.Errorf("the reader of image a failed while others were evicted: %v", r)
			}
			after, err := s.driverMetrics(ctx, node)
			must(t, err)
			if before["puzzlefs_store_read_bytes_total"] >= after["puzzlefs_store_read_bytes_total"] {
				t.Errorf("the driver has read %g bytes from its store and goes on to say so: the reader was not served from there", after["puzzlefs_store_read_bytes_total"])
			}
			return ctx
		}).
		Assess("agrees with the store commands", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			s.checkStoreCommands(ctx, t, node, images["a"].Digest, images["b"].Digest, images["d"].Digest)
			return ctx
		}).
		Assess("starts pods that waited for room once there is some", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			steady.delete(ctx, t)
			s.checkVolume(ctx, t, s.pod(namespace, "large"), dirs["large"])
			s.pod(namespace, "large").delete(ctx, t)
			// What the event says: a larger quota.
			s.driver(ctx, t)
			s.checkVolume(ctx, t, s.pod(namespace, "huge"), dirs["huge"])
			return ctx
		}).
		Feature()
}

// reserveReached is the feature of a disk that others have filled.
func (s *suite) reserveReached() features.Feature {
	var (
		namespace, node, dir string
		img                  image
	)
	return features.New("store on a full disk").
		Setup(func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			s.driver(ctx, t)
			namespace = s.namespace(ctx, t, "reserve", restrictedPods)
			nodes, err := s.nodes(ctx)
			must(t, err)
			node = nodes[len(nodes)-1]
			dir = s.contentTree(t, 50, 8<<20)
			img = s.open.pushTree(ctx, t, dir, "eviction/reserve:v1")
			p := s.start(ctx, t, on(node, s.reader(namespace, "before", inline("data", img.attributes()))))
			s.checkVolume(ctx, t, p, dir)
			p.delete(ctx, t)
			return ctx
		}).
		Assess("gives the disk back that no volume uses", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			// No disk is so empty.
			s.driver(ctx, t, map[string]any{"store": map[string]any{"reserve": "99.9%"}})
			m := s.waitMetrics(ctx, t, node, "the store is empty", func(m metrics) bool {
				return m["puzzlefs_store_bytes"] == 0 && m["puzzlefs_store_evicted_images_total"] >= 1
			})
			if m["puzzlefs_store_disk_free_bytes"] >= m["puzzlefs_store_disk_reserve_bytes"] {
				t.Errorf("the driver says that the disk has %g bytes free, of which %g are to stay free", m["puzzlefs_store_disk_free_bytes"], m["puzzlefs_store_disk_reserve_bytes"])
			}
			if list := s.storeList(ctx, t, node); len(list.Images) > 0 || list.Bytes > 0 {
				t.Errorf("store ls names %d images of %d bytes", len(list.Images), list.Bytes)
			}
			return ctx
		}).
		Assess("lets pods wait until the disk has room", func(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
			p := s.start(ctx, t, on(node, s.reader(namespace, "waiting", inline("data", img.attributes()))))
			e := p.waitEvent(ctx, t, "StoreFull", `are to stay free.*free space on the disk, lower --store-reserve`)
			t.Logf("the pod is told: %s", e.Message)
			s.driver(ctx, t)
			s.checkVolume(ctx, t, p, dir)
			return ctx
		}).
		Feature()
}

// storeList is what csi-puzzlefs store ls --json says.
type storeList struct {
	Blobs       int   `json:"blobs"`
	Bytes       int64 `json:"bytes"`
	PinnedBytes int64 `json:"pinnedBytes"`
	Orphans     int   `json:"orphans"`
	Images      []struct {
		Image        string `json:"image"`
		Blobs        int    `json:"blobs"`
		MissingBlobs int    `json:"missingBlobs"`
		Pins         []struct {
			Name string `json:"name"`
		} `json:"pins"`
	} `json:"images"`
}

// digests returns those of the images, sorted.
func (l storeList) digests() []string {
	var digests []string
	for _, i := range l.Images {
		digests = append(digests, i.Image)
	}
	slices.Sort(digests)
	return digests
}

// pinned returns the digests of the images that have pins, sorted.
func (l storeList) pinned() []string {
	var digests []string
	for _, i := range l.Images {
		if len(i.Pins) > 0 {
			digests = append(digests, i.Image)
		}
	}
	slices.Sort(digests)
	return digests
}

// store runs csi-puzzlefs store in the driver's container on a node and decodes what it prints.
func (s *suite) store(ctx context.Context, t testing.TB, node string, result any, args ...string) {
	t.Helper()
	p := s.driverPod(ctx, t, node)
	command := slices.Concat([]string{"/csi-puzzlefs", "store"}, args, []string{"--json", "--state-dir", s.settings.stateDir})
	out, err := s.execIn(ctx, p.Namespace, p.Name, "driver", nil, command...)
	must(t, err)
	if err := json.Unmarshal([]byte(out), result); err != nil {
		t.Fatalf("read what csi-puzzlefs store %s printed: %v: %s", strings.Join(args, " "), err, out)
	}
}

func (s *suite) storeList(ctx context.Context, t testing.TB, node string) storeList {
	t.Helper()
	var list storeList
	s.store(ctx, t, node, &list, "ls")
	return list
}

// blobFile is where the agent finds a blob.
func (s *suite) blobFile(digest string) string {
	return hostRoot + s.settings.stateDir + "/store/blobs/" + strings.Replace(digest, ":", "/", 1)
}

// emptyStores removes what nodes have of images that no volume uses.
func (s *suite) emptyStores(ctx context.Context, t testing.TB) {
	t.Helper()
	s.driver(ctx, t)
	nodes, err := s.nodes(ctx)
	must(t, err)
	for _, node := range nodes {
		s.store(ctx, t, node, &struct{}{}, "gc", "--all")
	}
}

// checkStoreCommands runs the store commands on a node that has an image in use and others that are not.
func (s *suite) checkStoreCommands(ctx context.Context, t testing.TB, node, used string, cached ...string) {
	t.Helper()
	list := s.storeList(ctx, t, node)
	if diff := cmp.Diff([]string{used}, list.pinned()); diff != "" {
		t.Errorf("store ls names other images with pins than that in use (- wanted, + there):\n%s", diff)
	}
	for _, i := range list.Images {
		if i.MissingBlobs > 0 {
			t.Errorf("store ls says that %d of %d blobs of %s are missing", i.MissingBlobs, i.Blobs, i.Image)
		}
	}
	files := len(lines(s.agent(node).shell(ctx, t, fmt.Sprintf("ls %s%s/store/blobs/sha256", hostRoot, s.settings.stateDir))))
	if list.Blobs != files || list.Orphans > 0 {
		t.Errorf("store ls counts %d blobs, %d of them of no image; there are %d files", list.Blobs, list.Orphans, files)
	}
	var verified struct {
		Blobs            int
		Corrupt, Missing []any
	}
	s.store(ctx, t, node, &verified, "verify")
	if verified.Blobs != files || len(verified.Corrupt) > 0 || len(verified.Missing) > 0 {
		t.Errorf("store verify checked %d of %d blobs, and found %v corrupt and %v missing", verified.Blobs, files, verified.Corrupt, verified.Missing)
	}
	slices.Sort(cached)
	for _, args := range [][]string{{"gc", "--all", "--dry-run"}, {"gc", "--all"}} {
		var collected struct {
			Evicted []struct{ Image string }
		}
		s.store(ctx, t, node, &collected, args...)
		var evicted []string
		for _, e := range collected.Evicted {
			evicted = append(evicted, e.Image)
		}
		slices.Sort(evicted)
		if diff := cmp.Diff(cached, evicted); diff != "" {
			t.Errorf("store %s evicts other images than those that no volume uses (- wanted, + there):\n%s", strings.Join(args, " "), diff)
		}
	}
	if diff := cmp.Diff([]string{used}, s.storeList(ctx, t, node).digests()); diff != "" {
		t.Errorf("other images are left than that in use (- wanted, + there):\n%s", diff)
	}
}
