package registry_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

func isUpload(r *http.Request) bool {
	return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/blobs/uploads/")
}

func isManifestPut(r *http.Request) bool {
	return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/")
}

func TestPushReferences(t *testing.T) {
	im := newImage(t, 1)
	other := format.DigestOf([]byte("other"))
	tests := []struct {
		name, suffix, want string
		kind               error
	}{
		{"nothing", "", "/manifests/latest", nil},
		{"tag", ":v1", "/manifests/v1", nil},
		{"digest", "@" + im.desc.Digest.String(), "/manifests/" + im.desc.Digest.String(), nil},
		{"tag and digest", ":v2@" + im.desc.Digest.String(), "/manifests/v2", nil},
		{"another digest", ":v3@" + other.String(), "", registry.ErrDigestMismatch},
	}
	hk, addr := serve(t, memory())
	c := newClient(t, nil)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			hk.set(nil)
			ref := mustParse(t, addr+"/app"+tt.suffix)
			got, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{})
			if tt.kind != nil {
				wantError(t, err, []error{tt.kind}, im.desc.Digest.String(), other.String())
				if n := hk.count(""); n != 0 {
					t.Errorf("%d requests were made", n)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.Digest != im.desc.Digest || hk.count("PUT", tt.want) != 1 {
				t.Errorf("pushed %s, requests %q", got.Digest, hk.reqs)
			}
			desc, _, err := c.Resolve(t.Context(), ref)
			if err != nil || desc.Digest != im.desc.Digest {
				t.Errorf("resolved %s, %v", desc.Digest, err)
			}
		})
	}
}

func TestPushRefusesOtherRoots(t *testing.T) {
	im := newImage(t, 1)
	c := newClient(t, nil)
	ref := mustParse(t, "registry.invalid/app")
	rootfs := im.m.Layers[0]
	_, err := c.Push(t.Context(), im.store, rootfs, ref, registry.PushOptions{})
	wantError(t, err, []error{format.ErrUnsupportedVersion}, "version 1 or 2", "extract and rebuild")
	rootfs.MediaType = format.MediaTypeIndex
	_, err = c.Push(t.Context(), im.store, rootfs, ref, registry.PushOptions{})
	wantError(t, err, []error{format.ErrNotPuzzleFS}, format.MediaTypeIndex)
	rootfs.MediaType = format.MediaTypeManifest
	_, err = c.Push(t.Context(), im.store, rootfs, ref, registry.PushOptions{})
	wantError(t, err, []error{format.ErrCorrupt})
	_, err = c.Push(t.Context(), im.store, im.desc, registry.Reference{Registry: "registry.invalid", Repository: "UPPER", Tag: "x"}, registry.PushOptions{})
	wantError(t, err, []error{registry.ErrInvalidReference}, "UPPER")
	_, err = c.Push(t.Context(), im.store, im.desc, registry.Reference{}, registry.PushOptions{})
	wantError(t, err, []error{registry.ErrInvalidReference})
}

