package registry_test

import (
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

// The corpora in testdata/fuzz are part of the tests: without them a fuzz target passes
// having tried nothing.
func TestFuzzSeeds(t *testing.T) {
	for _, name := range []string{"FuzzParseReference", "FuzzParseHosts", "FuzzParseDockerConfigJSON"} {
		entries, err := os.ReadDir(filepath.Join("testdata", "fuzz", name))
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) < 4 {
			t.Errorf("%s has %d seeds, want at least 4", name, len(entries))
		}
	}
}

func FuzzParseReference(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := registry.ParseReference(s)
		if err != nil {
			wantError(t, err, []error{registry.ErrInvalidReference})
			return
		}
		if ref.Registry == "" || ref.Repository == "" || ref.Tag == "" && ref.Digest.IsZero() {
			t.Errorf("%q gave the incomplete %+v", s, ref)
		}
		if again, err := registry.ParseReference(ref.String()); err != nil || again != ref {
			t.Errorf("%q gave %+v, parsed again %+v, %v", s, ref, again, err)
		}
		// What becomes part of a URL must not change its meaning.
		if strings.ContainsAny(ref.Registry+ref.Repository+ref.Tag, "?#%@\\ ") || strings.Contains(ref.Repository, "..") {
			t.Errorf("%q gave %+v", s, ref)
		}
		eps, err := registry.LoadEndpoints("", ref.Registry)
		if err != nil || len(eps) != 1 {
			t.Fatalf("endpoints of %q: %v, %v", ref.Registry, eps, err)
		}
		u, err := url.Parse(eps[0].URL)
		if err != nil {
			t.Fatal(err)
		}
		if u.Scheme == "http" && u.Hostname() != "localhost" && !strings.HasPrefix(u.Hostname(), "127.") && !strings.Contains(u.Hostname(), ":") {
			t.Errorf("%q is reached by plain HTTP", ref.Registry)
		}
	})
}

func FuzzParseHosts(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		eps, err := registry.ParseHosts(b, "/certs", "registry.example")
		if err != nil {
			wantError(t, err, []error{registry.ErrInvalidConfig})
			return
		}
		if len(eps) == 0 {
			t.Fatal("no endpoint")
		}
		for _, ep := range eps {
			u, err := url.Parse(ep.URL)
			if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.User != nil {
				t.Errorf("endpoint %q: %v", ep.URL, err)
			}
			for _, ca := range ep.CAs {
				if !filepath.IsAbs(ca) {
					t.Errorf("CA %q is not absolute", ca)
				}
			}
		}
	})
}

func FuzzParseDockerConfigJSON(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		find, err := registry.ParseDockerConfigJSON(b)
		if err != nil {
			wantError(t, err, []error{registry.ErrInvalidConfig})
			return
		}
		for _, host := range []string{"docker.io", "registry.example", "registry.example:5000", "[::1]:5000", ""} {
			if _, err := find(t.Context(), host, "team/app"); err != nil {
				t.Errorf("find %q: %v", host, err)
			}
		}
	})
}
