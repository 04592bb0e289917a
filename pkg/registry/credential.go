package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"sort"
	"strings"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// Credential is what a registry is given to learn who asks. The zero value is anonymous.
// Printing or logging one shows no secret.
type Credential struct {
	Username, Password string
	// IdentityToken is exchanged for access tokens at the registry's token server.
	IdentityToken string
	// RegistryToken is sent as it is, as a bearer token.
	RegistryToken string
}

// String returns a text without secrets.
func (c Credential) String() string {
	if c == (Credential{}) {
		return "anonymous"
	}
	return "credential [redacted]"
}

// GoString is what %#v prints: the same as String.
func (c Credential) GoString() string { return c.String() }

// LogValue is what log/slog prints: the same as String.
func (c Credential) LogValue() slog.Value { return slog.StringValue(c.String()) }

func (c Credential) oras() auth.Credential {
	return auth.Credential{Username: c.Username, Password: c.Password, RefreshToken: c.IdentityToken, AccessToken: c.RegistryToken}
}

// CredentialFunc returns the credential for a repository of a registry, or the zero
// Credential if it has none. registry is a host with the port where one is written in the
// reference or in hosts.toml ("docker.io" for Docker Hub), repository the path
// ("library/app"). It is called once or a few times an operation, from several goroutines,
// and its errors must not contain secrets.
type CredentialFunc func(ctx context.Context, registry, repository string) (Credential, error)

// Keychain asks one CredentialFunc after the other and returns the first credential that
// is not anonymous. Nil functions are left out.
func Keychain(funcs ...CredentialFunc) CredentialFunc {
	return func(ctx context.Context, registry, repository string) (Credential, error) {
		for _, f := range funcs {
			if f == nil {
				continue
			}
			c, err := f(ctx, registry, repository)
			if err != nil || c != (Credential{}) {
				return c, err
			}
		}
		return Credential{}, nil
	}
}

// ParseDockerConfigJSON reads a secret of type kubernetes.io/dockerconfigjson. Keys are
// matched as kubelet matches them: HOST[:PORT][/PATH], with or without https:// and /v1/ or
// /v2/, "*" and "?" within a label of the host, the longest path that is a prefix of the
// repository wins, here at whole path elements only. Credential helpers in it are ignored: a
// pod must not choose what the node executes. Errors wrap ErrInvalidConfig and never quote b.
func ParseDockerConfigJSON(b []byte) (CredentialFunc, error) {
	cfg, err := parseDockerConfig(b)
	if err != nil {
		return nil, fmt.Errorf("parse dockerconfigjson: %w", err)
	}
	if cfg.Auths == nil {
		return nil, fmt.Errorf(`parse dockerconfigjson: there is no "auths" in it; make the secret with `+
			`kubectl create secret docker-registry: %w`, ErrInvalidConfig)
	}
	return func(_ context.Context, registry, repository string) (Credential, error) {
		return cfg.find(registry, repository), nil
	}, nil
}

// DockerKeychain returns the credentials of a Docker config.json, credential helpers
// included. path is the file; empty means $DOCKER_CONFIG/config.json or
// ~/.docker/config.json. The file is read again at each use, so that a new login takes
// effect; a missing one means anonymous. Errors wrap ErrInvalidConfig.
func DockerKeychain(path string) CredentialFunc {
	return func(ctx context.Context, registry, repository string) (Credential, error) {
		file := path
		if file == "" {
			file = defaultDockerConfig()
		}
		if file == "" {
			return Credential{}, nil
		}
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			return Credential{}, nil
		}
		if err != nil {
			return Credential{}, fmt.Errorf("read Docker config: %w: %w", err, ErrInvalidConfig)
		}
		if len(bytes.TrimSpace(b)) == 0 {
			return Credential{}, nil
		}
		cfg, err := parseDockerConfig(b)
		if err != nil {
			return Credential{}, fmt.Errorf("parse Docker config %s: %w", file, err)
		}
		c, err := cfg.fromHelper(ctx, registry)
		if err != nil || c != (Credential{}) {
			return c, err
		}
		return cfg.find(registry, repository), nil
	}
}

// defaultDockerConfig returns the path of the user's config.json, "" if there is no home.
func defaultDockerConfig() string {
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		return filepath.Join(dir, "config.json")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return filepath.Join(home, ".docker", "config.json")
}

// dockerConfig is what is used of a config.json.
type dockerConfig struct {
	Auths       map[string]json.RawMessage `json:"auths"`
	CredsStore  string                     `json:"credsStore"`
	CredHelpers map[string]string          `json:"credHelpers"`
	// entries are the usable Auths, the most specific first.
	entries []dockerAuth
}

// dockerAuth is one entry of auths, its key taken apart.
type dockerAuth struct {
	host, port, path string
	cred             Credential
}

// parseDockerConfig decodes b. The errors of encoding/json quote what they choke on, which
// may be a secret, so they are not passed on.
func parseDockerConfig(b []byte) (*dockerConfig, error) {
	cfg := new(dockerConfig)
	if err := json.Unmarshal(b, cfg); err != nil {
		return nil, fmt.Errorf(`not JSON of the form {"auths":{"HOST":{"auth":"…"}}}: %w`, ErrInvalidConfig)
	}
	for key, raw := range cfg.Auths {
		e, err := parseAuthKey(key)
		if err != nil {
			return nil, err
		}
		if e.cred, err = parseAuthEntry(raw); err != nil {
			return nil, fmt.Errorf("entry %s: %w", quote(key), err)
		}
		if e.cred != (Credential{}) {
			cfg.entries = append(cfg.entries, e)
		}
	}
	// Longest path first; a host without wildcards before one with them, since '*' and '?'
	// sort before all that a host name is made of; then by name, so that the choice is stable.
	sort.Slice(cfg.entries, func(i, j int) bool {
		a, b := cfg.entries[i], cfg.entries[j]
		if len(a.path) != len(b.path) {
			return len(a.path) > len(b.path)
		}
		if wa, wb := strings.ContainsAny(a.host, "*?["), strings.ContainsAny(b.host, "*?["); wa != wb {
			return wb
		}
		return a.host+":"+a.port+"/"+a.path > b.host+":"+b.port+"/"+b.path
	})
	return cfg, nil
}

