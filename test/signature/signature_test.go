// Package signature_test signs images with cosign itself and has the driver mount them, or not.
package signature_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/sigstore/cosign/v2/cmd/cosign/cli/options"
	"github.com/sigstore/cosign/v2/cmd/cosign/cli/sign"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	v1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	sigstore "github.com/sigstore/sigstore/pkg/signature"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/signature"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// TestCosign signs with each kind of key that cosign makes; the driver mounts what is signed.
func TestCosign(t *testing.T) {
	for _, algorithm := range []v1.PublicKeyDetails{
		v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256, v1.PublicKeyDetails_PKIX_ECDSA_P384_SHA_384, v1.PublicKeyDetails_PKIX_ECDSA_P521_SHA_512,
		v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_2048_SHA256, v1.PublicKeyDetails_PKIX_ED25519,
	} {
		t.Run(algorithm.String(), func(t *testing.T) {
			host := startRegistry(t)
			im := push(t, host, "app", "small")
			keys := newKeys(t, algorithm)
			csi := startDriver(t, keys.public)
			csi.refuses(im, "there is no tag")
			cosignSign(t, keys, im, nil)
			csi.mounts(im)
		})
	}
}

// TestCosignRefused changes what cosign wrote, or has somebody else sign.
func TestCosignRefused(t *testing.T) {
	mine, theirs := newKeys(t, v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256), newKeys(t, v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256)
	for _, tt := range []struct {
		name string
		// sign signs im, or other, and changes what that left in the registry.
		sign func(t *testing.T, host string, im, other signed)
		says string
	}{
		{"by another key", func(t *testing.T, _ string, im, _ signed) { t.Helper(); cosignSign(t, theirs, im, nil) }, "another key"},
		{"another image only", func(t *testing.T, _ string, _, other signed) { t.Helper(); cosignSign(t, mine, other, nil) }, "there is no tag"},
		{"the signature of another image", func(t *testing.T, host string, im, other signed) {
			t.Helper()
			cosignSign(t, mine, other, nil)
			put(t, host, "app", signature.Tag(im.digest), get(t, host, "/v2/app/manifests/"+signature.Tag(other.digest)))
		}, "another image"},
		{"a changed payload", func(t *testing.T, host string, im, _ signed) {
			t.Helper()
			cosignSign(t, mine, im, nil)
			change(t, host, im, func(l *layer) {
				b := bytes.Replace(get(t, host, "/v2/app/blobs/"+l.Digest), []byte(`"optional":`), []byte(`"optional": `), 1)
				l.Digest, l.Size = upload(t, host, "app", b).String(), len(b)
			})
		}, "not for its payload"},
		{"a changed signature", func(t *testing.T, host string, im, _ signed) {
			t.Helper()
			cosignSign(t, mine, im, nil)
			change(t, host, im, func(l *layer) {
				sig, err := base64.StdEncoding.DecodeString(l.Annotations[annotation])
				if err != nil {
					t.Fatal(err)
				}
				sig[len(sig)-1] ^= 1
				l.Annotations[annotation] = base64.StdEncoding.EncodeToString(sig)
			})
		}, "not for its payload"},
		{"no signature in the annotation", func(t *testing.T, host string, im, _ signed) {
			t.Helper()
			cosignSign(t, mine, im, nil)
			change(t, host, im, func(l *layer) { delete(l.Annotations, annotation) })
		}, "holds no signature"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			host := startRegistry(t)
			im, other := push(t, host, "app", "small"), push(t, host, "app", "segments")
			tt.sign(t, host, im, other)
			csi := startDriver(t, mine.public)
			csi.refuses(im, tt.says)
			// A good signature beside the bad one is enough.
			cosignSign(t, mine, im, map[string]any{"time": "later"})
			csi.mounts(im)
		})
	}
}

// TestCosignSeveral: of several signatures, by several keys, one by one of ours is enough.
func TestCosignSeveral(t *testing.T) {
	host := startRegistry(t)
	im := push(t, host, "app", "small")
	p256 := v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256
	mine, theirs, stranger := newKeys(t, p256), newKeys(t, p256), newKeys(t, p256)
	for _, k := range []keyPair{theirs, mine, theirs} {
		cosignSign(t, k, im, nil)
	}
	startDriver(t, mine.public).mounts(im)
	startDriver(t, stranger.public, theirs.public).mounts(im)
	startDriver(t, stranger.public).refuses(im, "another key")
}

const annotation = "dev.cosignproject.cosign/signature"

// signed is an image in the registry, to be signed.
type signed struct {
	ref    string // with tag
	digest format.Digest
}

// startRegistry runs a registry and returns its host.
func startRegistry(t *testing.T) string {
	t.Helper()
	srv := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// push pushes a golden image.
func push(t *testing.T, host, repository, tag string) signed {
	t.Helper()
	src, err := store.Open(store.Config{Dir: "../../testdata/images/v3-master"})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	root, err := src.Resolve(tag)
	if err != nil {
		t.Fatal(err)
	}
	client, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	ref := host + "/" + repository + ":" + tag
	to, err := registry.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Push(t.Context(), src, root, to, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	return signed{ref, root.Digest}
}

// keyPair is what cosign generate-key-pair writes.
type keyPair struct {
	private string // path
	public  []byte
}

func password(bool) ([]byte, error) { return []byte("secret"), nil }

func newKeys(t *testing.T, algorithm v1.PublicKeyDetails) keyPair {
	t.Helper()
	details, err := sigstore.GetAlgorithmDetails(algorithm)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := cosign.GenerateKeyPairWithAlgorithm(&details, password)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "cosign.key")
	if err := os.WriteFile(path, keys.PrivateBytes, 0o600); err != nil {
		t.Fatal(err)
	}
	return keyPair{path, keys.PublicBytes}
}

// cosignSign is cosign sign --key PRIVATE --tlog-upload=false HOST/REPOSITORY@DIGEST, as the
// command runs it.
func cosignSign(t *testing.T, k keyPair, im signed, annotations map[string]any) {
	t.Helper()
	repository, _, _ := strings.Cut(im.ref, ":small")
	repository, _, _ = strings.Cut(repository, ":segments")
	o := options.SignOptions{Key: k.private, Upload: true, Registry: options.RegistryOptions{AllowHTTPRegistry: true}}
	for key, value := range annotations {
		o.Annotations = append(o.Annotations, fmt.Sprintf("%s=%v", key, value))
	}
	ko := options.KeyOpts{KeyRef: k.private, PassFunc: password}
	if err := sign.SignCmd(&options.RootOptions{Timeout: time.Minute}, ko, o, []string{repository + "@" + im.digest.String()}); err != nil {
		t.Fatal(err)
	}
}

// layer is a signature in a manifest that cosign wrote.
type layer struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations"`
}

