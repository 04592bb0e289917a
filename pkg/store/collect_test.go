package store_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
	"github.com/google/go-cmp/cmp"
)

// chunkBytes is the size of test chunks: whole disk blocks of any file system.
const chunkBytes = 64 << 10

// newImage returns the manifest of an image and its blobs but for that: a rootfs of its own, the
// empty config, and the chunks with these numbers.
func newImage(name string, chunks ...uint64) (manifest []byte, blobs [][]byte) {
	rootfs := []byte("rootfs of " + name)
	blobs = [][]byte{rootfs, []byte(format.EmptyConfig)}
	var list []format.Descriptor
	for _, n := range chunks {
		data := storetest.Data(n, chunkBytes)
		blobs = append(blobs, data)
		list = append(list, format.Descriptor{MediaType: format.MediaTypeChunk, Digest: format.DigestOf(data), Size: chunkBytes})
	}
	m := format.NewManifest(format.Descriptor{Digest: format.DigestOf(rootfs), Size: int64(len(rootfs))}, [32]byte{}, list)
	manifest, err := m.Encode()
	if err != nil {
		panic(err) // plain values
	}
	return manifest, blobs
}

// storeImage puts an image and tags it with its name.
func storeImage(s *store.Store, name string, chunks ...uint64) (format.Digest, error) {
	manifest, blobs := newImage(name, chunks...)
	for _, b := range append(blobs, manifest) {
		if err := s.Put(b, format.Digest{}); err != nil {
			return format.Digest{}, err
		}
	}
	d := format.DigestOf(manifest)
	return d, s.Tag(name, format.Descriptor{Digest: d, Size: int64(len(manifest))})
}

func putImage(t *testing.T, s *store.Store, name string, chunks ...uint64) format.Digest {
	t.Helper()
	d, err := storeImage(s, name, chunks...)
	must(t, err)
	return d
}

// imageWhole returns what is wrong with an image.
func imageWhole(s *store.Store, name string, chunks ...uint64) error {
	manifest, blobs := newImage(name, chunks...)
	for _, b := range append(blobs, manifest) {
		if err := s.Verify(context.Background(), format.DigestOf(b)); err != nil {
			return fmt.Errorf("image %s: %w", name, err)
		}
	}
	return nil
}

// used sets when an image, or any blob, was used or written, in hours ago.
func used(t *testing.T, s *store.Store, d format.Digest, hours int) {
	t.Helper()
	when := time.Now().Add(-time.Duration(hours) * time.Hour)
	must(t, os.Chtimes(blobFile(s, d), when, when))
}

// want is a CollectOptions.Want of numbers.
func want(must, want int64) func(int64) (int64, int64) {
	return func(int64) (int64, int64) { return must, want }
}

