package driver_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	sigstore "github.com/sigstore/sigstore/pkg/signature"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/signature"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// TestAllowedRegistries: what is not on the list is refused before anybody is asked, by whole
// components of the name.
func TestAllowedRegistries(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	digest := im.digest.String()
	allowed := map[string]bool{"team/app": true, "team/deep/er": true, "exact": true, "teams/app": false, "other": false, "exacts": false}
	refs := map[string]string{}
	for repository := range allowed {
		refs[repository] = reg.push(t, im, repository, "1")
	}
	n.cfg.Policy.AllowedRegistries = []string{reg.host + "/team", reg.host + "/exact", "docker.io/library"}
	n.start()
	for repository, ok := range allowed {
		reg.requests()
		req := n.request("a", refs[repository], digest)
		if ok {
			n.publish(req)
			n.shows(req.TargetPath, im)
			n.unpublish(req)
			continue
		}
		n.refused(req, codes.PermissionDenied, "--allowed-registries", reg.host+"/team", reg.host+"/"+repository)
		if asked := reg.requests(); len(asked) > 0 {
			t.Errorf("%s: the registry was asked: %v", repository, asked)
		}
	}
	// Short names are Docker Hub's, whatever they look like.
	for _, ref := range []string{"team/app", "docker.io/team/app", strings.ToUpper(reg.host[:1]) + "x.example/team/app"} {
		n.refused(n.request("b", ref, digest), codes.PermissionDenied, "--allowed-registries")
	}
	n.nothingLeft()

	// A volume that runs stays when the list gets shorter, and a new one is refused.
	running := n.request("c", refs["team/app"], digest)
	n.publish(running)
	n.stop()
	n.cfg.Policy.AllowedRegistries = []string{"registry.example.com"}
	n.start()
	n.shows(running.TargetPath, im)
	n.publish(running)
	n.refused(n.request("d", refs["team/app"], digest), codes.PermissionDenied, "registry.example.com")
	n.unpublish(running)
	n.nothingLeft()
}

func TestPolicyConfig(t *testing.T) {
	for _, prefix := range []string{
		"registry.example.com", "registry.example.com:5000/team", "localhost:5000", "docker.io", "docker.io/library", "[::1]:5000/a/b", "10.0.0.1:5000",
	} {
		cfg := testConfig("unix:///run/x.sock", "/var/lib/x", "")
		cfg.Policy.AllowedRegistries = []string{prefix}
		if _, err := driver.New(cfg); err != nil {
			t.Errorf("%q: %v", prefix, err)
		}
	}
	for _, prefix := range []string{
		"", "/", "https://registry.example.com", "registry.example.com/", "registry.example.com/Team", "team", "team/app", "*.example.com",
		"registry.example.com/app:1", "registry.example.com/app@sha256:" + hexA, "registry.example.com/*", " registry.example.com", "index.docker.io",
	} {
		cfg := testConfig("unix:///run/x.sock", "/var/lib/x", "")
		cfg.Policy.AllowedRegistries = []string{"registry.example.com", prefix}
		if _, err := driver.New(cfg); err == nil || !strings.Contains(err.Error(), "HOST[:PORT][/PATH]") {
			t.Errorf("%q: got %v, want an error that says what is meant", prefix, err)
		}
	}
	cfg := testConfig("unix:///run/x.sock", "/var/lib/x", "")
	cfg.Policy.MaxImageBytes = -1
	if _, err := driver.New(cfg); err == nil || !strings.Contains(err.Error(), "maximum image size") {
		t.Errorf("negative size: got %v", err)
	}
	cfg = testConfig("unix:///run/x.sock", "/var/lib/x", "")
	cfg.MetadataMemory = 1
	if _, err := driver.New(cfg); err == nil || !strings.Contains(err.Error(), "8.0 MiB") {
		t.Errorf("too little memory: got %v", err)
	}
}

// signer signs images as cosign does.
type signer struct {
	private *ecdsa.PrivateKey
	pem     []byte
}

func newSigner(t *testing.T) signer {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		t.Fatal(err)
	}
	return signer{private, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})}
}

