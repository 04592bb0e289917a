package driver_test

import (
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
)

var (
	hexA    = strings.Repeat("a1", 32)
	hexB    = strings.Repeat("b2", 32)
	zeroHex = strings.Repeat("0", 64)
)

// goodRequest is what kubelet sends for an inline volume.
func goodRequest() *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId:         "csi-1",
		TargetPath:       "/pods/1/mount",
		Readonly:         true,
		VolumeCapability: mountCapability(),
		VolumeContext: map[string]string{
			"image":                            "registry.example/app:1.0",
			"digest":                           "sha256:" + hexA,
			"csi.storage.k8s.io/ephemeral":     "true",
			"csi.storage.k8s.io/pod.name":      "web-0",
			"csi.storage.k8s.io/pod.namespace": "default",
		},
	}
}

func mountCapability(flags ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{MountFlags: flags}},
	}
}

func TestParsePublishAccepts(t *testing.T) {
	tests := []struct {
		name     string
		attrs    map[string]string // added; "-" removes
		optional bool              // digests are
		ref      string
		verity   string
		policy   string
	}{
		{name: "tag and digest", ref: "registry.example/app:1.0@sha256:" + hexA, policy: "IfNotPresent"},
		{
			name: "digest in image", attrs: map[string]string{"image": "registry.example/app@sha256:" + hexA, "digest": "-"},
			ref: "registry.example/app@sha256:" + hexA, policy: "IfNotPresent",
		},
		{
			name: "the same digest twice", attrs: map[string]string{"image": "registry.example/app@sha256:" + hexA},
			ref: "registry.example/app@sha256:" + hexA, policy: "IfNotPresent",
		},
		{
			name: "verity digest", attrs: map[string]string{"digest": "verity:" + hexB},
			ref: "registry.example/app:1.0", verity: hexB, policy: "IfNotPresent",
		},
		{
			name: "both kinds", attrs: map[string]string{"image": "registry.example/app@sha256:" + hexA, "digest": "verity:" + hexB},
			ref: "registry.example/app@sha256:" + hexA, verity: hexB, policy: "IfNotPresent",
		},
		{
			name: "tag only, where allowed", attrs: map[string]string{"digest": "-"}, optional: true,
			ref: "registry.example/app:1.0", policy: "Always",
		},
		{name: "Always", attrs: map[string]string{"pullPolicy": "Always"}, ref: "registry.example/app:1.0@sha256:" + hexA, policy: "Always"},
		{name: "Never", attrs: map[string]string{"pullPolicy": "Never"}, ref: "registry.example/app:1.0@sha256:" + hexA, policy: "Never"},
		{name: "eager", attrs: map[string]string{"mode": "eager"}, ref: "registry.example/app:1.0@sha256:" + hexA, policy: "IfNotPresent"},
		{name: "subPath", attrs: map[string]string{"subPath": "usr/share/..data"}, ref: "registry.example/app:1.0@sha256:" + hexA, policy: "IfNotPresent"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := goodRequest()
			setAttributes(req, tt.attrs)
			ref, verity, policy, err := driver.ParsePublish(req, !tt.optional)
			if err != nil {
				t.Fatal(err)
			}
			if tt.verity == "" {
				tt.verity = zeroHex
			}
			if ref != tt.ref || verity != tt.verity || policy != tt.policy {
				t.Errorf("got %s, verity %s, %s; want %s, verity %s, %s", ref, verity, policy, tt.ref, tt.verity, tt.policy)
			}
		})
	}
}

func setAttributes(req *csi.NodePublishVolumeRequest, attrs map[string]string) {
	for k, v := range attrs {
		req.VolumeContext[k] = v
		if v == "-" {
			delete(req.VolumeContext, k)
		}
	}
}

