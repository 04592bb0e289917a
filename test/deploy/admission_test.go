package deploy_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

const (
	goodDigest   = "sha256:1111111111111111111111111111111111111111111111111111111111111111"
	verityDigest = "verity:1111111111111111111111111111111111111111111111111111111111111111"
)

// pod returns a pod with a volume of our driver, or with no volume.
func pod(t *testing.T, attributes string) *unstructured.Unstructured {
	t.Helper()
	volumes := ""
	if attributes != "" {
		volumes = `, volumes: [{name: data, csi: {driver: csi.puzzlefs.io, readOnly: true, volumeAttributes: ` + attributes + `}}]`
	}
	return object(t, `{apiVersion: v1, kind: Pod, metadata: {name: p, namespace: default}, spec: {containers: [{name: c, image: i}]`+volumes+`}}`)
}

// persistentVolume returns one of our driver.
func persistentVolume(t *testing.T, attributes string) *unstructured.Unstructured {
	t.Helper()
	return object(t, `{apiVersion: v1, kind: PersistentVolume, metadata: {name: pv}, spec: {accessModes: [ReadOnlyMany], capacity: {storage: 1Gi},
csi: {driver: csi.puzzlefs.io, volumeHandle: h, readOnly: true, volumeAttributes: `+attributes+`}}}`)
}

// testAdmission installs the policies and has the API server decide about pods and volumes.
func testAdmission(t *testing.T, c *cluster) {
	v := values(t, `{admissionPolicy: {enabled: true, allowedRegistries: [registry.example.com/team, other.example.com:5000, whole.example.com, docker.io/library]}}`)
	for _, o := range objects(t, mustRender(t, v)) {
		if strings.HasPrefix(o.GetKind(), "ValidatingAdmissionPolicy") {
			c.mustCreate(t, o)
		}
	}
	image := func(reference string) string { return fmt.Sprintf(`{image: %q, digest: %q}`, reference, goodDigest) }
	c.eventually(t, "the policies are in force", func() error {
		for _, o := range []*unstructured.Unstructured{pod(t, `{image: nowhere/x}`), persistentVolume(t, `{image: nowhere/x}`)} {
			if c.accept(t.Context(), o) == nil {
				return errors.New("a " + o.GetKind() + " without a digest is accepted")
			}
		}
		return nil
	})

	tests := []struct {
		name, attributes string
		says             []string // nothing: it is accepted
	}{
		{"allowed", image("registry.example.com/team/models:v1"), nil},
		{"allowed repository itself", image("registry.example.com/team"), nil},
		{"allowed repository itself, with a tag", image("registry.example.com/team:v1"), nil},
		{"allowed repository itself, with a digest", `{image: "registry.example.com/team@` + goodDigest + `"}`, nil},
		{"allowed host with port", image("other.example.com:5000/a/b/c"), nil},
		{"allowed host", image("whole.example.com/a"), nil},
		{"short name", image("busybox:1"), nil},
		{"digest in the reference", `{image: "registry.example.com/team/models@` + goodDigest + `"}`, nil},
		{"tag and digest in the reference", `{image: "registry.example.com/team/models:v1@` + goodDigest + `"}`, nil},
		{"fs-verity digest", `{image: registry.example.com/team/models, digest: "` + verityDigest + `"}`, nil},

		{"no digest", `{image: "registry.example.com/team/models:v1"}`, []string{"without a digest: NAME", "sha256:<64 hex>"}},
		{"empty digest", `{image: "registry.example.com/team/models:v1", digest: ""}`, []string{"without a digest"}},
		{"bare hex", `{image: registry.example.com/team/models, digest: "` + strings.Repeat("1", 64) + `"}`, []string{"without a digest"}},
		{"digest with something behind it", `{image: registry.example.com/team/models, digest: "` + goodDigest + `x"}`, []string{"without a digest"}},
		{"digest in the tag", `{image: "registry.example.com/team/models:sha256-` + strings.Repeat("1", 64) + `"}`, []string{"without a digest"}},
		{"foreign registry", image("evil.example.com/team/models"), []string{"not allowed here: NAME (evil.example.com/team/models)", "allowed are: registry.example.com/team, other"}},
		{"other repository", image("registry.example.com/other/models"), []string{"not allowed here"}},
		{"repository with a longer name", image("registry.example.com/teammates/models"), []string{"not allowed here"}},
		{"host with a longer name", image("whole.example.com.evil.org/a"), []string{"not allowed here"}},
		{"host with a port", image("whole.example.com:5000/a"), []string{"not allowed here"}},
		{"another port", image("other.example.com:50001/a"), []string{"not allowed here"}},
		{"no port", image("other.example.com/a"), []string{"not allowed here"}},
		{"allowed name at the end", image("evil.example.com/registry.example.com/team/x"), []string{"not allowed here"}},
		{"allowed name behind an at", image("evil.example.com/x@registry.example.com/team/x"), []string{"not allowed here"}},
		{"short name of a user", image("somebody/busybox"), []string{"not allowed here: NAME (docker.io/somebody/busybox)"}},
		{"local registry", image("localhost/busybox"), []string{"not allowed here"}},
		{"no image", `{digest: "` + goodDigest + `"}`, []string{"not allowed here"}},
		{"no attributes", `{}`, []string{"without a digest"}},
	}
	for _, tt := range tests {
		for _, o := range []*unstructured.Unstructured{pod(t, tt.attributes), persistentVolume(t, tt.attributes)} {
			t.Run(o.GetKind()+"/"+tt.name, func(t *testing.T) {
				name := map[string]string{"Pod": "data", "PersistentVolume": "pv"}[o.GetKind()]
				err := c.accept(t.Context(), o)
				if tt.says == nil && err != nil {
					t.Errorf("refused: %v", err)
				}
				if tt.says != nil && err == nil {
					t.Error("accepted")
				}
				for _, want := range tt.says {
					if want = strings.ReplaceAll(want, "NAME", name); err != nil && !strings.Contains(err.Error(), want) {
						t.Errorf("the message does not say %q: %v", want, err)
					}
				}
			})
		}
	}

	// The policies are about our volumes only.
	c.mustAccept(t, "no volume", pod(t, ""))
	c.mustAccept(t, "other volumes",
		object(t, `{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c, image: i}], volumes: [
{name: a, emptyDir: {}}, {name: b, csi: {driver: other.example.com, volumeAttributes: {image: x}}}]}}`),
		object(t, `{apiVersion: v1, kind: PersistentVolume, metadata: {name: pv}, spec: {accessModes: [ReadOnlyMany], capacity: {storage: 1Gi}, hostPath: {path: /x}}}`),
		object(t, `{apiVersion: v1, kind: PersistentVolume, metadata: {name: pv}, spec: {accessModes: [ReadOnlyMany], capacity: {storage: 1Gi}, csi: {driver: other.example.com, volumeHandle: h}}}`))

	// One bad volume among several is named.
	several := object(t, `{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c, image: i}], volumes: [
{name: good, csi: {driver: csi.puzzlefs.io, volumeAttributes: {image: whole.example.com/a, digest: "`+goodDigest+`"}}},
{name: bad, csi: {driver: csi.puzzlefs.io, volumeAttributes: {image: whole.example.com/a}}},
{name: none, csi: {driver: csi.puzzlefs.io}}]}}`)
	if err := c.accept(t.Context(), several); err == nil || !strings.Contains(err.Error(), "without a digest: bad, none;") {
		t.Errorf("got %v, want a refusal that names the volumes bad and none", err)
	}
}
