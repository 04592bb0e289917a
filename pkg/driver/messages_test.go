package driver_test

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// quotedErrors matches the blocks of docs/attributes.md that quote errors, one a line.
var quotedErrors = regexp.MustCompile("(?s)```errors\n(.*?)```")

// longHex matches digests, which the page writes as <64 hex>.
var longHex = regexp.MustCompile(`[0-9a-f]{64}`)

// TestDocumentedErrors: each error that docs/attributes.md quotes is one that the driver gives,
// to the letter, and each of those below is quoted there.
func TestDocumentedErrors(t *testing.T) {
	page, err := os.ReadFile("../../docs/attributes.md")
	if err != nil {
		t.Fatal(err)
	}
	var quoted []string
	for _, block := range quotedErrors.FindAllStringSubmatch(string(page), -1) {
		quoted = append(quoted, strings.Split(strings.TrimSpace(block[1]), "\n")...)
	}
	given := documentedErrors(t)
	for _, line := range given {
		if !slices.Contains(quoted, line) {
			t.Errorf("not in docs/attributes.md:\n%s", line)
		}
	}
	for _, line := range quoted {
		if !slices.Contains(given, line) {
			t.Errorf("quoted in docs/attributes.md, and given by nobody:\n%s", line)
		}
	}
}

// documentedErrors makes the errors that the page is about, as the page writes them.
func documentedErrors(t *testing.T) []string {
	t.Helper()
	reg := newRegistry(t)
	im, moved := makeImage(t, "hello\n", 2), makeImage(t, "moved\n", 2)
	reg.push(t, im, "team/app", "1.0")
	ref := reg.push(t, moved, "team/app", "2.0")
	digest := moved.digest.String()
	reg.upload(t, "PUT", "/v2/team/web/manifests/1.0", []byte(`{"schemaVersion":2,"mediaType":"`+format.MediaTypeManifest+`","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"`+digest+`","size":2},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"`+digest+`","size":2}]}`))
	var lines []string
	ask := func(policy driver.Policy, before *csi.NodePublishVolumeRequest, change func(*csi.NodePublishVolumeRequest)) {
		t.Helper()
		n := newNode(t)
		n.cfg.Policy = policy
		n.cfg.Registry.Retry.Attempts = 5
		n.start()
		if before != nil {
			before.TargetPath = n.target("a")
			n.publish(before)
			defer n.unpublish(before)
		}
		req := n.request("a", ref, digest)
		change(req)
		_, err := n.NodePublishVolume(t.Context(), req)
		if err == nil {
			t.Errorf("publish of %v succeeded", req.GetVolumeContext())
			return
		}
		text := strings.TrimPrefix(status.Convert(err).Message(), "NodePublishVolume: ")
		text = strings.NewReplacer("http://"+reg.host, "https://registry.example.com", reg.host, "registry.example.com",
			n.target("a"), "/var/lib/kubelet/pods/<uid>/volumes/kubernetes.io~csi/<name>/mount").Replace(text)
		lines = append(lines, status.Code(err).String()+": "+longHex.ReplaceAllString(text, "<64 hex>"))
	}
	digests := driver.Policy{RequireDigest: true}
	attribute := func(key, value string) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) { setAttributes(r, map[string]string{key: value}) }
	}
	for _, a := range [][2]string{
		{"imgae", "x"},
		{"image", "-"},
		{"image", "https://registry.example.com/team/app"},
		{"image", reg.host + "/team/ap:2.0"},
		{"image", reg.host + "/team/web:1.0"},
		{"digest", "-"},
		{"digest", hexA},
		{"digest", "sha256:abc"},
		{"digest", "verity:" + hexA},
		{"digest", "sha256:" + hexA},
		{"pullPolicy", "always"},
		{"pullPolicy", "Never"},
		{"mode", "lazy"},
		{"mode", "fast"},
		{"subPath", "/dir"},
		{"subPath", "dir/../x"},
		{"subPath", "dir/"},
		{"subPath", "missing"},
		{"subPath", "hello.txt"},
		{"subPath", "link"},
		{"mtime", "yesterday"},
		{"mtime", "1969-12-31T00:00:00Z"},
	} {
		change := attribute(a[0], a[1])
		if a[0] == "image" && strings.Contains(a[1], "web") {
			change = func(r *csi.NodePublishVolumeRequest) {
				attribute("image", a[1])(r)
				attribute("digest", "-")(r)
			}
			ask(driver.Policy{}, nil, change)
			continue
		}
		ask(digests, nil, change)
	}
	ask(digests, nil, attribute("image", reg.host+"/team/app@"+im.digest.String()))
	ask(driver.Policy{}, nil, func(r *csi.NodePublishVolumeRequest) {
		setAttributes(r, map[string]string{"digest": "-", "pullPolicy": "Never"})
	})
	ask(digests, nil, func(r *csi.NodePublishVolumeRequest) { r.Readonly = false })
	ask(digests, nil, func(r *csi.NodePublishVolumeRequest) { r.Secrets = map[string]string{"username": "u", "password": "p"} })
	ask(digests, nil, func(r *csi.NodePublishVolumeRequest) {
		r.Secrets = map[string]string{".dockerconfigjson": "u:p"}
	})
	ask(digests, nil, func(r *csi.NodePublishVolumeRequest) {
		r.VolumeCapability.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	})
	ask(digests, nil, func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().FsType = "ext4" })
	for _, flag := range []string{"rw", "suid", "sync", "context="} {
		ask(digests, nil, func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = mountCapability(flag) })
	}
	published := (&testNode{t: t, dir: t.TempDir()}).request("a", ref, digest)
	ask(digests, published, attribute("subPath", "dir"))

	ask(driver.Policy{AllowedRegistries: []string{"registry.example.com/models"}}, nil, func(*csi.NodePublishVolumeRequest) {})
	ask(driver.Policy{SignatureKeys: keys(t, newSigner(t))}, nil, func(*csi.NodePublishVolumeRequest) {})
	ask(driver.Policy{MaxImageBytes: 100 << 10}, nil, func(*csi.NodePublishVolumeRequest) {})
	ask(driver.Policy{MaxInodes: 5}, nil, func(*csi.NodePublishVolumeRequest) {})
	reg.set(func(r *testRegistry) { r.password = "hunter2" })
	ask(digests, nil, func(*csi.NodePublishVolumeRequest) {})
	reg.set(func(r *testRegistry) { r.down = true })
	ask(digests, nil, func(*csi.NodePublishVolumeRequest) {})
	return lines
}