func TestParsePublishRefuses(t *testing.T) {
	attrs := func(kv ...string) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) {
			for i := 0; i < len(kv); i += 2 {
				setAttributes(r, map[string]string{kv[i]: kv[i+1]})
			}
		}
	}
	flags := func(list ...string) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = mountCapability(list...) }
	}
	target := func(p string) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) { r.TargetPath = p }
	}
	tests := []struct {
		name   string
		change func(*csi.NodePublishVolumeRequest)
		says   []string
	}{
		{"no volume id", func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "" }, []string{"volume id"}},
		{"no target", target(""), []string{"target path"}},
		{"relative target", target("pods/1"), []string{"absolute"}},
		{"target with dots", target("/pods/../etc"), []string{"absolute"}},
		{"target with a slash at the end", target("/pods/1/"), []string{"slashes"}},
		{"target is the root", target("/"), []string{"absolute"}},
		{"target with NUL", target("/pods/a\x00b"), []string{"absolute"}},
		{"target too long", target("/" + strings.Repeat("x", 4096)), []string{"4095"}},
		{"not read-only", func(r *csi.NodePublishVolumeRequest) { r.Readonly = false }, []string{"readOnly: true"}},
		{"no capability", func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil }, []string{"capability"}},
		{"no access type", func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.AccessType = nil }, []string{"access type"}},
		{"block", func(r *csi.NodePublishVolumeRequest) {
			r.VolumeCapability.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
		}, []string{"volumeMode: Filesystem"}},
		{"another file system", func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().FsType = "ext4" }, []string{"ext4", "puzzlefs"}},
		{"mount option", flags("ro", "user_id=0"), []string{"user_id=0", "noexec"}},
		{"looser", flags("dev"), []string{"mount option dev", "--mount-options"}},
		{"read-write", flags("rw"), []string{"mount option rw", "read-only"}},
		{"flag with a value", flags("ro=1"), []string{"ro=1", "no value"}},
		{"no label", flags("context="), []string{"context=", "container_file_t"}},
		{"label that ends", flags(`context="a",fd="3"`), []string{"context=", "container_file_t"}},
		{"label with a space", flags(`context="a b"`), []string{"context="}},
		{"two labels", flags(`context="a"`, `context="b"`), []string{"want one context"}},

		{"unknown key", attrs("fsType", "x"), []string{"fsType", "image, digest, pullPolicy, subPath, mode, mtime"}},
		{"misspelt key", attrs("pullpolicy", "Always"), []string{"did you mean pullPolicy?"}},
		{"misspelt digest", attrs("digset", "x"), []string{"did you mean digest?"}},
		{"mtime in words", attrs("mtime", "yesterday"), []string{"attribute mtime", "2026-01-31T12:00:00Z"}},
		{"mtime with a fraction of seconds since 1970", attrs("mtime", "1.5"), []string{"attribute mtime"}},
		{"mtime before 1970", attrs("mtime", "1969-12-31T23:59:59Z"), []string{"attribute mtime", "1970-01-01T00:00:00Z"}},
		{"mtime too late", attrs("mtime", "253402300800"), []string{"attribute mtime", "9999-12-31T23:59:59Z"}},
		{"no image", attrs("image", "-"), []string{"volumeAttributes.image"}},
		{"malformed image", attrs("image", "UPPER case"), []string{"image"}},
		{"image with scheme", attrs("image", "https://registry.example/app"), []string{"scheme"}},
		{"no digest", attrs("digest", "-"), []string{"sha256:<64 hex>", "verity:<64 hex>"}},
		{"bare hex", attrs("digest", hexA), []string{"sha256:<64 hex>", "verity:<64 hex>"}},
		{"short sha256", attrs("digest", "sha256:abcd"), []string{"64"}},
		{"upper case sha256", attrs("digest", "sha256:"+strings.ToUpper(hexA)), []string{"lower-case"}},
		{"sha256 of zeros", attrs("digest", "sha256:"+strings.Repeat("0", 64)), []string{"zeros", "build and push print"}},
		{"verity of zeros", attrs("digest", "verity:"+strings.Repeat("0", 64)), []string{"zeros", "build and push print"}},
		{"short verity", attrs("digest", "verity:abcd"), []string{"64"}},
		{"sha512", attrs("digest", "sha512:"+hexA+hexA), []string{"sha256:<64 hex>"}},
		{"two digests", attrs("image", "registry.example/app@sha256:"+hexB), []string{hexA, hexB}},
		{"pull policy", attrs("pullPolicy", "always"), []string{"Always, IfNotPresent or Never"}},
		{"lazy", attrs("mode", "lazy"), []string{"not in this version"}},
		{"other mode", attrs("mode", "fast"), []string{"eager"}},
		{"absolute subPath", attrs("subPath", "/etc"), []string{"relative"}},
		{"subPath upwards", attrs("subPath", "a/../../b"), []string{".."}},
		{"unclean subPath", attrs("subPath", "a//b/"), []string{`"a/b"`}},
		{"dot subPath", attrs("subPath", "."), []string{"leave it out"}},
		{"NUL subPath", attrs("subPath", "a\x00b"), []string{"NUL"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := goodRequest()
			tt.change(req)
			_, _, _, err := driver.ParsePublish(req, true)
			if !errors.Is(err, driver.ErrInvalid) {
				t.Fatalf("got %v, want an error that wraps ErrInvalid", err)
			}
			for _, s := range tt.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("the message does not say %q: %v", s, err)
				}
			}
		})
	}
}

func TestParsePublishNeverWithoutDigest(t *testing.T) {
	req := goodRequest()
	setAttributes(req, map[string]string{"digest": "-", "pullPolicy": "Never"})
	if _, _, _, err := driver.ParsePublish(req, false); !errors.Is(err, driver.ErrInvalid) {
		t.Errorf("got %v, want ErrInvalid", err)
	}
}

// TestParsePublishPersistent: a volume that is not ephemeral need not say read-only.
func TestParsePublishPersistent(t *testing.T) {
	req := goodRequest()
	delete(req.VolumeContext, "csi.storage.k8s.io/ephemeral")
	req.Readonly = false
	req.VolumeCapability = mountCapability("noexec", "ro")
	if _, _, _, err := driver.ParsePublish(req, true); err != nil {
		t.Error(err)
	}
}

func TestParsePublishSecrets(t *testing.T) {
	const secret = "hunter2"
	auth := base64.StdEncoding.EncodeToString([]byte("user:" + secret))
	tests := []struct {
		name    string
		secrets map[string]string
		ok      bool
	}{
		{"none", nil, true},
		{"good", map[string]string{".dockerconfigjson": `{"auths":{"registry.example":{"auth":"` + auth + `"}}}`}, true},
		{"not JSON", map[string]string{".dockerconfigjson": secret}, false},
		{"another shape", map[string]string{".dockerconfigjson": `{"auths":{"registry.example":"` + secret + `"}}`}, false},
		{"bad base64", map[string]string{".dockerconfigjson": `{"auths":{"registry.example":{"auth":"` + secret + `!"}}}`}, false},
		{"other keys", map[string]string{"username": "user", "password": secret}, false},
		{"one more key", map[string]string{".dockerconfigjson": `{"auths":{}}`, "password": secret}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := goodRequest()
			req.Secrets = tt.secrets
			_, _, _, err := driver.ParsePublish(req, true)
			if tt.ok != (err == nil) {
				t.Fatalf("got %v, want ok %t", err, tt.ok)
			}
			if err != nil && (!errors.Is(err, driver.ErrInvalid) || strings.Contains(err.Error(), secret)) {
				t.Errorf("want ErrInvalid without the secret, got %v", err)
			}
		})
	}
}
