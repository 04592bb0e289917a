package registry_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
)

// entry is an entry of auths for a user whose name tells which entry was taken.
func entry(key, name string) string {
	return fmt.Sprintf(`%q:{"auth":%q}`, key, base64.StdEncoding.EncodeToString([]byte(name+":p")))
}

func TestParseDockerConfigJSONMatches(t *testing.T) {
	tests := []struct {
		name, auths, registry, repository, want string
	}{
		{"host", entry("reg.example", "a"), "reg.example", "app", "a"},
		{"other host", entry("reg.example", "a"), "reg2.example", "app", ""},
		{"suffix is no match", entry("reg.example", "a"), "evil-reg.example", "app", ""},
		{"subdomain is no match", entry("reg.example", "a"), "reg.example.evil", "app", ""},
		{"upper case", entry("Reg.Example", "a"), "reg.example", "app", "a"},
		{"port", entry("reg.example:5000", "a"), "reg.example:5000", "app", "a"},
		{"port wanted", entry("reg.example", "a"), "reg.example:5000", "app", ""},
		{"port not wanted", entry("reg.example:5000", "a"), "reg.example", "app", ""},
		{"https", entry("https://reg.example", "a"), "reg.example", "app", "a"},
		{"https and v1", entry("https://reg.example/v1/", "a"), "reg.example", "app", "a"},
		{"https and v2", entry("https://reg.example/v2/", "a"), "reg.example", "app", "a"},
		{"v2 is part of a name", entry("reg.example/v2x", "a"), "reg.example", "v2x/app", "a"},
		{"Docker Hub", entry("https://index.docker.io/v1/", "a"), "docker.io", "library/app", "a"},
		{"Docker Hub by its short name", entry("docker.io", "a"), "docker.io", "library/app", "a"},
		{"path", entry("reg.example/team", "a"), "reg.example", "team/app", "a"},
		{"path is the repository", entry("reg.example/team/app", "a"), "reg.example", "team/app", "a"},
		{"path of another", entry("reg.example/team", "a"), "reg.example", "other/app", ""},
		{"path within an element", entry("reg.example/team", "a"), "reg.example", "team-b/app", ""},
		{"longest path", entry("reg.example", "a") + "," + entry("reg.example/team/x", "c") + "," + entry("reg.example/team", "b"), "reg.example", "team/app", "b"},
		{"wildcard", entry("*.example", "a"), "reg.example", "app", "a"},
		{"wildcard spans no dot", entry("*.example", "a"), "a.b.example", "app", ""},
		{"exact before wildcard", entry("*.example", "a") + "," + entry("reg.example", "b"), "reg.example", "app", "b"},
		{"IPv6", entry("[::1]:5000", "a"), "[::1]:5000", "app", "a"},
		{"empty entry is none", `"reg.example":{},` + entry("*.example", "a"), "reg.example", "app", "a"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, err := registry.ParseDockerConfigJSON([]byte(`{"auths":{` + tt.auths + `}}`))
			if err != nil {
				t.Fatal(err)
			}
			c, err := f(t.Context(), tt.registry, tt.repository)
			if err != nil || c.Username != tt.want {
				t.Errorf("got user %q, %v, want %q", c.Username, err, tt.want)
			}
		})
	}
}

