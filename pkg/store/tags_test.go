package store_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/google/go-cmp/cmp"
)

// TestTagLikeReference tags an image as the reference did: testdata/retag has its index
// after each of three builds of one tree.
func TestTagLikeReference(t *testing.T) {
	s := create(t, store.Config{})
	b := readFile(t, "testdata/retag/manifest.json")
	d := format.Descriptor{
		Digest:    put(t, s, b),
		Size:      int64(len(b)),
		MediaType: format.MediaTypeManifest,
		Platform:  &format.Platform{Architecture: "amd64", OS: "linux"},
	}
	for _, name := range []string{"1-one", "2-two", "3-one"} {
		must(t, s.Tag(name[2:], d))
		want := readFile(t, filepath.Join("testdata/retag", name+".json"))
		if diff := cmp.Diff(string(want), string(readFile(t, filepath.Join(s.Dir(), "index.json")))); diff != "" {
			t.Errorf("index.json after %s (-want +got):\n%s", name, diff)
		}
	}
	if d.Annotations != nil {
		t.Error("Tag changed its argument")
	}
}

// TestRetagReferenceLayout tags in a layout that the reference made.
func TestRetagReferenceLayout(t *testing.T) {
	s := open(t, store.Config{Dir: copyLayout(t, "v3-master")})
	index := string(readFile(t, filepath.Join(s.Dir(), "index.json")))
	put(t, s, manifestData)
	d := manifest()
	d.Platform = &format.Platform{Architecture: "amd64", OS: "linux"}
	must(t, s.Tag("changed", d))
	entries := strings.SplitAfter(strings.TrimSuffix(strings.TrimPrefix(index, `{"manifests":[`), `],"schemaVersion":2}`), "},{")
	if len(entries) != 4 {
		t.Fatalf("%d entries", len(entries))
	}
	added := fmt.Sprintf(`{"annotations":{"org.opencontainers.image.ref.name":"changed"},"digest":%q,"mediaType":"application/vnd.oci.image.manifest.v1+json","platform":{"architecture":"amd64","os":"linux"},"size":%d}`,
		d.Digest, d.Size)
	want := `{"manifests":[` + entries[0] + entries[2] + entries[3] + `,` + added + `],"schemaVersion":2}`
	want = strings.ReplaceAll(want, "}{", "},{")
	if diff := cmp.Diff(want, string(readFile(t, filepath.Join(s.Dir(), "index.json")))); diff != "" {
		t.Errorf("index.json (-want +got):\n%s", diff)
	}
}

func TestTagDefaults(t *testing.T) {
	s := create(t, store.Config{})
	put(t, s, manifestData)
	d := manifest()
	d.MediaType = ""
	d.Annotations = map[string]string{"kept": "yes", format.AnnotationRefName: "replaced"}
	must(t, s.Tag("x", d))
	want := manifest()
	want.Annotations = map[string]string{"kept": "yes", format.AnnotationRefName: "x"}
	want.Platform = &format.Platform{Architecture: runtime.GOARCH, OS: runtime.GOOS}
	got, err := s.Resolve("x")
	must(t, err)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Resolve (-want +got):\n%s", diff)
	}
	if d.Annotations[format.AnnotationRefName] != "replaced" {
		t.Error("Tag changed its argument")
	}
}

// foreignIndex is what other tools may have made of an index: members and entries that
// PuzzleFS does not know, in other order, with white space.
const foreignIndex = `{
  "schemaVersion": 2,
  "mediaType": "application/vnd.oci.image.index.v1+json",
  "manifests": [
    {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": "sha256:0101010101010101010101010101010101010101010101010101010101010101", "size": 5, "annotations": {"org.opencontainers.image.ref.name": "nested"}},
    {"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha512:ab","size":1,"annotations":{"org.opencontainers.image.ref.name":"sha512"}},
    {"mediaType":"application/vnd.oci.image.manifest.v1+json","size":7,"digest":"sha256:0202020202020202020202020202020202020202020202020202020202020202","urls":["https://example.com"],"artifactType":"x/y","annotations":{"org.opencontainers.image.ref.name":"ours"}},
    {"mediaType":"application/vnd.oci.image.manifest.v1+json","size":8,"digest":"sha256:0303030303030303030303030303030303030303030303030303030303030303"},
    {"annotations":{"org.opencontainers.image.ref.name":"broken"},"size":"many"},
    {"annotations":{"org.opencontainers.image.ref.name":"negative"},"mediaType":"application/vnd.oci.image.manifest.v1+json","size":-1},
    5
  ],
  "annotations": {"zzz": "1", "a": "2"},
  "x-future": [1, 2.50, 1e999]
}`