// TestCollect has images a to d, used in this order, a and b with a chunk in common, c pinned,
// d sharing a chunk with c, and an old and a young orphan.
func TestCollect(t *testing.T) {
	const all, chunk = 1 << 40, chunkBytes
	tests := []struct {
		name string
		opts store.CollectOptions
		// evicted are the images that go, in order, left those that stay.
		evicted, left string
		orphans       int
		// chunks are those that go with images.
		chunks string
	}{
		{"nothing wanted, old orphans", store.CollectOptions{OrphanAge: time.Hour}, "", "abcd", 1, ""},
		{"nothing wanted, no orphan is old", store.CollectOptions{OrphanAge: 1000 * time.Hour}, "", "abcd", 0, ""},
		{"orphans are enough", store.CollectOptions{Want: want(0, 2*chunk), OrphanAge: time.Hour}, "", "abcd", 2, ""},
		{"one byte more", store.CollectOptions{Want: want(0, 2*chunk+1), OrphanAge: time.Hour}, "a", "bcd", 2, "1"},
		{"shared by two that go", store.CollectOptions{Want: want(0, 4*chunk), OrphanAge: time.Hour}, "ab", "cd", 2, "1 2 3"},
		{"all that is not pinned", store.CollectOptions{Want: store.All}, "abd", "c", 2, "1 2 3 6"},
		{"more than there is", store.CollectOptions{Want: want(0, all)}, "abd", "c", 2, "1 2 3 6"},
		{"more is needed than can go", store.CollectOptions{Want: want(all, all), OrphanAge: time.Hour}, "", "abcd", 1, ""},
		{"as much is needed as can go", store.CollectOptions{Want: want(6*chunk, 6*chunk), OrphanAge: time.Hour}, "abd", "c", 2, "1 2 3 6"},
	}
	for _, test := range tests {
		for _, dry := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, dry %v", test.name, dry), func(t *testing.T) {
				s := create(t, store.Config{})
				pins := openPins(t, s)
				contents := map[string][]uint64{"a": {1, 2}, "b": {2, 3}, "c": {4, 5}, "d": {5, 6}}
				digests, names := map[string]format.Digest{}, map[format.Digest]string{}
				for i, name := range []string{"a", "b", "c", "d"} {
					d := putImage(t, s, name, contents[name]...)
					used(t, s, d, 10-i)
					digests[name], names[d] = d, name
				}
				must(t, pins.Pin(digests["c"], "user", ""))
				used(t, s, put(t, s, storetest.Data(7, chunkBytes)), 2)
				put(t, s, storetest.Data(8, chunkBytes))
				before, err := s.Survey(t.Context(), pins, nil)
				must(t, err)
				var forgotten []string
				test.opts.Forget = func(d format.Digest) error { forgotten = append(forgotten, names[d]); return nil }
				test.opts.DryRun = dry

				got, err := s.Collect(t.Context(), pins, test.opts)
				must(t, err)
				evicted := ""
				for _, e := range got.Evicted {
					evicted += names[e.Image]
					if e.Tags[0] != names[e.Image] || e.LastUse.IsZero() {
						t.Errorf("evicted %+v", e)
					}
				}
				if evicted != test.evicted || got.Orphans != test.orphans {
					t.Errorf("evicted %q and %d orphans, want %q and %d", evicted, got.Orphans, test.evicted, test.orphans)
				}
				chunks := len(strings.Fields(test.chunks))
				if n := test.orphans + chunks + 2*len(test.evicted); got.Blobs != n { // and rootfs and manifest each
					t.Errorf("%d blobs went, want %d", got.Blobs, n)
				}
				if got.Bytes+got.Left != before.Bytes || got.Pinned != before.PinnedBytes {
					t.Errorf("%d bytes went, %d are left, %d pinned; there were %d, %d pinned", got.Bytes, got.Left, got.Pinned, before.Bytes, before.PinnedBytes)
				}
				after, err := s.Survey(t.Context(), pins, nil)
				must(t, err)
				if dry {
					if diff := cmp.Diff(before, after); diff != "" || forgotten != nil {
						t.Errorf("the dry run changed something (forgot %v):\n%s", forgotten, diff)
					}
					return
				}
				if after.Bytes != got.Left || after.Orphans != 2-test.orphans || len(forgotten) != len(test.evicted) {
					t.Errorf("%d bytes and %d orphans are left, %v forgotten; want %d and %d and %q", after.Bytes, after.Orphans, forgotten, got.Left, 2-test.orphans, test.evicted)
				}
				if tags := strings.Join(tagNames(t, s), ""); tags != test.left {
					t.Errorf("tags %q are left, want %q", tags, test.left)
				}
				for _, name := range strings.Split(test.left, "") {
					if err := imageWhole(s, name, contents[name]...); err != nil {
						t.Error(err)
					}
				}
				checkTree(t, s.Dir())
			})
		}
	}
}

// TestCollectTouched: the image that was used last goes last, in whatever order they were put.
func TestCollectTouched(t *testing.T) {
	s := create(t, store.Config{})
	pins := openPins(t, s)
	a, b := putImage(t, s, "a", 1), putImage(t, s, "b", 2)
	used(t, s, a, 2)
	used(t, s, b, 1)
	must(t, s.Touch(a))
	if _, err := s.Collect(t.Context(), pins, store.CollectOptions{Want: want(0, 1)}); err != nil {
		t.Fatal(err)
	}
	if tags := tagNames(t, s); len(tags) != 1 || tags[0] != "a" {
		t.Errorf("left: %q, want a", tags)
	}
	if err := s.Touch(b); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("touch what is gone: %v, want ErrNotFound", err)
	}
}