func TestPushIncompleteLayout(t *testing.T) {
	_, addr := serve(t, memory())
	hk, empty := serve(t, memory())
	im := newImage(t, 3)
	ref := mustPush(t, im, addr, "whole")
	c := newClient(t, nil)
	missing := im.m.Layers[3].Digest
	file := filepath.Join(im.store.Dir(), "blobs/sha256", missing.Hex())

	if err := os.WriteFile(file, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := c.Push(t.Context(), im.store, im.desc, mustParse(t, empty+"/app"), registry.PushOptions{})
	wantError(t, err, []error{store.ErrDigestMismatch}, missing.String(), im.store.Dir(), "csi-puzzlefs verify")

	if err := im.store.Remove(missing); err != nil {
		t.Fatal(err)
	}
	hk.set(nil)
	_, err = c.Push(t.Context(), im.store, im.desc, mustParse(t, empty+"/app"), registry.PushOptions{})
	wantError(t, err, []error{store.ErrNotFound}, missing.String(), im.store.Dir(), "incomplete")
	if n := hk.count("PUT", "/manifests/"); n != 0 {
		t.Error("the manifest was pushed though a blob is missing")
	}
	// The registry that has it does not need it.
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Error(err)
	}
	// The configuration is in its descriptor.
	im = newImage(t, 4)
	if err := im.store.Remove(im.m.Config.Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Push(t.Context(), im.store, im.desc, mustParse(t, empty+"/app"), registry.PushOptions{}); err != nil {
		t.Error(err)
	}
}

func TestPushDamagedLargeBlob(t *testing.T) {
	_, addr := serve(t, memory())
	im := newImage(t, 0)
	big := im.m.Layers[2].Digest
	f, err := os.OpenFile(filepath.Join(im.store.Dir(), "blobs/sha256", big.Hex()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("xxxx"), large/2); err != nil {
		t.Fatal(err)
	}
	_, err = newClient(t, nil).Push(t.Context(), im.store, im.desc, mustParse(t, addr+"/app"), registry.PushOptions{})
	wantError(t, err, []error{store.ErrDigestMismatch}, big.String(), "csi-puzzlefs verify")
}

// Whatever happens a few times to uploads is overcome.
func TestPushOvercomes(t *testing.T) {
	im := newImage(t, 8)
	faults := map[string]func(t *testing.T, w http.ResponseWriter, r *http.Request){
		"500": func(_ *testing.T, w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
		},
		"429":   func(_ *testing.T, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) },
		"reset": func(t *testing.T, w http.ResponseWriter, _ *http.Request) { reset(t, w) },
		"reset half-way": func(t *testing.T, w http.ResponseWriter, r *http.Request) {
			_, _ = io.CopyN(io.Discard, r.Body, 500)
			reset(t, w)
		},
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			hk, addr := serve(t, memory())
			var n atomic.Int32
			hk.set(func(w http.ResponseWriter, r *http.Request) bool {
				// Every fourth request: none fails as often as there are attempts.
				if n.Add(1)%4 == 0 {
					fault(t, w, r)
					return true
				}
				return false
			})
			c := newClient(t, func(cfg *registry.Config) { cfg.Retry.Attempts = 20 })
			ref := mustParse(t, addr+"/app")
			var last registry.Progress
			_, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{Progress: func(p registry.Progress) { last = p }})
			if err != nil {
				t.Fatal(err)
			}
			if last.DoneBytes != last.TotalBytes || last.DoneBlobs != last.TotalBlobs {
				t.Errorf("progress ends at %+v", last)
			}
			hk.set(nil)
			dst := newStore(t)
			if _, err := c.Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
				t.Fatal(err)
			}
			im.checkWhole(t, dst)
		})
	}
}

func TestPushAnswers(t *testing.T) {
	invalid := `{"errors":[{"code":"MANIFEST_INVALID","message":"manifest invalid"}]}`
	isPost := func(r *http.Request) bool { return r.Method == http.MethodPost }
	isHead := func(r *http.Request) bool { return r.Method == http.MethodHead }
	tests := []struct {
		name   string
		match  func(*http.Request) bool
		status int
		header map[string]string
		body   string
		kind   error
		words  []string
	}{
		{name: "HEAD 401", match: isHead, status: 401, kind: registry.ErrUnauthorized, words: []string{"put blob sha256:", "docker login"}},
		{name: "HEAD 500", match: isHead, status: 500, kind: registry.ErrUnavailable},
		{name: "POST 403", match: isPost, status: 403, kind: registry.ErrForbidden, words: []string{"do not allow it"}},
		{name: "POST 404", match: isPost, status: 404, kind: registry.ErrNotFound},
		{name: "POST 405", match: isPost, status: 405, kind: registry.ErrRefused},
		{name: "POST without location", match: isPost, status: 202, kind: registry.ErrUnexpectedAnswer, words: []string{"where to upload"}},
		{name: "POST to a file", match: isPost, status: 202, header: map[string]string{"Location": "file:///etc/passwd"}, kind: registry.ErrUnexpectedAnswer},
		{name: "PUT 400", match: isUpload, status: 400, body: `{"errors":[{"code":"DIGEST_INVALID"}]}`, kind: registry.ErrRefused, words: []string{"DIGEST_INVALID"}},
		{name: "PUT 413", match: isUpload, status: 413, kind: registry.ErrRefused, words: []string{"413"}},
		{name: "PUT 200", match: isUpload, status: 200, kind: registry.ErrUnexpectedAnswer},
		{name: "manifest 400", match: isManifestPut, status: 400, body: invalid, kind: registry.ErrRefused, words: []string{"put manifest", "MANIFEST_INVALID"}},
		{name: "manifest 413", match: isManifestPut, status: 413, header: map[string]string{"Content-Type": "text/html"}, body: "<html>", kind: registry.ErrRefused, words: []string{"4 MiB"}},
		{name: "manifest under another digest", match: isManifestPut, status: 201, header: map[string]string{"Docker-Content-Digest": "sha256:other"}, kind: registry.ErrDigestMismatch},
	}
	hk, addr := serve(t, memory())
	im := newImage(t, 3)
	c := newClient(t, nil)
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			hk.set(answer(tt.match, tt.status, tt.header, tt.body))
			ref := mustParse(t, fmt.Sprintf("%s/app%d", addr, i))
			_, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{})
			wantError(t, err, []error{tt.kind}, append(tt.words, "push "+ref.String())...)
		})
	}
}