func TestForeignIndex(t *testing.T) {
	s := create(t, store.Config{})
	writeFile(t, filepath.Join(s.Dir(), "index.json"), []byte(foreignIndex))
	if diff := cmp.Diff([]string{"ours"}, tagNames(t, s)); diff != "" {
		t.Errorf("tags (-want +got):\n%s", diff)
	}
	if d, err := s.Resolve("ours"); err != nil || d.Size != 7 {
		t.Errorf("Resolve: %v, %v", d, err)
	}
	for tag, want := range map[string]error{
		"nested":   format.ErrNotPuzzleFS,
		"sha512":   format.ErrCorrupt,
		"broken":   format.ErrCorrupt,
		"negative": format.ErrCorrupt,
		"absent":   store.ErrNotFound,
	} {
		if _, err := s.Resolve(tag); !errors.Is(err, want) || !strings.Contains(err.Error(), tag) || !strings.Contains(err.Error(), s.Dir()) {
			t.Errorf("Resolve %s: error %v, want %v", tag, err, want)
		}
	}

	put(t, s, manifestData)
	must(t, s.Tag("new", manifest()))
	must(t, s.Tag("new", manifest()))
	must(t, s.Untag("new"))
	var before, after map[string]json.RawMessage
	must(t, json.Unmarshal([]byte(foreignIndex), &before))
	must(t, json.Unmarshal(readFile(t, filepath.Join(s.Dir(), "index.json")), &after))
	entries := func(raw json.RawMessage) []string {
		var list []json.RawMessage
		must(t, json.Unmarshal(raw, &list))
		var texts []string
		for _, e := range list {
			texts = append(texts, string(e))
		}
		return texts
	}
	if diff := cmp.Diff(entries(before["manifests"]), entries(after["manifests"])); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
	delete(before, "manifests")
	delete(after, "manifests")
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("other members (-want +got):\n%s", diff)
	}

	// A tag that names something of another kind can be taken over.
	must(t, s.Tag("nested", manifest()))
	if diff := cmp.Diff([]string{"ours", "nested"}, tagNames(t, s)); diff != "" {
		t.Errorf("tags (-want +got):\n%s", diff)
	}
	if n := strings.Count(string(readFile(t, filepath.Join(s.Dir(), "index.json"))), `"nested"`); n != 1 {
		t.Errorf("%d entries with the tag, want 1", n)
	}
}

func TestBrokenIndex(t *testing.T) {
	for name, content := range map[string]string{
		"empty":           ``,
		"not JSON":        `<html>`,
		"a list":          `[]`,
		"cut off":         foreignIndex[:len(foreignIndex)-2],
		"data after it":   `{"schemaVersion":2}{}`,
		"no version":      `{"manifests":[]}`,
		"other version":   `{"manifests":[],"schemaVersion":3}`,
		"version in case": `{"manifests":[],"SchemaVersion":2}`,
		"two lists":       `{"manifests":[],"manifests":[],"schemaVersion":2}`,
		"no list":         `{"manifests":{},"schemaVersion":2}`,
		"not UTF-8":       "{\"manifests\":[],\"schemaVersion\":2,\"\xff\":1}",
	} {
		t.Run(name, func(t *testing.T) {
			s := create(t, store.Config{})
			put(t, s, manifestData)
			path := filepath.Join(s.Dir(), "index.json")
			writeFile(t, path, []byte(content))
			_, tagsErr := s.Tags()
			_, resolveErr := s.Resolve("x")
			for op, err := range map[string]error{
				"Tags": tagsErr, "Resolve": resolveErr, "Tag": s.Tag("x", manifest()), "Untag": s.Untag("x"),
			} {
				if !errors.Is(err, format.ErrCorrupt) || !strings.Contains(err.Error(), path) {
					t.Errorf("%s: error %v, want ErrCorrupt that names %s", op, err, path)
				}
			}
			if got := string(readFile(t, path)); got != content {
				t.Errorf("the broken index was overwritten with %q", got)
			}
			checkTree(t, s.Dir())
		})
	}
}

func TestResolveAbsent(t *testing.T) {
	s := create(t, store.Config{})
	check := func(wants ...string) {
		t.Helper()
		_, err := s.Resolve("absent")
		if !errors.Is(err, store.ErrNotFound) {
			t.Fatalf("error %v, want ErrNotFound", err)
		}
		for _, want := range append(wants, `"absent"`, s.Dir()) {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("error %q does not mention %q", err, want)
			}
		}
	}
	check("there are none", "build or pull")
	put(t, s, manifestData)
	for i := range 30 {
		must(t, s.Tag(fmt.Sprint("tag", i), manifest()))
	}
	check(`"tag0"`, `"tag19"`, "10 more")
	if _, err := s.Resolve(""); !errors.Is(err, store.ErrInvalidTag) {
		t.Errorf("empty tag: error %v, want ErrInvalidTag", err)
	}
}

