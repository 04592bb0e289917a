package registry_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

// certsDir makes a certs directory with a hosts.toml for host.
func certsDir(t *testing.T, host, hosts string) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, host, "hosts.toml"), hosts)
	return dir
}

func writeFile(t *testing.T, file, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDefaultEndpoint(t *testing.T) {
	tests := []struct{ registry, want string }{
		{"registry.example", "https://registry.example/v2"},
		{"registry.example:80", "https://registry.example:80/v2"},
		{"docker.io", "https://registry-1.docker.io/v2"},
		{"localhost", "http://localhost/v2"},
		{"localhost:5000", "http://localhost:5000/v2"},
		{"127.0.0.1:5000", "http://127.0.0.1:5000/v2"},
		{"127.9.9.9", "http://127.9.9.9/v2"},
		{"[::1]:5000", "http://[::1]:5000/v2"},
		{"[::ffff:127.0.0.1]:5000", "http://[::ffff:127.0.0.1]:5000/v2"},
		{"localhost.example", "https://localhost.example/v2"},
		{"127.0.0.1.example", "https://127.0.0.1.example/v2"},
		{"10.0.0.1:5000", "https://10.0.0.1:5000/v2"},
		{"0.0.0.0:5000", "https://0.0.0.0:5000/v2"},
		{"[::]:5000", "https://[::]:5000/v2"},
		{"128.0.0.1", "https://128.0.0.1/v2"},
	}
	for _, tt := range tests {
		t.Run(tt.registry, func(t *testing.T) {
			got, err := registry.LoadEndpoints("", tt.registry)
			if err != nil {
				t.Fatal(err)
			}
			want := []registry.Endpoint{{URL: tt.want, Pull: true, Resolve: true, Push: true}}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestHostDirectories(t *testing.T) {
	server := func(name string) string { return `server = "https://` + name + `"` }
	tests := []struct {
		name, registry string
		// files are below the certs directory.
		files map[string]string
		want  registry.Endpoint
	}{
		{
			"underscores first", "registry.example:5000",
			map[string]string{"registry.example_5000_/hosts.toml": server("a"), "registry.example:5000/hosts.toml": server("b"), "_default/hosts.toml": server("c")},
			registry.Endpoint{URL: "https://a/v2", Mirror: true},
		}, {
			"colon", "registry.example:5000",
			map[string]string{"registry.example/hosts.toml": server("a"), "registry.example:5000/hosts.toml": server("b")},
			registry.Endpoint{URL: "https://b/v2", Mirror: true},
		}, {
			"default", "registry.example:5000",
			map[string]string{"registry.example/hosts.toml": server("a"), "_default/hosts.toml": server("c")},
			registry.Endpoint{URL: "https://c/v2", Mirror: true},
		}, {
			"no match", "registry.example",
			map[string]string{"other.example/hosts.toml": server("a")},
			registry.Endpoint{URL: "https://registry.example/v2"},
		}, {
			"file in the place of a directory", "registry.example",
			map[string]string{"registry.example": "x"},
			registry.Endpoint{URL: "https://registry.example/v2"},
		}, {
			"empty hosts.toml", "registry.example",
			map[string]string{"registry.example/hosts.toml": "", "registry.example/ca.crt": "x"},
			registry.Endpoint{URL: "https://registry.example/v2", CAs: []string{"registry.example/ca.crt"}},
		}, {
			"certificates", "registry.example",
			map[string]string{"registry.example/ca.crt": "x", "registry.example/b.crt": "x", "registry.example/client.cert": "x", "registry.example/client.key": "x", "registry.example/z.cert": "x", "registry.example/README": "x"},
			registry.Endpoint{
				URL: "https://registry.example/v2", CAs: []string{"registry.example/b.crt", "registry.example/ca.crt"},
				Pairs: [][2]string{{"registry.example/client.cert", "registry.example/client.key"}, {"registry.example/z.cert", ""}},
			},
		}, {
			"loopback with a certificate", "127.0.0.1:5000",
			map[string]string{"127.0.0.1:5000/ca.crt": "x"},
			registry.Endpoint{URL: "https://127.0.0.1:5000/v2", CAs: []string{"127.0.0.1:5000/ca.crt"}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, content := range tt.files {
				writeFile(t, filepath.Join(dir, name), content)
			}
			got, err := registry.LoadEndpoints(dir, tt.registry)
			if err != nil {
				t.Fatal(err)
			}
			want := tt.want
			want.Pull, want.Resolve, want.Push = true, true, true
			for i := range want.CAs {
				want.CAs[i] = filepath.Join(dir, want.CAs[i])
			}
			for i := range want.Pairs {
				for j := range want.Pairs[i] {
					if want.Pairs[i][j] != "" {
						want.Pairs[i][j] = filepath.Join(dir, want.Pairs[i][j])
					}
				}
			}
			if diff := cmp.Diff([]registry.Endpoint{want}, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseHosts(t *testing.T) {
	all := func(e registry.Endpoint) registry.Endpoint {
		e.Pull, e.Resolve, e.Push = true, true, true
		return e
	}
	tests := []struct {
		name, toml string
		want       []registry.Endpoint
	}{
		{
			"order of the file", `
server = "https://registry.example"
[host."https://z.example"]
  capabilities = ["pull"]
[host."https://a.example/path"]
  capabilities = ["Pull", "resolve"]
  [host."https://a.example/path".header]
    x-one = "1"
    x-two = ["2", "3"]
[host.'http://m.example:5000/v2/']
`, []registry.Endpoint{
				{URL: "https://z.example/v2", Pull: true, Mirror: true},
				{URL: "https://a.example/path/v2", Pull: true, Resolve: true, Mirror: true, Header: map[string][]string{"X-One": {"1"}, "X-Two": {"2", "3"}}},
				all(registry.Endpoint{URL: "http://m.example:5000/v2", Mirror: true}),
				all(registry.Endpoint{URL: "https://registry.example/v2"}),
			},
		}, {
			"dotted keys", `
host."https://b.example".capabilities = ["pull"]
host."https://a.example".capabilities = ["push"]
host."https://b.example".dial_timeout = "1s"
`, []registry.Endpoint{
				{URL: "https://b.example/v2", Pull: true, Mirror: true, DialTimeout: "1s"},
				{URL: "https://a.example/v2", Push: true, Mirror: true},
				all(registry.Endpoint{URL: "https://registry.example/v2"}),
			},
		}, {
			"table of inline tables", `
[host]
"https://b.example" = { capabilities = ["pull"] }
"https://a.example" = { capabilities = ["push"] }
`, []registry.Endpoint{
				{URL: "https://b.example/v2", Pull: true, Mirror: true},
				{URL: "https://a.example/v2", Push: true, Mirror: true},
				all(registry.Endpoint{URL: "https://registry.example/v2"}),
			},
		}, {
			"inline", `host = { "https://b.example" = {}, "https://a.example" = {} }`, []registry.Endpoint{
				all(registry.Endpoint{URL: "https://a.example/v2", Mirror: true}),
				all(registry.Endpoint{URL: "https://b.example/v2", Mirror: true}),
				all(registry.Endpoint{URL: "https://registry.example/v2"}),
			},
		}, {
			"server's own keys", `
server = "other.example:8443"
capabilities = ["resolve"]
ca = ["ca.pem", "/abs/ca.pem"]
client = [["c.pem", "k.pem"], ["both.pem", ""], "one.pem"]
dial_timeout = "200ms"
proxy = "socks5://proxy:1080"
unknown = 7
[header]
x = "y"
`, []registry.Endpoint{{
				URL: "https://other.example:8443/v2", Resolve: true, Mirror: true, CAs: []string{"/d/ca.pem", "/abs/ca.pem"},
				Pairs:       [][2]string{{"/d/c.pem", "/d/k.pem"}, {"/d/both.pem", ""}, {"/d/one.pem", ""}},
				DialTimeout: "200ms", Proxy: "socks5://proxy:1080", Header: map[string][]string{"X": {"y"}},
			}},
		}, {
			"single files", "ca = 'ca.pem'\nclient = 'c.pem'\nskip_verify = false", []registry.Endpoint{
				all(registry.Endpoint{URL: "https://registry.example/v2", CAs: []string{"/d/ca.pem"}, Pairs: [][2]string{{"/d/c.pem", ""}}}),
			},
		}, {
			"override_path", `
[host."https://m.example/api/oci"]
override_path = true
[host."https://n.example"]
override_path = true
`, []registry.Endpoint{
				all(registry.Endpoint{URL: "https://m.example/api/oci", Mirror: true}),
				all(registry.Endpoint{URL: "https://n.example/", Mirror: true}),
				all(registry.Endpoint{URL: "https://registry.example/v2"}),
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := registry.ParseHosts([]byte(tt.toml), "/d", "registry.example")
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseHostsRefuses(t *testing.T) {
	tests := []struct{ name, toml, word string }{
		{"no TOML", "server = ", "toml"},
		{"skip_verify", "skip_verify = true", "skip_verify"},
		{"skip_verify of a host", "[host.\"https://m.example\"]\nskip_verify = true", "m.example"},
		{"capability", `capabilities = ["delete"]`, "delete"},
		{"capabilities no list", `capabilities = "pull"`, "capabilities"},
		{"scheme", `server = "ftp://x"`, "ftp"},
		{"user in the URL", `server = "https://a:secret@x"`, "URL"},
		{"no host", `server = "https://"`, "URL"},
		{"ca number", `ca = 1`, "ca"},
		{"ca list of numbers", `ca = [1]`, "ca"},
		{"client triple", `client = [["a","b","c"]]`, "client"},
		{"client number", `client = [[1,2]]`, "client"},
		{"header number", "[header]\nx = 1", "header"},
		{"dial_timeout", `dial_timeout = "long"`, "dial_timeout"},
		{"negative dial_timeout", `dial_timeout = "-1s"`, "dial_timeout"},
		{"proxy", `proxy = "//"`, "proxy"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := certsDir(t, "registry.example", tt.toml)
			c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })
			_, _, err := c.Resolve(t.Context(), mustParse(t, "registry.example/app"))
			wantError(t, err, []error{registry.ErrInvalidConfig}, filepath.Join(dir, "registry.example", "hosts.toml"), tt.word)
		})
	}
}

func TestUnusableCertificates(t *testing.T) {
	tests := []struct {
		name  string
		files map[string]string
		word  string
	}{
		{"no PEM", map[string]string{"ca.crt": "x"}, "ca.crt"},
		{"missing CA", map[string]string{"hosts.toml": `ca = "missing.pem"`}, "missing.pem"},
		{"client without key", map[string]string{"client.cert": "x"}, "client.cert"},
		{"missing key", map[string]string{"hosts.toml": `client = [["a.pem", "b.pem"]]`, "a.pem": ""}, "b.pem"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, content := range tt.files {
				writeFile(t, filepath.Join(dir, "registry.example", name), content)
			}
			c := newClient(t, func(cfg *registry.Config) { cfg.CertsDir = dir })
			_, _, err := c.Resolve(t.Context(), mustParse(t, "registry.example/app"))
			wantError(t, err, []error{registry.ErrInvalidConfig}, tt.word)
		})
	}
}

func TestNewRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, "")
	tests := []struct {
		name string
		cfg  registry.Config
		word string
	}{
		{"missing certs directory", registry.Config{CertsDir: file + "x"}, file + "x"},
		{"file for a directory", registry.Config{CertsDir: file}, "not a directory"},
		{"concurrency", registry.Config{Concurrency: -1}, "concurrency"},
		{"much concurrency", registry.Config{Concurrency: 10000}, "concurrency"},
		{"attempts", registry.Config{Retry: registry.Retry{Attempts: -1}}, "retry"},
		{"waits", registry.Config{Retry: registry.Retry{MinWait: 2, MaxWait: 1}}, "retry"},
		{"idle timeout", registry.Config{IdleTimeout: -1}, "idle"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := registry.New(tt.cfg)
			wantError(t, err, []error{registry.ErrInvalidConfig}, tt.word)
			if strings.Count(err.Error(), "\n") > 0 {
				t.Errorf("more than a line: %v", err)
			}
		})
	}
}