// parseAuthKey takes the key of an entry of auths apart.
func parseAuthKey(key string) (dockerAuth, error) {
	s := key
	if !strings.HasPrefix(s, "https://") && !strings.HasPrefix(s, "http://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	if err != nil || u.Host == "" {
		return dockerAuth{}, fmt.Errorf("key %s is not of the form HOST[:PORT][/PATH]: %w", quote(key), ErrInvalidConfig)
	}
	p := strings.Trim(u.Path, "/")
	for _, api := range []string{"v1", "v2"} {
		if rest, ok := strings.CutPrefix(p, api); ok && (rest == "" || rest[0] == '/') {
			p = strings.TrimPrefix(rest, "/")
			break
		}
	}
	e := dockerAuth{host: strings.ToLower(u.Hostname()), port: u.Port(), path: p}
	if isDockerHub(e.host) {
		e.host = dockerHub
	}
	return e, nil
}

// parseAuthEntry decodes a value of auths; "auth" goes before username and password.
func parseAuthEntry(raw json.RawMessage) (Credential, error) {
	var v struct {
		Auth          string `json:"auth"`
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
		RegistryToken string `json:"registrytoken"`
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return Credential{}, fmt.Errorf("not an object of strings: %w", ErrInvalidConfig)
	}
	c := Credential{Username: v.Username, Password: v.Password, IdentityToken: v.IdentityToken, RegistryToken: v.RegistryToken}
	if v.Auth == "" {
		return c, nil
	}
	b, err := base64.StdEncoding.DecodeString(v.Auth)
	if err != nil {
		b, err = base64.RawStdEncoding.DecodeString(v.Auth)
	}
	user, password, ok := strings.Cut(string(b), ":")
	if err != nil || !ok {
		return Credential{}, fmt.Errorf(`"auth" is not base64 of USERNAME:PASSWORD: %w`, ErrInvalidConfig)
	}
	// Docker pads what it encodes with NUL.
	c.Username, c.Password = user, strings.Trim(password, "\x00")
	return c, nil
}

// find returns the credential of the most specific entry that matches.
func (cfg *dockerConfig) find(registry, repository string) Credential {
	host, port := splitHostPort(strings.ToLower(registry))
	if isDockerHub(host) {
		host = dockerHub
	}
	for _, e := range cfg.entries {
		if e.port == port && matchHost(e.host, host) && matchPath(e.path, repository) {
			return e.cred
		}
	}
	return Credential{}
}

// matchHost matches label by label, so that a wildcard never spans a dot.
func matchHost(pattern, host string) bool {
	ps, hs := strings.Split(pattern, "."), strings.Split(host, ".")
	if len(ps) != len(hs) {
		return false
	}
	for i := range ps {
		if ok, err := path.Match(ps[i], hs[i]); err != nil || !ok {
			return false
		}
	}
	return true
}

// matchPath reports whether prefix is a prefix of repository in whole elements.
func matchPath(prefix, repository string) bool {
	rest, ok := strings.CutPrefix(repository, prefix)
	return ok && (prefix == "" || rest == "" || rest[0] == '/')
}

// isDockerHub reports whether host is one of the names that Docker Hub goes by.
func isDockerHub(host string) bool {
	return host == dockerHub || host == "index.docker.io" || host == dockerHubAPI
}

// splitHostPort splits HOST[:PORT], with or without brackets around an IPv6 address.
func splitHostPort(s string) (host, port string) {
	if h, p, err := net.SplitHostPort(s); err == nil {
		return h, p
	}
	return strings.Trim(s, "[]"), ""
}

// fromHelper asks the credential helper that the config names for the registry, if any.
func (cfg *dockerConfig) fromHelper(ctx context.Context, registry string) (Credential, error) {
	server, names := registry, []string{registry}
	if isDockerHub(registry) {
		server = "https://index.docker.io/v1/"
		names = []string{server, "index.docker.io", dockerHub, dockerHubAPI}
	}
	helper := cfg.CredsStore
	for _, n := range names {
		if h, ok := cfg.CredHelpers[n]; ok {
			helper = h
			break
		}
	}
	if helper == "" {
		return Credential{}, nil
	}
	if strings.ContainsAny(helper, `/\`) {
		return Credential{}, fmt.Errorf("get credential for %s: the helper %s is a path, want the name after docker-credential-: %w",
			registry, quote(helper), ErrInvalidConfig)
	}
	c, err := credentials.NewNativeStore(helper).Get(ctx, server)
	if err != nil {
		if ctx.Err() != nil {
			return Credential{}, context.Cause(ctx)
		}
		if errors.Is(err, exec.ErrNotFound) {
			return Credential{}, fmt.Errorf("get credential for %s: the program docker-credential-%s, which the Docker config names, is not in PATH: %w",
				registry, helper, ErrInvalidConfig)
		}
		// What the helper printed may be a secret.
		return Credential{}, fmt.Errorf("get credential for %s: docker-credential-%s failed: run it by hand: echo %s | docker-credential-%s get: %w",
			registry, helper, server, helper, ErrInvalidConfig)
	}
	return Credential{Username: c.Username, Password: c.Password, IdentityToken: c.RefreshToken, RegistryToken: c.AccessToken}, nil
}