// change changes the signatures of an image of the repository app.
func change(t *testing.T, host string, im signed, f func(*layer)) {
	t.Helper()
	var manifest struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Config        json.RawMessage `json:"config"`
		Layers        []layer         `json:"layers"`
	}
	if err := json.Unmarshal(get(t, host, "/v2/app/manifests/"+signature.Tag(im.digest)), &manifest); err != nil {
		t.Fatal(err)
	}
	if len(manifest.Layers) != 1 {
		t.Fatalf("cosign wrote %d signatures, want 1", len(manifest.Layers))
	}
	f(&manifest.Layers[0])
	b, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	put(t, host, "app", signature.Tag(im.digest), b)
}

func do(t *testing.T, method, url, contentType string, body []byte, want int) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != want {
		t.Fatalf("%s %s: %s, %v: %s", method, url, resp.Status, err, b)
	}
	return b
}

func get(t *testing.T, host, path string) []byte {
	t.Helper()
	return do(t, http.MethodGet, "http://"+host+path, "", nil, http.StatusOK)
}

func put(t *testing.T, host, repository, tag string, manifest []byte) {
	t.Helper()
	do(t, http.MethodPut, fmt.Sprintf("http://%s/v2/%s/manifests/%s", host, repository, tag), format.MediaTypeManifest, manifest, http.StatusCreated)
}

func upload(t *testing.T, host, repository string, b []byte) format.Digest {
	t.Helper()
	d := format.DigestOf(b)
	do(t, http.MethodPost, fmt.Sprintf("http://%s/v2/%s/blobs/uploads/?digest=%v", host, repository, d), "application/octet-stream", b, http.StatusCreated)
	return d
}

// testDriver is a driver that wants signatures.
type testDriver struct {
	t    *testing.T
	node csi.NodeClient
	dir  string
}

// startDriver runs the real driver with public keys until the test ends.
func startDriver(t *testing.T, public ...[]byte) *testDriver {
	t.Helper()
	keys, err := signature.ParseKeys(public...)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "pzs") // short, because of the limit on the paths of sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	endpoint := "unix://" + filepath.Join(dir, "csi.sock")
	d, err := driver.New(driver.Config{
		Endpoint: endpoint, NodeID: "node-1", StateDir: filepath.Join(dir, "state"),
		Policy:  driver.Policy{RequireDigest: true, SignatureKeys: keys},
		Mounter: mounter{}, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("driver ended with: %v", err)
		}
	})
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &testDriver{t, csi.NewNodeClient(conn), dir}
}

// request is a volume of an image.
func (d *testDriver) request(im signed) *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId: "csi-1", TargetPath: filepath.Join(d.dir, "target"), Readonly: true,
		VolumeContext: map[string]string{"image": im.ref, "digest": im.digest.String(), "csi.storage.k8s.io/ephemeral": "true"},
		VolumeCapability: &csi.VolumeCapability{
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		},
	}
}

// mounts publishes a volume of an image, looks into it and unpublishes it.
func (d *testDriver) mounts(im signed) {
	d.t.Helper()
	req := d.request(im)
	if _, err := d.node.NodePublishVolume(d.t.Context(), req); err != nil {
		d.t.Errorf("publish: %v", err)
		return
	}
	if list, err := os.ReadDir(req.TargetPath); err != nil || len(list) == 0 {
		d.t.Errorf("list the volume: %v, %v", list, err)
	}
	if _, err := d.node.NodeUnpublishVolume(d.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: req.VolumeId, TargetPath: req.TargetPath}); err != nil {
		d.t.Errorf("unpublish: %v", err)
	}
}

// refuses wants the image to be denied, for the reason that is said, and nothing left.
func (d *testDriver) refuses(im signed, says string) {
	d.t.Helper()
	req := d.request(im)
	_, err := d.node.NodePublishVolume(d.t.Context(), req)
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "cosign sign --key") {
		d.t.Errorf("publish: %v; want PermissionDenied and %q", err, says)
	}
	if _, err := os.Lstat(req.TargetPath); !os.IsNotExist(err) {
		d.t.Errorf("the target is left: %v", err)
	}
}

// mounter serves images with the real FUSE server, as the command does.
type mounter struct{}

func (mounter) Mount(_ context.Context, img *image.Image, spec driver.MountSpec) (driver.Mount, error) {
	return fuse.Mount(fuse.Config{
		Image: img, Dir: spec.Dir, FSName: spec.Source, Logger: slog.New(slog.DiscardHandler),
		ModTime: spec.ModTime, Dev: spec.Dev, Suid: spec.Suid, NoExec: spec.NoExec, SELinux: spec.SELinux,
	})
}