func TestTagRefuses(t *testing.T) {
	s := create(t, store.Config{})
	put(t, s, manifestData)
	absent, wrongSize := manifest(), manifest()
	absent.Digest = format.DigestOf([]byte("absent"))
	wrongSize.Size++
	tests := []struct {
		name string
		tag  string
		d    format.Descriptor
		want error
	}{
		{"empty tag", "", manifest(), store.ErrInvalidTag},
		{"control character", "a\tb", manifest(), store.ErrInvalidTag},
		{"not UTF-8", "\xc3", manifest(), store.ErrInvalidTag},
		{"long tag", strings.Repeat("x", store.MaxTagLen+1), manifest(), store.ErrInvalidTag},
		{"blob not there", "x", absent, store.ErrNotFound},
		{"other size", "x", wrongSize, store.ErrDigestMismatch},
	}
	for _, test := range tests {
		if err := s.Tag(test.tag, test.d); !errors.Is(err, test.want) {
			t.Errorf("%s: error %v, want %v", test.name, err, test.want)
		}
	}
	if names := tagNames(t, s); len(names) != 0 {
		t.Errorf("tags %q", names)
	}
}

func TestOddTags(t *testing.T) {
	s := create(t, store.Config{})
	put(t, s, manifestData)
	tags := []string{"a b", "ü", `"quoted\"`, "docker.io/library/x:1", "<&>", "\u2028", strings.Repeat("x", store.MaxTagLen)}
	for _, tag := range tags {
		must(t, s.Tag(tag, manifest()))
		if _, err := s.Resolve(tag); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(tags, tagNames(t, s)); diff != "" {
		t.Errorf("tags (-want +got):\n%s", diff)
	}
}

func TestUntag(t *testing.T) {
	s := create(t, store.Config{})
	put(t, s, manifestData)
	for _, tag := range []string{"a", "b", "c"} {
		must(t, s.Tag(tag, manifest()))
	}
	must(t, s.Untag("b"))
	if diff := cmp.Diff([]string{"a", "c"}, tagNames(t, s)); diff != "" {
		t.Errorf("tags (-want +got):\n%s", diff)
	}
	if err := s.Untag("b"); !errors.Is(err, store.ErrNotFound) || !strings.Contains(err.Error(), `"a", "c"`) {
		t.Errorf("error %v, want ErrNotFound that lists the tags", err)
	}
	must(t, s.Verify(t.Context(), manifest().Digest))
}

const tagsPerChild = 25

// TestTagFromProcesses tags from two processes and two goroutines at once: no tag may be
// lost.
func TestTagFromProcesses(t *testing.T) {
	s := create(t, store.Config{})
	put(t, s, manifestData)
	var children []*exec.Cmd
	var want []string
	for _, name := range []string{"p", "q"} {
		cmd := child(t, "tag", s.Dir(), nameEnv+"="+name)
		must(t, cmd.Start())
		children = append(children, cmd)
		for i := range tagsPerChild {
			want = append(want, fmt.Sprint(name, i))
		}
	}
	var wg sync.WaitGroup
	for _, name := range []string{"g", "h"} {
		for i := range tagsPerChild {
			want = append(want, fmt.Sprint(name, i))
		}
		wg.Go(func() {
			for i := range tagsPerChild {
				if err := s.Tag(fmt.Sprint(name, i), manifest()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, cmd := range children {
		must(t, cmd.Wait())
	}
	got := tagNames(t, s)
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tags (-want +got):\n%s", diff)
	}
	checkTree(t, s.Dir())
}

func TestLocked(t *testing.T) {
	s := create(t, store.Config{LockTimeout: 30 * time.Millisecond})
	put(t, s, manifestData)
	must(t, s.Tag("before", manifest()))
	cmd := child(t, "hold", s.Dir())
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "locked\n" {
		t.Fatalf("the child says %q, %v", line, err)
	}
	for op, err := range map[string]error{"Tag": s.Tag("x", manifest()), "Untag": s.Untag("before")} {
		if !errors.Is(err, store.ErrLocked) {
			t.Errorf("%s: error %v, want ErrLocked", op, err)
			continue
		}
		for _, want := range []string{s.Dir(), "another process", "try again"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error %q does not mention %q", op, err, want)
			}
		}
	}
	// Everything else works meanwhile.
	put(t, s, chunkData)
	if _, err := s.Resolve("before"); err != nil {
		t.Error(err)
	}
	checkTree(t, s.Dir())
	must(t, stdin.Close())
	must(t, cmd.Wait())
	must(t, s.Tag("after", manifest()))
	if diff := cmp.Diff([]string{"before", "held", "after"}, tagNames(t, s)); diff != "" {
		t.Errorf("tags (-want +got):\n%s", diff)
	}
}