// Compressed images of crate 0.2.0 have wrong sizes, which some registries check.
func TestPushWrongSizesRefused(t *testing.T) {
	hk, addr := serve(t, memory())
	im := newImage(t, 1)
	im.m.Layers[3].Size = 1 << 20
	im.seal(t)
	hk.set(answer(isManifestPut, 400, nil, `{"errors":[{"code":"SIZE_INVALID"}]}`))
	_, err := newClient(t, nil).Push(t.Context(), im.store, im.desc, mustParse(t, addr+"/app"), registry.PushOptions{})
	wantError(t, err, []error{registry.ErrRefused}, "puzzlefs 0.2.0", "rebuild", im.m.Layers[3].Digest.String())
}

// A registry that gives no digest for a manifest is asked what it stored.
func TestPushWithoutDigestHeader(t *testing.T) {
	im := newImage(t, 1)
	for _, lies := range []bool{false, true} {
		t.Run(fmt.Sprint("lies ", lies), func(t *testing.T) {
			hk, addr := serve(t, memory())
			hk.set(func(w http.ResponseWriter, r *http.Request) bool {
				if isManifestPut(r) {
					w.WriteHeader(http.StatusCreated)
					return true
				}
				if r.Method == http.MethodHead && strings.Contains(r.URL.Path, "/manifests/") {
					d := im.desc.Digest
					if lies {
						d = im.m.Layers[0].Digest
					}
					w.Header().Set("Docker-Content-Digest", d.String())
					return true
				}
				return false
			})
			_, err := newClient(t, nil).Push(t.Context(), im.store, im.desc, mustParse(t, addr+"/app"), registry.PushOptions{})
			if lies {
				wantError(t, err, []error{registry.ErrDigestMismatch}, im.desc.Digest.String(), im.m.Layers[0].Digest.String())
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// An upload may go to another host; credentials do not.
func TestUploadElsewhere(t *testing.T) {
	reg := memory()
	im := newImage(t, 2)
	_, other := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("credentials went to another host")
		}
		if r.URL.Query().Get("X-Signature") != "a b" {
			t.Errorf("the signature was changed: %q", r.URL.RawQuery)
		}
		reg.ServeHTTP(w, r)
	}))
	hk, addr := serve(t, reg)
	hk.set(func(w http.ResponseWriter, r *http.Request) bool {
		if basicAuth(w, r) {
			return true
		}
		if r.Method == http.MethodPost {
			w.Header().Set("Location", "http://"+strings.Replace(other, "127.0.0.1", "localhost", 1)+r.URL.Path+"1?X-Signature=a%20b")
			w.WriteHeader(http.StatusAccepted)
			return true
		}
		return false
	})
	c := newClient(t, func(cfg *registry.Config) {
		cfg.Credentials = func(context.Context, string, string) (registry.Credential, error) {
			return registry.Credential{Username: user, Password: password}, nil
		}
	})
	ref := mustParse(t, addr+"/app")
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Pull(t.Context(), ref, newStore(t), registry.PullOptions{}); err != nil {
		t.Fatal(err)
	}
}

// A manifest over 4 MiB is announced, and its refusal explained.
func TestPushLargeManifest(t *testing.T) {
	hk, addr := serve(t, memory())
	im := newImage(t, 1)
	im.m.Annotations = map[string]string{"filler": strings.Repeat("x", 4<<20)}
	im.seal(t)
	c := newClient(t, nil)
	ref := mustParse(t, addr+"/app")
	var warnings []string
	opts := registry.PushOptions{Warn: func(m string) { warnings = append(warnings, m) }}
	if _, err := c.Push(t.Context(), im.store, im.desc, ref, opts); err != nil {
		t.Fatal(err)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0], "most registries refuse more than 4 MiB") {
		t.Errorf("warnings %q", warnings)
	}
	if _, err := c.Pull(t.Context(), ref, newStore(t), registry.PullOptions{}); err != nil {
		t.Error(err)
	}
	for _, status := range []int{413, 400, 500} {
		hk.set(answer(isManifestPut, status, nil, ""))
		_, err := c.Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{})
		wantError(t, err, nil, fmt.Sprint(im.desc.Size), "--chunker", fmt.Sprint(status))
	}
}

