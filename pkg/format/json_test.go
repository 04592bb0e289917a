package format_test

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

// capnpJSON has the capnp tool print a message. hack/install-deps.sh installs the tool.
func capnpJSON(t *testing.T, schema, root string, message []byte) any {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "capnproto.org/go/capnp/v3").Output()
	if err != nil {
		t.Fatalf("find the capnp module: %v", err)
	}
	cmd := exec.Command("capnp", "convert", "binary:json", "-I"+strings.TrimSpace(string(dir))+"/std", "schema/"+schema, root)
	cmd.Stdin = bytes.NewReader(message)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("capnp convert: %v\n%s(the tool comes with hack/install-deps.sh)", err, stderr.Bytes())
	}
	return parse(t, out)
}

func parse(t *testing.T, b []byte) any {
	t.Helper()
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// The JSON forms say what the capnp tool says, for every version.
func TestJSONEqualsCapnp(t *testing.T) {
	rootfs := func(layout, tag string) []byte {
		b := readBlob(t, layout, entries(t, layout)[tag])
		if m, err := format.ParseManifest(b); err == nil {
			d, err := m.Rootfs()
			if err != nil {
				t.Fatal(err)
			}
			return readBlob(t, layout, d.Digest)
		}
		return b
	}
	all, err := format.EncodeRootfs(sample())
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name, schema, layout string
		b                    []byte
	}{
		{"every kind", "rootfs_v3.capnp", "", all},
		{"v3 changed", "rootfs_v3.capnp", "", rootfs("v3-master", "changed")},
		{"v3 zstd", "rootfs_v3.capnp", "", rootfs("v3-0.2.0", "small-zstd")},
		{"v2 changed", "rootfs_v2.capnp", "v2-0.1.0", rootfs("v2-0.1.0", "changed")},
		{"v1 changed", "rootfs_v2.capnp", "v1-git", rootfs("v1-git", "changed")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := format.DecodeRootfs(tt.b)
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(capnpJSON(t, tt.schema, "Rootfs", tt.b), parse(t, got)); diff != "" {
				t.Errorf("(-capnp +ours):\n%s", diff)
			}
			for _, ref := range r.Metadatas {
				b := readBlob(t, tt.layout, ref.Digest)
				v, err := format.DecodeInodeVector(b, r.Version)
				if err != nil {
					t.Fatal(err)
				}
				if got, err = v.JSON(r.Version); err != nil {
					t.Fatal(err)
				}
				schema := map[format.Version]string{1: "inodes_v1.capnp", 2: "rootfs_v3.capnp"}[r.Version]
				if diff := cmp.Diff(capnpJSON(t, schema, "InodeVector", b), parse(t, got)); diff != "" {
					t.Errorf("layer (-capnp +ours):\n%s", diff)
				}
			}
		})
	}
}