// TestCollectFurther: an image that only the caller knows is one; two tags are one image.
func TestCollectFurther(t *testing.T) {
	s := create(t, store.Config{})
	pins := openPins(t, s)
	a := putImage(t, s, "a", 1)
	must(t, s.Untag("a"))
	used(t, s, a, 2)
	b := putImage(t, s, "b", 2)
	manifest, _ := newImage("b", 2)
	must(t, s.Tag("second name", format.Descriptor{Digest: b, Size: int64(len(manifest))}))
	if _, err := s.Collect(t.Context(), pins, store.CollectOptions{Further: []format.Digest{a}}); err != nil {
		t.Fatal(err)
	}
	must(t, imageWhole(s, "a", 1))
	got, err := s.Collect(t.Context(), pins, store.CollectOptions{Further: []format.Digest{a}, Want: store.All})
	must(t, err)
	if len(got.Evicted) != 2 || got.Evicted[0].Image != a || len(got.Evicted[1].Tags) != 2 || got.Left != 0 {
		t.Errorf("collected %+v, want a, then b with two tags, and nothing left", got)
	}
	if tags := tagNames(t, s); len(tags) > 0 {
		t.Errorf("left: %q", tags)
	}
}

func TestCollectUnreadable(t *testing.T) {
	setUp := func(t *testing.T) (*store.Store, *store.Pins, format.Digest) {
		s := create(t, store.Config{})
		a := putImage(t, s, "a", 1)
		putImage(t, s, "b", 2)
		used(t, s, a, -1)
		return s, openPins(t, s), a
	}
	corrupt := func(t *testing.T, s *store.Store, d format.Digest) { writeFile(t, blobFile(s, d), []byte("{}")) }
	remove := func(t *testing.T, s *store.Store, d format.Digest) { must(t, s.Remove(d)) }

	t.Run("not pinned goes first", func(t *testing.T) {
		s, pins, a := setUp(t)
		corrupt(t, s, a)
		got, err := s.Collect(t.Context(), pins, store.CollectOptions{Want: store.All})
		must(t, err)
		if len(got.Evicted) != 2 || got.Evicted[0].Image != a {
			t.Errorf("evicted %v, want the one that is of no use first, %v, though it was used last", got.Evicted, a)
		}
	})
	for name, damage := range map[string]func(*testing.T, *store.Store, format.Digest){"corrupt": corrupt, "missing": remove} {
		t.Run("pinned and "+name, func(t *testing.T) {
			s, pins, a := setUp(t)
			must(t, pins.Pin(a, "user", ""))
			damage(t, s, a)
			_, err := s.Collect(t.Context(), pins, store.CollectOptions{Want: store.All})
			if !errors.Is(err, store.ErrUnknownContent) || !strings.Contains(err.Error(), a.String()) {
				t.Errorf("got %v, want ErrUnknownContent and the image", err)
			}
			must(t, imageWhole(s, "b", 2))
			if err := s.Verify(t.Context(), format.DigestOf(storetest.Data(1, chunkBytes))); err != nil {
				t.Error(err)
			}
			v, err := s.Survey(t.Context(), pins, nil)
			must(t, err)
			if len(v.Images) != 2 || v.Images[0].Image != a || v.Images[0].Err == nil {
				t.Errorf("survey: %+v, want the damaged image first", v.Images)
			}
		})
	}
	t.Run("held and missing", func(t *testing.T) {
		s, pins, a := setUp(t)
		remove(t, s, a)
		release, err := pins.Hold(a)
		must(t, err)
		defer release()
		got, err := s.Collect(t.Context(), pins, store.CollectOptions{Want: store.All})
		if err != nil || got.Left != 0 {
			t.Errorf("got %+v, %v; want nothing left: a pull that has not begun relies on nothing", got, err)
		}
	})
}