// keys returns the public keys of signers.
func keys(t *testing.T, signers ...signer) *signature.Keys {
	t.Helper()
	var pems [][]byte
	for _, s := range signers {
		pems = append(pems, s.pem)
	}
	k, err := signature.ParseKeys(pems...)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// sign puts a signature of signed into the registry, beside image.
func (s signer) sign(t *testing.T, reg *testRegistry, repository string, image, signed format.Digest) {
	t.Helper()
	payload := fmt.Appendf(nil, `{"critical":{"identity":{"docker-reference":""},"image":{"docker-manifest-digest":%q},"type":"cosign container image signature"},"optional":null}`, signed)
	loaded, err := sigstore.LoadSigner(s.private, crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := loaded.SignMessage(bytes.NewReader(payload))
	if err != nil {
		t.Fatal(err)
	}
	blob := func(b []byte) map[string]any {
		d := format.DigestOf(b)
		reg.upload(t, http.MethodPost, fmt.Sprintf("/v2/%s/blobs/uploads/?digest=%v", repository, d), b)
		return map[string]any{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": d.String(), "size": len(b)}
	}
	layer := blob(payload)
	layer["mediaType"] = "application/vnd.dev.cosign.simplesigning.v1+json"
	layer["annotations"] = map[string]string{"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(sig)}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": format.MediaTypeManifest, "config": blob([]byte("{}")), "layers": []any{layer},
	})
	if err != nil {
		t.Fatal(err)
	}
	reg.upload(t, http.MethodPut, fmt.Sprintf("/v2/%s/manifests/sha256-%s.sig", repository, image.Hex()), manifest)
	reg.requests()
}

// TestSignature: with keys, an image needs a signature by one of them, however it is named.
func TestSignature(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	good, bad, unsigned := makeImage(t, "good\n", 2), makeImage(t, "bad\n", 2), makeImage(t, "unsigned\n", 2)
	mine, second, theirs := newSigner(t), newSigner(t), newSigner(t)
	ref := reg.push(t, good, "team/good", "1")
	mine.sign(t, reg, "team/good", good.digest, good.digest)
	badRef, unsignedRef := reg.push(t, bad, "team/bad", "1"), reg.push(t, unsigned, "team/unsigned", "1")
	n.cfg.Policy = driver.Policy{SignatureKeys: keys(t, second, mine)}
	n.start()

	denied := func(pod, ref, digest string, says ...string) {
		t.Helper()
		reg.requests()
		n.refused(n.request(pod, ref, digest), codes.PermissionDenied, append(says, "cosign sign --key", "2 configured keys")...)
		for _, path := range reg.requests() {
			if strings.Contains(path, bad.rootfs.Hex()) || strings.Contains(path, unsigned.rootfs.Hex()) {
				t.Errorf("%s was fetched though its signature is no good", path)
			}
		}
	}
	for _, digest := range []string{unsigned.digest.String(), "verity:" + unsigned.verity.String(), ""} {
		denied("a", unsignedRef, digest, fmt.Sprintf("at %s/team/unsigned:sha256-%s.sig", reg.host, unsigned.digest.Hex()), "there is no tag")
	}
	theirs.sign(t, reg, "team/bad", bad.digest, bad.digest)
	denied("b", badRef, bad.digest.String(), "another key")
	mine.sign(t, reg, "team/bad", bad.digest, good.digest)
	denied("c", badRef, bad.digest.String(), "another image")

	for i, digest := range []string{good.digest.String(), "verity:" + good.verity.String(), ""} {
		req := n.request(fmt.Sprint("d", i), ref, digest)
		n.publish(req)
		n.shows(req.TargetPath, good)
		n.unpublish(req)
	}
	n.nothingLeft()

	// What was verified is known, and costs nothing.
	reg.requests()
	cached := n.request("e", ref, good.digest.String())
	n.publish(cached)
	if asked := reg.requests(); len(asked) > 0 {
		t.Errorf("the registry was asked for what is known: %v", asked)
	}
	n.stop()

	// It is not enough for other keys: a running volume stays, a new one asks again.
	n.cfg.Policy = driver.Policy{SignatureKeys: keys(t, second)}
	n.start()
	n.shows(cached.TargetPath, good)
	n.publish(cached)
	n.refused(n.request("f", ref, good.digest.String()), codes.PermissionDenied, "the configured key", "another key")
	never := n.request("g", ref, good.digest.String())
	setAttributes(never, map[string]string{"pullPolicy": "Never"})
	n.refused(never, codes.PermissionDenied, "pullPolicy is Never")
	reg.set(func(r *testRegistry) { r.down = true })
	n.refused(n.request("h", ref, good.digest.String()), codes.Unavailable)
	reg.set(func(r *testRegistry) { r.down = false })
	second.sign(t, reg, "team/good", good.digest, good.digest)
	again := n.request("i", ref, good.digest.String())
	n.publish(again)
	n.stop()

	// Both signatures are known now, across restarts and without the registry.
	reg.set(func(r *testRegistry) { r.down = true })
	for _, set := range []*signature.Keys{keys(t, mine), keys(t, second), keys(t, theirs, mine)} {
		n.cfg.Policy = driver.Policy{SignatureKeys: set}
		n.start()
		known := n.request("j", ref, good.digest.String())
		n.publish(known)
		n.unpublish(known)
		n.stop()
	}
	n.cfg.Policy = driver.Policy{SignatureKeys: keys(t, theirs)}
	n.start()
	n.refused(n.request("k", ref, good.digest.String()), codes.Unavailable)
	n.unpublish(cached)
	n.unpublish(again)
	n.nothingLeft()
}

// TestSignaturePrivate: the signatures of a private image are read with the pod's secret.
func TestSignaturePrivate(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im, mine := makeImage(t, "secret\n", 1), newSigner(t)
	reg.set(func(r *testRegistry) { r.password = "hunter2" })
	ref := reg.push(t, im, "private/app", "1")
	mine.sign(t, reg, "private/app", im.digest, im.digest)
	n.cfg.Policy = driver.Policy{RequireDigest: true, SignatureKeys: keys(t, mine)}
	n.start()
	req := n.request("a", ref, im.digest.String())
	n.refused(req, codes.Unauthenticated)
	req.Secrets = dockerSecret(reg.host, "hunter2")
	n.publish(req)
	n.shows(req.TargetPath, im)
	n.refused(n.request("b", ref, im.digest.String()), codes.Unauthenticated)
	n.unpublish(req)
	n.nothingLeft()
}

// sized is an image of a kind that limits are for.
type sized struct {
	name  string
	image func(t *testing.T) *testImage
	says  string
}

// TestLimits: images that have too much are refused whatever their manifests say, and nothing
// of them stays mounted or tagged as a volume. The same node takes others.
func TestLimits(t *testing.T) {
	for _, tt := range []sized{
		{"large blobs", func(t *testing.T) *testImage { t.Helper(); return makeImage(t, "large\n", 20) }, "its blobs have"},
		{"large blobs that are said to be small", func(t *testing.T) *testImage {
			t.Helper()
			return lying(t, makeImage(t, "liar\n", 20))
		}, "its blobs have"},
		{"few bytes that stand for many", func(t *testing.T) *testImage {
			t.Helper()
			return tree(t, 10, 300)
		}, "its files have"},
		{"many inodes", func(t *testing.T) *testImage {
			t.Helper()
			return tree(t, 1001, 0)
		}, "--max-inodes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reg, n := newRegistry(t), newNode(t)
			im, small := tt.image(t), makeImage(t, "small\n", 1)
			ref, smallRef := reg.push(t, im, "app", "1"), reg.push(t, small, "small", "1")
			n.cfg.Policy.MaxImageBytes = 1 << 20
			n.cfg.Policy.MaxInodes = 1000
			n.start()
			for range 2 {
				n.refused(n.request("a", ref, im.digest.String()), codes.PermissionDenied, tt.says, "ask the administrator")
			}
			n.nothingLeft()
			fits := n.request("b", smallRef, small.digest.String())
			n.publish(fits)
			n.shows(fits.TargetPath, small)
			n.unpublish(fits)
			n.stop()

			// Without the limits it is an image like any other; with them it stays while it runs.
			policy := n.cfg.Policy
			n.cfg.Policy = driver.Policy{RequireDigest: true}
			n.start()
			req := n.request("c", ref, im.digest.String())
			n.publish(req)
			n.stop()
			n.cfg.Policy = policy
			n.start()
			n.publish(req)
			if _, err := os.ReadDir(req.TargetPath); err != nil {
				t.Error(err)
			}
			n.refused(n.request("d", ref, im.digest.String()), codes.PermissionDenied, "ask the administrator")
			n.unpublish(req)
			n.nothingLeft()
		})
	}
}

// TestMetadataMemory: the metadata of images is bounded for the node. An image that never
// fits is refused for good, one that others leave no room for is to be tried again, and what
// was published is mounted again in any order.
func TestMetadataMemory(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	huge := tree(t, 60_000, 0)
	hugeRef := reg.push(t, huge, "huge", "1")
	n.cfg.MetadataMemory = 9 << 20
	n.start()
	n.refused(n.request("a", hugeRef, huge.digest.String()), codes.PermissionDenied, "--metadata-memory", "9.0 MiB")
	wordy := wordy(t, tree(t, 10, 1))
	n.refused(n.request("w", reg.push(t, wordy, "wordy", "1"), wordy.digest.String()), codes.PermissionDenied, "--metadata-memory", "576.0 KiB")
	var all []*csi.NodePublishVolumeRequest
	for i := range 20 {
		im := tree(t, 6_500+i, 1)
		req := n.request(fmt.Sprint("pod", i), reg.push(t, im, "app", fmt.Sprint(i)), im.digest.String())
		all = append(all, req)
		if _, err := n.NodePublishVolume(t.Context(), req); err != nil {
			break
		}
	}
	last := len(all) - 1
	if last == 0 || last == 19 {
		t.Fatalf("%d of 20 images fit", last)
	}
	n.refused(all[last], codes.ResourceExhausted, "--metadata-memory", "tried again")
	n.unpublish(all[0])
	// The memory is free when the server has ended, which is soon.
	for {
		_, err := n.NodePublishVolume(t.Context(), all[last])
		if err == nil {
			break
		}
		if status.Code(err) != codes.ResourceExhausted {
			t.Fatal(err)
		}
	}
	n.refused(all[0], codes.ResourceExhausted, "--metadata-memory", "tried again")
	n.stop()
	n.cfg.MetadataMemory = 0
	n.start()
	n.publish(all[0])
	n.stop()
	n.cfg.MetadataMemory = 9 << 20
	n.start()
	for _, req := range all {
		if _, err := os.Stat(filepath.Join(req.TargetPath, "0")); err != nil {
			t.Errorf("a published volume is not mounted again: %v", err)
		}
		n.unpublish(req)
	}
	n.nothingLeft()
}

// lying returns an image whose manifest says that each blob has one byte.
func lying(t *testing.T, im *testImage) *testImage {
	t.Helper()
	m, err := format.ParseManifest(im.manifest)
	if err != nil {
		t.Fatal(err)
	}
	for i := range m.Layers {
		m.Layers[i].Size = 1
	}
	if im.manifest, err = m.Encode(); err != nil {
		t.Fatal(err)
	}
	im.digest, im.verity = format.DigestOf(im.manifest), verity.Sum(im.manifest)
	return im
}

// wordy returns an image with a manifest of more than a megabyte.
func wordy(t *testing.T, im *testImage) *testImage {
	t.Helper()
	m, err := format.ParseManifest(im.manifest)
	if err != nil {
		t.Fatal(err)
	}
	m.Annotations = map[string]string{"words": strings.Repeat("word ", 200_000)}
	if im.manifest, err = m.Encode(); err != nil {
		t.Fatal(err)
	}
	im.digest, im.verity = format.DigestOf(im.manifest), verity.Sum(im.manifest)
	return im
}

// tree returns an image with that many inodes: files, each of which is chunks times the same
// chunk.
func tree(t *testing.T, inodes, chunks int) *testImage {
	t.Helper()
	content := fmt.Appendf(nil, "%d %s", chunks, strings.Repeat("x", 400))
	chunk := format.FileChunk{Blob: format.BlobRef{Digest: format.DigestOf(content)}, Len: uint64(len(content))}
	list := format.InodeVector{{Ino: 1, Kind: format.KindDir, Perm: 0o755}}
	for i := range inodes - 1 {
		file := format.Inode{Ino: uint64(i + 2), Kind: format.KindFile, Perm: 0o644}
		for range chunks {
			file.Chunks = append(file.Chunks, chunk)
		}
		list = append(list, file)
		list[0].Entries = append(list[0].Entries, format.DirEntry{Ino: file.Ino, Name: fmt.Append(nil, i)})
	}
	return assemble(t, list, content)
}

// assemble makes an image of inodes and the one blob that they refer to.
func assemble(t *testing.T, inodes format.InodeVector, content []byte) *testImage {
	t.Helper()
	chunk := format.DigestOf(content)
	rootfs, err := format.EncodeRootfs(&format.Rootfs{
		Version: format.Version3, Layers: []format.InodeVector{inodes},
		Verity: []format.VerityData{{Digest: chunk, Verity: verity.Sum(content)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	im := &testImage{rootfs: format.DigestOf(rootfs), chunks: []format.Digest{chunk}}
	im.blobs = map[format.Digest][]byte{
		im.rootfs: rootfs, chunk: content, format.DigestOf([]byte(format.EmptyConfig)): []byte(format.EmptyConfig),
	}
	m := format.NewManifest(format.Descriptor{Digest: im.rootfs, Size: int64(len(rootfs))}, verity.Sum(rootfs),
		[]format.Descriptor{{MediaType: format.MediaTypeChunk, Digest: chunk, Size: int64(len(content))}})
	if im.manifest, err = m.Encode(); err != nil {
		t.Fatal(err)
	}
	im.digest, im.verity = format.DigestOf(im.manifest), verity.Sum(im.manifest)
	return im
}

// TestPolicyLeavesPublished: a volume that was published before its node wanted digests stays, and
// kubelet, which publishes again what is published, gets no error.
func TestPolicyLeavesPublished(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.cfg.Policy = driver.Policy{}
	n.start()
	req := n.request("a", ref, "")
	n.publish(req)
	n.stop()
	n.cfg.Policy = driver.Policy{RequireDigest: true, AllowedRegistries: []string{"elsewhere.example"}, SignatureKeys: keys(t, newSigner(t)), MaxImageBytes: 1, MaxInodes: 1}
	n.start()
	n.publish(req)
	n.shows(req.TargetPath, im)
	n.refused(n.request("b", ref, ""), codes.InvalidArgument, "no digest")
	n.unpublish(req)
	n.refused(req, codes.InvalidArgument, "no digest")
	n.nothingLeft()
}