func TestParseDockerConfigJSONEntries(t *testing.T) {
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	tests := []struct {
		name, entry string
		want        registry.Credential
	}{
		{"auth", `{"auth":"` + b64("u:p:q") + `"}`, registry.Credential{Username: "u", Password: "p:q"}},
		{"auth without padding", `{"auth":"` + base64.RawStdEncoding.EncodeToString([]byte("user:pw")) + `"}`, registry.Credential{Username: "user", Password: "pw"}},
		{"auth padded with NUL", `{"auth":"` + b64("u:p\x00\x00") + `"}`, registry.Credential{Username: "u", Password: "p"}},
		{"user and password", `{"username":"u","password":"p","email":"e"}`, registry.Credential{Username: "u", Password: "p"}},
		{"auth goes first", `{"username":"x","password":"y","auth":"` + b64("u:p") + `"}`, registry.Credential{Username: "u", Password: "p"}},
		{"identity token", `{"auth":"` + b64("u:") + `","identitytoken":"t"}`, registry.Credential{Username: "u", IdentityToken: "t"}},
		{"registry token", `{"registrytoken":"t"}`, registry.Credential{RegistryToken: "t"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, err := registry.ParseDockerConfigJSON([]byte(`{"auths":{"reg.example":` + tt.entry + `},"credsStore":"x","credHelpers":{"reg.example":"x"}}`))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := f(t.Context(), "reg.example", "app"); err != nil || got != tt.want {
				t.Errorf("got another credential than wanted, error %v", err)
			}
		})
	}
}

func TestParseDockerConfigJSONRefuses(t *testing.T) {
	tests := []struct{ name, in, word string }{
		{"nothing", ``, "not JSON"},
		{"a secret in the place of JSON", `-secret`, "not JSON"},
		{"a number for a password", `{"auths":{"a":{"password":12345}}}`, `"a"`},
		{"auths is a list", `{"auths":["-secret"]}`, "not JSON"},
		{"no auths", `{"credsStore":"desktop"}`, "kubectl create secret"},
		{"auth is no base64", `{"auths":{"a":{"auth":"-secret"}}}`, "base64"},
		{"auth without colon", `{"auths":{"a":{"auth":"` + base64.StdEncoding.EncodeToString([]byte("-secret")) + `"}}}`, "USERNAME:PASSWORD"},
		{"key", `{"auths":{"https://":{}}}`, "HOST"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := registry.ParseDockerConfigJSON([]byte(tt.in))
			wantError(t, err, []error{registry.ErrInvalidConfig}, tt.word)
			wantNoSecrets(t, err.Error())
		})
	}
}

// helper puts a credential helper into PATH that knows reg.example and Docker Hub.
func helper(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	script := `#!/bin/sh
read -r server
case "$1 $server" in
"get reg.example"|"get https://index.docker.io/v1/") echo '{"ServerURL":"x","Username":"helped","Secret":"s"}' ;;
"get token.example") echo '{"Username":"<token>","Secret":"refresh"}' ;;
"get broken.example") echo '{"Secret":"broken-secret"}'; exit 1 ;;
*) echo "credentials not found in native keychain"; exit 1 ;;
esac
`
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestDockerKeychain(t *testing.T) {
	helper(t)
	tests := []struct {
		name, config, registry string
		want                   registry.Credential
		word                   string // of the error
	}{
		{"plain", `{"auths":{` + entry("reg.example", "u") + `}}`, "reg.example", registry.Credential{Username: "u", Password: "p"}, ""},
		{"empty file", " \n", "reg.example", registry.Credential{}, ""},
		{"no entry", `{"auths":{}}`, "reg.example", registry.Credential{}, ""},
		{"nothing about registries", `{"experimental":true}`, "reg.example", registry.Credential{}, ""},
		{"store", `{"credsStore":"test"}`, "reg.example", registry.Credential{Username: "helped", Password: "s"}, ""},
		{"store, Docker Hub", `{"credsStore":"test"}`, "docker.io", registry.Credential{Username: "helped", Password: "s"}, ""},
		{"store, identity token", `{"credsStore":"test"}`, "token.example", registry.Credential{IdentityToken: "refresh"}, ""},
		{"store without it", `{"credsStore":"test","auths":{` + entry("other.example", "u") + `}}`, "other.example", registry.Credential{Username: "u", Password: "p"}, ""},
		{"helper", `{"credHelpers":{"reg.example":"test"}}`, "reg.example", registry.Credential{Username: "helped", Password: "s"}, ""},
		{"helper, Docker Hub", `{"credHelpers":{"index.docker.io":"test"}}`, "docker.io", registry.Credential{Username: "helped", Password: "s"}, ""},
		{"helper for another", `{"credHelpers":{"x.example":"missing"}}`, "reg.example", registry.Credential{}, ""},
		{"helper goes before store", `{"credsStore":"missing","credHelpers":{"reg.example":"test"}}`, "reg.example", registry.Credential{Username: "helped", Password: "s"}, ""},
		{"no such helper", `{"credsStore":"missing"}`, "reg.example", registry.Credential{}, "docker-credential-missing"},
		{"helper fails", `{"credsStore":"test"}`, "broken.example", registry.Credential{}, "docker-credential-test failed"},
		{"helper is a path", `{"credsStore":"/bin/sh"}`, "reg.example", registry.Credential{}, "is a path"},
		{"broken file", `{"auths":`, "reg.example", registry.Credential{}, "config.json"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			writeFile(t, filepath.Join(dir, "config.json"), tt.config)
			t.Setenv("DOCKER_CONFIG", dir)
			got, err := registry.DockerKeychain("")(t.Context(), tt.registry, "app")
			if tt.word != "" {
				wantError(t, err, []error{registry.ErrInvalidConfig}, tt.word)
				wantNoSecrets(t, err.Error())
				return
			}
			if err != nil || got != tt.want {
				t.Errorf("got another credential than wanted, error %v", err)
			}
		})
	}
}