// TestCollectMeanwhile: what is pinned or tagged while a collection is at work stays, as far as
// it is still there.
func TestCollectMeanwhile(t *testing.T) {
	tests := []struct {
		name string
		step store.Step
		do   func(t *testing.T, s *store.Store, pins *store.Pins, a format.Digest)
		// stays says whether the image is whole afterwards.
		stays bool
	}{
		{"held after the plan", "planned", func(t *testing.T, _ *store.Store, pins *store.Pins, a format.Digest) {
			_, err := pins.Hold(a)
			must(t, err)
		}, true},
		{"pinned after the plan", "planned", func(t *testing.T, _ *store.Store, pins *store.Pins, a format.Digest) {
			must(t, pins.Pin(a, "user", ""))
		}, true},
		{"held when it is evicted", store.StepCollectUntagged, func(t *testing.T, _ *store.Store, pins *store.Pins, a format.Digest) {
			_, err := pins.Hold(a)
			must(t, err)
		}, true},
		{"tagged anew when it is evicted", store.StepCollectUntagged, func(t *testing.T, s *store.Store, _ *store.Pins, _ format.Digest) {
			putImage(t, s, "a", 1, 2, 3)
		}, true},
		{"another with its chunks is tagged", store.StepCollectUntagged, func(t *testing.T, s *store.Store, _ *store.Pins, _ format.Digest) {
			putImage(t, s, "c", 1, 2, 3)
		}, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var act func(store.Step)
			s := create(t, store.Config{Fault: func(step store.Step) error {
				if act != nil {
					act(step)
				}
				return nil
			}})
			pins := openPins(t, s)
			a := putImage(t, s, "a", 1, 2, 3)
			done := false
			once := func(step store.Step) {
				if step == test.step && !done {
					done = true
					test.do(t, s, pins, a)
				}
			}
			act = once
			opts := store.CollectOptions{Want: func(int64) (int64, int64) { once("planned"); return store.All(0) }}
			got, err := s.Collect(t.Context(), pins, opts)
			must(t, err)
			if !done {
				t.Fatal("the step was not reached")
			}
			if err := imageWhole(s, "a", 1, 2, 3); (err == nil) != test.stays {
				t.Errorf("the image is whole: %v, want %v", err, test.stays)
			}
			if test.name[:7] == "another" {
				must(t, imageWhole(s, "c", 1, 2, 3))
			}
			v, err := s.Survey(t.Context(), pins, nil)
			must(t, err)
			if test.step == "planned" && (len(got.Evicted) != 0 || len(v.Images[0].Tags) != 1) {
				t.Errorf("evicted %v, tags %v; want the image untouched", got.Evicted, v.Images[0].Tags)
			}
		})
	}
}

// collectSteps are those that a collection of two images and an orphan passes.
var collectSteps = []store.Step{
	store.StepCollectLocked, store.StepCollectForgotten, store.StepIndexLocked, store.StepIndexTempWritten,
	store.StepIndexTempSynced, store.StepIndexRenamed, store.StepCollectUntagged, store.StepCollectRemoved, store.StepCollectBatch,
}

// TestCollectKilled: a process that is killed at any step of a collection, the first time or
// the third, leaves whole images, and nothing that the next collection cannot remove.
func TestCollectKilled(t *testing.T) {
	for _, step := range collectSteps {
		for _, times := range []string{"1", "3"} {
			t.Run(string(step)+" "+times, func(t *testing.T) {
				s := create(t, store.Config{})
				pins := openPins(t, s)
				putImage(t, s, "gone 1", 1, 2)
				putImage(t, s, "gone 2", 2, 3)
				must(t, pins.Pin(putImage(t, s, "kept", 3, 4), "user", ""))
				put(t, s, storetest.Data(7, chunkBytes))
				err := child(t, "collect", s.Dir(), stepEnv+"="+string(step), timesEnv+"="+times).Run()
				var exit *exec.ExitError
				killed := errors.As(err, &exit) && !exit.Exited()
				if err != nil && !killed || times == "1" && !killed {
					t.Fatalf("the child ended with %v", err)
				}
				s = open(t, store.Config{Dir: s.Dir()})
				must(t, imageWhole(s, "kept", 3, 4))
				v, err := s.Survey(t.Context(), pins, nil)
				must(t, err)
				for _, im := range v.Images {
					if im.Missing > 0 || im.Err != nil {
						t.Errorf("the image %v is there in part: %d blobs missing, %v", im.Tags, im.Missing, im.Err)
					}
				}
				got, err := s.Collect(t.Context(), pins, store.CollectOptions{Want: store.All})
				must(t, err)
				if got.Left != got.Pinned || strings.Join(tagNames(t, s), "") != "kept" {
					t.Errorf("left %d bytes, %d of them pinned, and the tags %q", got.Left, got.Pinned, tagNames(t, s))
				}
				must(t, imageWhole(s, "kept", 3, 4))
				putImage(t, s, "gone 1", 1, 2)
				must(t, imageWhole(s, "gone 1", 1, 2))
				checkTree(t, s.Dir())
			})
		}
	}
}