// Blobs that another repository of the registry has are taken from there, or sent where
// that is not possible.
func TestMountFrom(t *testing.T) {
	hk, addr := serve(t, memory())
	im := newImage(t, 5)
	blobs := len(im.m.Blobs())
	mustPush(t, im, addr, "team/base")
	isMount := func(r *http.Request) bool { return r.Method == http.MethodPost && r.URL.Query().Get("mount") != "" }
	answerMounts := func(status int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if isMount(r) {
				w.WriteHeader(status)
			}
			return isMount(r)
		}
	}
	for _, tt := range []struct {
		name, repo, from string
		hook             func(http.ResponseWriter, *http.Request) bool
		mounts, sent     int // requests to mount, and with content
	}{
		{"mounted", "team/one", "team/base", answerMounts(http.StatusCreated), blobs, 0},
		{"nothing said", "team/two", "", nil, 0, blobs},
		{"the same repository", "team/three", "team/three", nil, 0, blobs},
		{"not given", "team/four", "team/base", nil, blobs, blobs},
		{"no permission", "team/five", "team/base", answerMounts(http.StatusForbidden), 1, blobs},
		{"no mounts at all", "team/six", "team/base", answerMounts(http.StatusMethodNotAllowed), 1, blobs},
		{"not there any more", "team/seven", "team/base", answerMounts(http.StatusNotFound), blobs, blobs},
		{"mounts that fail", "team/eight", "team/base", answerMounts(http.StatusInternalServerError), blobs, blobs},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var mounts atomic.Int32
			hk.set(func(w http.ResponseWriter, r *http.Request) bool {
				if isMount(r) {
					mounts.Add(1)
				}
				if r.Method == http.MethodHead && strings.Contains(r.URL.Path, "/blobs/") {
					// The registry under test shares blobs between all repositories.
					w.WriteHeader(http.StatusNotFound)
					return true
				}
				return tt.hook != nil && tt.hook(w, r)
			})
			var last registry.Progress
			ref := mustParse(t, addr+"/"+tt.repo+":v1")
			_, err := newClient(t, nil).Push(t.Context(), im.store, im.desc, ref, registry.PushOptions{
				MountFrom: tt.from, Progress: func(p registry.Progress) { last = p },
			})
			if err != nil {
				t.Fatal(err)
			}
			sent := hk.count("PUT ", "/blobs/uploads/")
			if n := int(mounts.Load()); n != tt.mounts || sent != tt.sent {
				t.Errorf("%d mounts and %d uploads, want %d and %d", n, sent, tt.mounts, tt.sent)
			}
			if last.ReusedBlobs != blobs-sent || last.DoneBytes != last.TotalBytes {
				t.Errorf("%d of %d blobs were sent, progress says %+v", sent, blobs, last)
			}
			hk.set(nil)
			dst := newStore(t)
			if _, err := newClient(t, nil).Pull(t.Context(), ref, dst, registry.PullOptions{}); err != nil {
				t.Fatal(err)
			}
			im.checkWhole(t, dst)
		})
	}
}