func TestDockerKeychainFiles(t *testing.T) {
	home := t.TempDir()
	t.Setenv("DOCKER_CONFIG", "")
	t.Setenv("HOME", home)
	f := registry.DockerKeychain("")
	get := func(f registry.CredentialFunc) string {
		c, err := f(t.Context(), "reg.example", "app")
		if err != nil {
			t.Fatal(err)
		}
		return c.Username
	}
	if u := get(f); u != "" {
		t.Errorf("without a file: user %q", u)
	}
	// A login takes effect at once.
	writeFile(t, filepath.Join(home, ".docker/config.json"), `{"auths":{`+entry("reg.example", "home")+`}}`)
	if u := get(f); u != "home" {
		t.Errorf("after a login: user %q", u)
	}
	file := filepath.Join(home, "other.json")
	writeFile(t, file, `{"auths":{`+entry("reg.example", "other")+`}}`)
	if u := get(registry.DockerKeychain(file)); u != "other" {
		t.Errorf("from a file: user %q", u)
	}
	t.Setenv("HOME", "")
	if u := get(f); u != "" {
		t.Errorf("without a home: user %q", u)
	}
	if _, err := registry.DockerKeychain(home)(t.Context(), "reg.example", "app"); !errors.Is(err, registry.ErrInvalidConfig) {
		t.Errorf("directory for a file: %v", err)
	}
}

func TestKeychain(t *testing.T) {
	stop := errors.New("stop")
	fixed := func(c registry.Credential, err error) registry.CredentialFunc {
		return func(context.Context, string, string) (registry.Credential, error) { return c, err }
	}
	a, b, none := fixed(registry.Credential{Username: "a"}, nil), fixed(registry.Credential{Username: "b"}, nil), fixed(registry.Credential{}, nil)
	tests := []struct {
		name  string
		chain []registry.CredentialFunc
		want  string
		err   error
	}{
		{"none", nil, "", nil},
		{"first", []registry.CredentialFunc{a, b}, "a", nil},
		{"second", []registry.CredentialFunc{none, nil, b}, "b", nil},
		{"error", []registry.CredentialFunc{none, fixed(registry.Credential{}, stop), b}, "", stop},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := registry.Keychain(tt.chain...)(t.Context(), "reg.example", "app")
			if c.Username != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("got %q, %v, want %q, %v", c.Username, err, tt.want, tt.err)
			}
		})
	}
}