// TestCollectFullDisk: where there is no room for a new index, room is made first.
func TestCollectFullDisk(t *testing.T) {
	full := false
	s := create(t, store.Config{Fault: func(step store.Step) error {
		if step == store.StepIndexTempWritten && full {
			return syscall.ENOSPC
		}
		full = full && step != store.StepCollectRemoved
		return nil
	}})
	pins := openPins(t, s)
	putImage(t, s, "a", 1)
	full = true
	got, err := s.Collect(t.Context(), pins, store.CollectOptions{Want: store.All})
	must(t, err)
	if len(got.Evicted) != 1 || got.Left != 0 || len(tagNames(t, s)) != 0 {
		t.Errorf("collected %+v, tags %q; want everything gone", got, tagNames(t, s))
	}
}

// TestCollectBeside: pulls that hold their images, readers of pinned ones, and collections in
// this process and another, all at once on the same few images, never disturb each other.
func TestCollectBeside(t *testing.T) {
	s := create(t, store.Config{})
	pins := openPins(t, s)
	contents := map[string][]uint64{"pinned": {1, 2}, "x": {2, 3}, "y": {3, 4}, "z": {1, 4}}
	must(t, pins.Pin(putImage(t, s, "pinned", contents["pinned"]...), "user", ""))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	other := child(t, "collect", s.Dir(), timesEnv+"=loop")
	must(t, other.Start())

	var background sync.WaitGroup
	collect := func(opts store.CollectOptions) {
		for ctx.Err() == nil {
			if _, err := s.Collect(t.Context(), pins, opts); err != nil {
				t.Error(err)
				return
			}
		}
	}
	background.Go(func() { collect(store.CollectOptions{Want: store.All}) })
	background.Go(func() { collect(store.CollectOptions{Want: want(0, chunkBytes)}) })
	background.Go(func() {
		for ctx.Err() == nil {
			if err := imageWhole(s, "pinned", contents["pinned"]...); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var pulls sync.WaitGroup
	for _, name := range []string{"x", "y", "z"} {
		for range 2 {
			pulls.Go(func() {
				for range 12 {
					if err := pullBeside(s, pins, name, contents[name]...); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	pulls.Wait()
	cancel()
	background.Wait()
	if err := other.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := other.Wait(); err != nil {
		t.Errorf("the other process: %v", err)
	}
	checkPins(t, pins, pinNames(t, pins)[0]) // of "pinned" alone
	checkTree(t, s.Dir())
}

// pullBeside does what a pull does: it holds the image, puts the manifest, holds again, and puts
// only what is missing; what it found must still be there at the end.
func pullBeside(s *store.Store, pins *store.Pins, name string, chunks ...uint64) error {
	manifest, blobs := newImage(name, chunks...)
	d := format.DigestOf(manifest)
	release, err := pins.Hold(d)
	if err != nil {
		return err
	}
	defer release()
	if err := s.Put(manifest, d); err != nil {
		return err
	}
	again, err := pins.Hold(d)
	if err != nil {
		return err
	}
	defer again()
	for _, b := range blobs {
		if _, err := s.Size(format.DigestOf(b)); errors.Is(err, store.ErrNotFound) {
			err = s.Put(b, format.Digest{})
			if err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
	}
	if err := s.Tag(name, format.Descriptor{Digest: d, Size: int64(len(manifest))}); err != nil {
		return err
	}
	return imageWhole(s, name, chunks...)
}
