package registry_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/registrytest"
)

const (
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeIndex    = "application/vnd.oci.image.index.v1+json"
)

// program builds the command, as the container image has it, and returns its path.
func program(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "csi-puzzlefs")
	cmd := exec.Command("go", "build", "-o", path, "github.com/csi-puzzlefs/csi-puzzlefs/cmd/csi-puzzlefs")
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the command: %v\n%s", err, out)
	}
	return path
}

// buildResult is what --json prints.
type buildResult struct {
	Reference, Digest, Verity    string
	Inodes                       int
	Bytes, StoredBytes, NewBytes int64
	Seconds                      float64
}

// run runs a build Job's command line with a Docker config for alice, and checks that the
// termination log says what standard output does.
func run(t *testing.T, path, addr string, args ...string) (buildResult, error) {
	t.Helper()
	dir := t.TempDir()
	config, log, work := filepath.Join(dir, "config.json"), filepath.Join(dir, "log"), filepath.Join(dir, "work")
	must(t, os.WriteFile(config, []byte(fmt.Sprintf(`{"auths":{%q:{"username":%q,"password":%q}}}`, addr, user, password)), 0o600))
	must(t, os.Mkdir(work, 0o700))
	cmd := exec.Command(path, append([]string{"build", "--json", "--docker-config", config, "--termination-log", log, "--work-dir", work}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	message, logErr := os.ReadFile(log)
	must(t, logErr)
	if left, err := os.ReadDir(work); err != nil || len(left) != 0 {
		t.Errorf("left in the work directory: %v, %v", left, err)
	}
	var r buildResult
	if err != nil {
		if !bytes.Equal(message, stderr.Bytes()) {
			t.Errorf("the termination log says %q, standard error %q", message, stderr.Bytes())
		}
		return r, fmt.Errorf("%w: %s", err, stderr.Bytes())
	}
	if !bytes.Equal(message, stdout.Bytes()) {
		t.Errorf("the termination log says %q, standard output %q", message, stdout.Bytes())
	}
	must(t, json.Unmarshal(stdout.Bytes(), &r))
	return r, nil
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mustRun is run for what succeeds.
func mustRun(t *testing.T, path, addr string, args ...string) buildResult {
	t.Helper()
	r, err := run(t, path, addr, args...)
	must(t, err)
	return r
}

// send makes a request as alice and returns where the answer, 201 or 202, points to.
func send(t *testing.T, method, url, mediaType string, body []byte) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	must(t, err)
	req.SetBasicAuth(user, password)
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusAccepted {
		t.Fatalf("%s %s: %s", method, url, resp.Status)
	}
	to, err := resp.Location()
	must(t, err)
	return to.String()
}

// putBlob uploads a blob by hand and returns its descriptor.
func putBlob(t *testing.T, repo, mediaType string, b []byte) string {
	t.Helper()
	to, err := url.Parse(send(t, http.MethodPost, repo+"/blobs/uploads/", "", nil))
	must(t, err)
	d := format.DigestOf(b).String()
	q := to.Query()
	q.Set("digest", d)
	to.RawQuery = q.Encode()
	send(t, http.MethodPut, to.String(), "application/octet-stream", b)
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mediaType, d, len(b))
}

func putManifest(t *testing.T, repo, tag, mediaType, doc string) string {
	t.Helper()
	send(t, http.MethodPut, repo+"/manifests/"+tag, mediaType, []byte(doc))
	return fmt.Sprintf(`"mediaType":%q,"digest":%q,"size":%d`, mediaType, format.DigestOf([]byte(doc)), len(doc))
}

// putContainer puts a container image for two platforms into a registry: the golden tree
// for this one, with a layer over it that changes nothing, and an empty one for another.
func putContainer(t *testing.T, addr, name string) {
	t.Helper()
	repo := "http://" + addr + "/v2/" + name
	golden, err := os.ReadFile(testtree.Golden(t, "small.tar"))
	must(t, err)
	var nothing bytes.Buffer
	must(t, tar.NewWriter(&nothing).Close())
	image := func(arch string, layers ...[]byte) string {
		var diffs, descriptors []string
		for _, b := range layers {
			var z bytes.Buffer
			w := gzip.NewWriter(&z)
			_, err := w.Write(b)
			must(t, err)
			must(t, w.Close())
			diffs = append(diffs, fmt.Sprintf("%q", format.DigestOf(b)))
			descriptors = append(descriptors, putBlob(t, repo, "application/vnd.oci.image.layer.v1.tar+gzip", z.Bytes()))
		}
		config := fmt.Sprintf(`{"os":"linux","architecture":%q,"rootfs":{"type":"layers","diff_ids":[%s]}}`, arch, strings.Join(diffs, ","))
		return putManifest(t, repo, arch, typeManifest, fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s]}`, typeManifest,
			putBlob(t, repo, "application/vnd.oci.image.config.v1+json", []byte(config)), strings.Join(descriptors, ",")))
	}
	putManifest(t, repo, "v1", typeIndex, fmt.Sprintf(
		`{"schemaVersion":2,"mediaType":%q,"manifests":[{%s,"platform":{"os":"linux","architecture":"s390x"}},{%s,"platform":{"os":"linux","architecture":%q}}]}`,
		typeIndex, image("s390x", nothing.Bytes()), image(runtime.GOARCH, golden, nothing.Bytes()), runtime.GOARCH))
}

// uploads counts the content that is sent to a registry.
type uploads struct{ bytes, mounts atomic.Int64 }

func (u *uploads) wrap(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost && r.URL.Query().Get("mount") != "" {
			u.mounts.Add(1)
		}
		if strings.Contains(r.URL.Path, "/blobs/uploads/") && r.Body != nil {
			r.Body = &countedBody{r.Body, &u.bytes}
		}
		h.ServeHTTP(w, r)
	})
}

type countedBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c *countedBody) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// A Job's command lines against the registry that most people run: a container image in,
// an image out, a delta on it, in the same repository and in another.
func TestBuild(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the golden tree takes root to unpack")
	}
	path := program(t)
	for _, tokens := range []bool{false, true} {
		t.Run(fmt.Sprint("tokens ", tokens), func(t *testing.T) {
			var sent uploads
			users := map[string]string{user: password}
			open := start(t, registrytest.Config{})
			addr := start(t, registrytest.Config{Users: users, Tokens: tokens, Wrap: sent.wrap})
			putContainer(t, open, "team/container")
			credentials := static(registry.Credential{Username: user, Password: password})

			// The digest that the reference gives the same tree.
			first := mustRun(t, path, addr, "docker://"+open+"/team/container:v1", "--push", addr+"/team/app:v1")
			const want = "sha256:9f6cda1472e370be2a773a9dd47bdd6b58d9f69b8406360ba264a59d41373ca7"
			if first.Digest != want || first.Verity != "verity:c538c09bd36d5b265077e224a31708ca5943c0c19e96e620581d624604b08b30" ||
				first.Reference != addr+"/team/app:v1@"+want {
				t.Errorf("built %+v", first)
			}
			if first.NewBytes != sent.bytes.Load() || first.NewBytes != first.StoredBytes {
				t.Errorf("%d bytes were sent, the result says %d new of %d stored", sent.bytes.Load(), first.NewBytes, first.StoredBytes)
			}
			pulled := newStore(t)
			_, err := newClient(t, credentials).Pull(t.Context(), parse(t, addr+"/team/app:v1"), pulled, registry.PullOptions{})
			must(t, err)

			// A delta sends what is new, and mounts the rest where it is another repository.
			changed := testtree.UnpackTar(t, testtree.Golden(t, "changed.tar"))
			const wantDelta = "sha256:4c49edf478a92d3859cbe6fc93e89a58ac33229f00e6702a8f4ab7339854f2a1"
			for _, to := range []struct {
				repo   string
				mounts bool
			}{{"team/app", false}, {"team/other", true}} {
				sent.bytes.Store(0)
				sent.mounts.Store(0)
				delta := mustRun(t, path, addr, changed, "--push", addr+"/"+to.repo+":v2", "--base-ref", addr+"/team/app:v1")
				if delta.Digest != wantDelta {
					t.Errorf("%s: the delta is %s, want %s", to.repo, delta.Digest, wantDelta)
				}
				if n := sent.bytes.Load(); n != delta.NewBytes || n >= delta.StoredBytes {
					t.Errorf("%s: %d bytes were sent, the result says %d new of %d stored", to.repo, n, delta.NewBytes, delta.StoredBytes)
				}
				if n := sent.mounts.Load(); (n > 0) != to.mounts {
					t.Errorf("%s: %d blobs were asked to be mounted", to.repo, n)
				}
				_, err := newClient(t, credentials).Pull(t.Context(), parse(t, addr+"/"+to.repo+":v2"), newStore(t), registry.PullOptions{})
				must(t, err)
			}
			// Another registry has none of it: all of it is sent, none fetched.
			elsewhere := mustRun(t, path, addr, changed, "--push", open+"/copy:v2", "--base-ref", addr+"/team/app:v1")
			if elsewhere.Digest != wantDelta || elsewhere.NewBytes != elsewhere.StoredBytes {
				t.Errorf("elsewhere: %+v", elsewhere)
			}

			refusal := "docker login"
			if tokens {
				refusal = "cannot log in" // oras does not go to a token server on a private address under another name
			}
			for _, tt := range []struct {
				name, want string
				args       []string
			}{
				{"no such platform", "choose with --platform from linux/", []string{"docker://" + open + "/team/container:v1", "--platform", "linux/riscv64", "--push", addr + "/x"}},
				{"a PuzzleFS image", "PuzzleFS image already", []string{"docker://" + addr + "/team/app:v1", "--push", addr + "/x"}},
				{"no such image", "there is no tag none", []string{"docker://" + open + "/team/container:none", "--push", addr + "/x"}},
				{"not let in", refusal, []string{changed, "--push", strings.Replace(addr, "127.0.0.1", "localhost", 1) + "/x"}},
			} {
				_, err := run(t, path, addr, tt.args...)
				if err == nil || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(tt.want)) {
					t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
				}
			}
		})
	}
}

// A layer that breaks off again and again arrives; one that is changed on the way does not.
func TestBuildFromBrokenLayer(t *testing.T) {
	path := program(t)
	var change atomic.Bool
	addr := start(t, registrytest.Config{Wrap: func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				w = &damaging{ResponseWriter: w, left: 300_000, flip: change.Load()}
			}
			h.ServeHTTP(w, r)
		})
	}})
	repo := "http://" + addr + "/v2/big"
	content := make([]byte, 3<<20) // over what is checked in memory
	for i := range content {
		content[i] = byte(i * i >> 7)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	must(t, w.WriteHeader(&tar.Header{Name: "file", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}))
	_, err := w.Write(content)
	must(t, err)
	must(t, w.Close())
	config := fmt.Sprintf(`{"rootfs":{"type":"layers","diff_ids":[%q]}}`, format.DigestOf(layer.Bytes()))
	putManifest(t, repo, "v1", typeManifest, fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s]}`,
		putBlob(t, repo, "application/vnd.oci.image.config.v1+json", []byte(config)),
		putBlob(t, repo, "application/vnd.oci.image.layer.v1.tar", layer.Bytes())))
	if r := mustRun(t, path, addr, "docker://"+addr+"/big:v1", "--push", addr+"/out:v1"); r.Bytes != int64(len(content)) {
		t.Errorf("built %+v", r)
	}
	change.Store(true)
	_, err = run(t, path, addr, "docker://"+addr+"/big:v1", "--push", addr+"/out:v2")
	if err == nil || !strings.Contains(err.Error(), "changes content") {
		t.Errorf("a changed layer: %v", err)
	}
}

// damaging breaks an answer off after left bytes, or changes one of them.
type damaging struct {
	http.ResponseWriter
	left int
	flip bool
}

func (d *damaging) Write(p []byte) (int, error) {
	if d.flip {
		if d.left -= len(p); d.left < 0 {
			p = bytes.Clone(p)
			p[0] ^= 1
			d.left = 1 << 30
		}
		return d.ResponseWriter.Write(p)
	}
	if len(p) > d.left {
		_, _ = d.ResponseWriter.Write(p[:d.left])
		_ = http.NewResponseController(d.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	d.left -= len(p)
	return d.ResponseWriter.Write(p)
}

func (d *damaging) Unwrap() http.ResponseWriter { return d.ResponseWriter }
