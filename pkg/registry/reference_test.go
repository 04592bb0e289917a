package registry_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

func TestParseReference(t *testing.T) {
	d := format.DigestOf([]byte("x"))
	tests := []struct {
		in, out string
		want    registry.Reference
	}{
		{"app", "docker.io/library/app:latest", registry.Reference{Registry: "docker.io", Repository: "library/app", Tag: "latest"}},
		{"team/app:1", "docker.io/team/app:1", registry.Reference{Registry: "docker.io", Repository: "team/app", Tag: "1"}},
		{"index.docker.io/app", "docker.io/library/app:latest", registry.Reference{Registry: "docker.io", Repository: "library/app", Tag: "latest"}},
		{"localhost/app", "localhost/app:latest", registry.Reference{Registry: "localhost", Repository: "app", Tag: "latest"}},
		{"reg.example/a/b/c:v1.0-x_y", "reg.example/a/b/c:v1.0-x_y", registry.Reference{Registry: "reg.example", Repository: "a/b/c", Tag: "v1.0-x_y"}},
		{"reg.example:5000/app@" + d.String(), "reg.example:5000/app@" + d.String(), registry.Reference{Registry: "reg.example:5000", Repository: "app", Digest: d}},
		{"reg.example/app:1@" + d.String(), "reg.example/app:1@" + d.String(), registry.Reference{Registry: "reg.example", Repository: "app", Tag: "1", Digest: d}},
		{"[::1]:5000/app", "[::1]:5000/app:latest", registry.Reference{Registry: "[::1]:5000", Repository: "app", Tag: "latest"}},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			got, err := registry.ParseReference(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if got.String() != tt.out {
				t.Errorf("String() = %s, want %s", got, tt.out)
			}
			if again, err := registry.ParseReference(got.String()); err != nil || again != got {
				t.Errorf("parsed again: %v, %v", again, err)
			}
		})
	}
}

func TestParseReferenceRefuses(t *testing.T) {
	d := format.DigestOf([]byte("x"))
	tests := []struct{ name, in, word string }{
		{"empty", "", "empty"},
		{"white space", " app", "white space"},
		{"newline", "app\n", "white space"},
		{"scheme", "https://reg.example/app", "scheme"},
		{"upper case", "reg.example/App", "lowercase"},
		{"no repository", "reg.example/", "reg.example/"},
		{"bad tag", "reg.example/app:!", "invalid reference"},
		{"long tag", "reg.example/app:" + strings.Repeat("a", 129), "invalid reference"},
		{"only a digest", d.Hex(), "hexadecimal"},
		{"short digest", "app@sha256:12", "invalid reference"},
		{"upper-case digest", "app@sha256:" + strings.ToUpper(d.Hex()), "invalid"},
		{"SHA-512", "app@sha512:" + d.Hex() + d.Hex(), ""},
		{"SHA-1", "app@sha1:" + d.Hex()[:40], ""},
		{"no IPv6 address", "[1]:5000/app", "no IPv6 address"},
		{"two digests", "app@" + d.String() + "@" + d.String(), "invalid reference"},
		{"path traversal", "reg.example/../app", "invalid reference"},
		{"escape", "reg.example/a%2fb", "invalid reference"},
		{"query", "reg.example/app?x=y", "invalid reference"},
		{"user", "user:pw@reg.example/app", "invalid reference"},
		{"control characters", "reg.example/\x1b[31m", "invalid reference"},
		{"not UTF-8", "reg.example/\xff", "invalid reference"},
		{"very long", strings.Repeat("a/", 5000) + "a", "bytes long"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := registry.ParseReference(tt.in)
			wantError(t, err, []error{registry.ErrInvalidReference}, tt.word, "REGISTRY/REPOSITORY")
			if len(err.Error()) > 1000 {
				t.Errorf("a message of %d bytes", len(err.Error()))
			}
		})
	}
}

func TestMissingDigestSaysWhatTheTagHolds(t *testing.T) {
	_, addr := serve(t, memory())
	im := newImage(t, 1)
	mustPush(t, im, addr, "app:v1")
	other := format.DigestOf([]byte("other"))
	c := newClient(t, nil)
	tests := []struct{ name, ref, word string }{
		{"with tag", addr + "/app:v1@" + other.String(), "tag v1 holds " + im.desc.Digest.String() + " now"},
		{"with a tag that is not there", addr + "/app:v2@" + other.String(), "nor is there a tag v2: check the name, or push the image first"},
		{"without tag", addr + "/app@" + other.String(), "check the digest"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := c.Resolve(t.Context(), mustParse(t, tt.ref))
			wantError(t, err, []error{registry.ErrNotFound}, "resolve "+tt.ref, "no manifest "+other.String(), tt.word)
		})
	}
	// The tag is not consulted where the digest is there.
	ref := mustParse(t, addr+"/app:v2@"+im.desc.Digest.String())
	if _, _, err := c.Resolve(t.Context(), ref); err != nil {
		t.Error(err)
	}
}
