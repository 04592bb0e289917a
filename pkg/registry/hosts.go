package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// capability is what an endpoint may be asked to do; a set of bits.
type capability uint8

const (
	// canPull: content by digest, which needs no trust.
	canPull capability = 1 << iota
	// canResolve: say what a tag means, which does.
	canResolve
	canPush
	canAll = canPull | canResolve | canPush
)

// endpoint is one place where a repository may be found: the registry or a mirror of it.
type endpoint struct {
	// base is scheme, host and API root ("/v2" as a rule).
	base url.URL
	// registry is the host of the reference; what base.Host is a mirror of, if they differ.
	registry string
	caps     capability
	header   http.Header
	tls      tlsFiles
	// dialTimeout is 0 for the default; proxy is nil for what the environment says.
	dialTimeout time.Duration
	proxy       *url.URL
}

// tlsFiles are paths of PEM files.
type tlsFiles struct {
	// cas are trusted besides the system's.
	cas []string
	// pairs are client certificates with their keys; no key: it is in the same file.
	pairs [][2]string
}

// String names the endpoint in messages: scheme and host, without what may be a secret.
func (e *endpoint) String() string {
	return (&url.URL{Scheme: e.base.Scheme, Host: e.base.Host}).String()
}

// isMirror reports whether the endpoint stands in for another registry.
func (e *endpoint) isMirror() bool {
	return e.base.Host != e.registry && (e.registry != dockerHub || e.base.Host != dockerHubAPI)
}

// loginName is the name under which credentials for this endpoint are kept.
func (e *endpoint) loginName() string {
	if e.isMirror() {
		return e.base.Host
	}
	return e.registry
}

// sameOrigin reports whether u has the scheme, host and port of the endpoint.
func (e *endpoint) sameOrigin(u *url.URL) bool {
	return u.Scheme == e.base.Scheme && strings.EqualFold(withPort(u), withPort(&e.base))
}

// url returns the address of a resource below the repository.
func (e *endpoint) url(repository string, elem ...string) string {
	u := e.base
	u.Path = strings.TrimSuffix(u.Path, "/") + "/" + repository + "/" + strings.Join(elem, "/")
	if e.isMirror() {
		u.RawQuery = url.Values{"ns": {e.registry}}.Encode()
	}
	return u.String()
}

// withPort returns HOST:PORT with the default port filled in.
func withPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return u.Hostname() + ":" + port
}

// isLoopback reports whether HOST[:PORT] is this machine.
func isLoopback(hostport string) bool {
	host, _ := splitHostPort(hostport)
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

// defaultEndpoint is the registry itself. Plain HTTP is for loopback addresses without
// certificates of their own only.
func defaultEndpoint(registry string, tls tlsFiles) endpoint {
	u := url.URL{Scheme: "https", Host: registry, Path: "/v2"}
	switch {
	case registry == dockerHub:
		u.Host = dockerHubAPI
	case isLoopback(registry) && len(tls.cas) == 0 && len(tls.pairs) == 0:
		u.Scheme = "http"
	}
	return endpoint{base: u, registry: registry, caps: canAll, tls: tls}
}

// loadEndpoints returns where to look for repositories of registry, the mirrors in the
// order of the file and the registry last. certsDir is a directory in containerd's layout,
// or "". Errors wrap ErrInvalidConfig.
//
//	certsDir/HOST_PORT_/  or  HOST:PORT/  or  HOST/  or  _default/
//	    hosts.toml             what to ask, or, where there is no such file,
//	    *.crt                  CA certificates
//	    *.cert, *.key          client certificates and their keys
func loadEndpoints(certsDir, registry string) ([]endpoint, error) {
	dir, err := hostDir(certsDir, registry)
	if err != nil {
		return nil, err
	}
	if dir == "" {
		return []endpoint{defaultEndpoint(registry, tlsFiles{})}, nil
	}
	file := filepath.Join(dir, "hosts.toml")
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read registry hosts: %w: %w", err, ErrInvalidConfig)
	}
	if len(b) == 0 {
		certs, err := certFiles(dir)
		if err != nil {
			return nil, err
		}
		return []endpoint{defaultEndpoint(registry, certs)}, nil
	}
	eps, err := parseHosts(b, dir, registry)
	if err != nil {
		return nil, fmt.Errorf("parse %s: %w", file, err)
	}
	return eps, nil
}

// hostDir returns the directory for registry in certsDir, "" if there is none.
func hostDir(certsDir, registry string) (string, error) {
	if certsDir == "" {
		return "", nil
	}
	names := []string{registry, "_default"}
	if host, port, ok := cutLast(registry, ":"); ok {
		names = []string{host + "_" + port + "_", registry, "_default"}
	}
	for _, n := range names {
		dir := filepath.Join(certsDir, n)
		fi, err := os.Stat(dir)
		switch {
		case err == nil && fi.IsDir():
			return dir, nil
		case err == nil, errors.Is(err, fs.ErrNotExist):
		default:
			return "", fmt.Errorf("look for registry hosts: %w: %w", err, ErrInvalidConfig)
		}
	}
	return "", nil
}

// cutLast cuts s around the last sep.
func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i <= 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// certFiles finds the certificates of a directory in Docker's layout.
func certFiles(dir string) (tlsFiles, error) {
	var t tlsFiles
	entries, err := os.ReadDir(dir)
	if err != nil {
		return t, fmt.Errorf("look for certificates: %w: %w", err, ErrInvalidConfig)
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		switch filepath.Ext(name) {
		case ".crt":
			t.cas = append(t.cas, name)
		case ".cert":
			key := strings.TrimSuffix(name, ".cert") + ".key"
			if _, err := os.Stat(key); errors.Is(err, fs.ErrNotExist) {
				key = ""
			}
			t.pairs = append(t.pairs, [2]string{name, key})
		}
	}
	return t, nil
}

// hostTable is a table of hosts.toml: the whole file, or one [host."URL"].
type hostTable struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   bool           `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
	Proxy        string         `toml:"proxy"`
}

// parseHosts reads a hosts.toml; relative paths in it start at dir. Keys that it does not
// know are ignored, as containerd does.
func parseHosts(b []byte, dir, registry string) ([]endpoint, error) {
	var doc struct {
		hostTable
		Server string               `toml:"server"`
		Hosts  map[string]hostTable `toml:"host"`
	}
	if err := toml.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("%s: %w", quoteCause(err), ErrInvalidConfig)
	}
	eps := make([]endpoint, 0, len(doc.Hosts)+1)
	for _, name := range hostOrder(b, doc.Hosts) {
		ep, err := parseHost(name, doc.Hosts[name], dir, registry)
		if err != nil {
			return nil, fmt.Errorf("[host.%s]: %w", quote(name), err)
		}
		eps = append(eps, ep)
	}
	// The server comes last, whether it is named or not.
	ep, err := parseHost(doc.Server, doc.hostTable, dir, registry)
	if err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	return append(eps, ep), nil
}

// hostOrder returns the keys of hosts in the order of the file, which a map loses.
func hostOrder(b []byte, hosts map[string]hostTable) []string {
	var order []string
	seen := make(map[string]bool, len(hosts))
	add := func(key []string) {
		if len(key) < 2 || key[0] != "host" || seen[key[1]] {
			return
		}
		if _, ok := hosts[key[1]]; ok {
			seen[key[1]] = true
			order = append(order, key[1])
		}
	}
	var p unstable.Parser
	p.Reset(b)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		var key []string
		for it := e.Key(); it.Next(); {
			key = append(key, string(it.Node().Data))
		}
		switch e.Kind {
		case unstable.Table:
			table = key
			add(key)
		case unstable.KeyValue:
			add(append(append([]string(nil), table...), key...))
		default: // comments, arrays of tables
		}
	}
	// What is left was written as one inline table, where TOML itself knows no order.
	var rest []string
	for name := range hosts {
		if !seen[name] {
			rest = append(rest, name)
		}
	}
	sort.Strings(rest)
	return append(order, rest...)
}

// parseHost makes an endpoint of one table; an empty server is the registry itself.
func parseHost(server string, t hostTable, dir, registry string) (endpoint, error) {
	ep := endpoint{registry: registry, caps: canAll}
	if t.SkipVerify {
		return ep, fmt.Errorf("skip_verify = true is refused, certificates are always verified: name the CA with ca = \"FILE\" instead: %w", ErrInvalidConfig)
	}
	var err error
	if ep.tls.cas, err = stringList("ca", t.CA, dir); err != nil {
		return ep, err
	}
	if ep.tls.pairs, err = keyPairs(t.Client, dir); err != nil {
		return ep, err
	}
	ep.base = defaultEndpoint(registry, ep.tls).base
	if server != "" {
		if ep.base, err = parseServer(server, t.OverridePath); err != nil {
			return ep, err
		}
	}
	if len(t.Capabilities) > 0 {
		ep.caps = 0
	}
	for _, c := range t.Capabilities {
		switch strings.ToLower(c) {
		case "pull":
			ep.caps |= canPull
		case "resolve":
			ep.caps |= canResolve
		case "push":
			ep.caps |= canPush
		default:
			return ep, fmt.Errorf("unknown capability %s; known are pull, resolve, push: %w", quote(c), ErrInvalidConfig)
		}
	}
	if ep.header, err = headers(t.Header); err != nil {
		return ep, err
	}
	if t.DialTimeout != "" {
		if ep.dialTimeout, err = time.ParseDuration(t.DialTimeout); err != nil || ep.dialTimeout <= 0 {
			return ep, fmt.Errorf("dial_timeout %s is not a duration such as \"200ms\": %w", quote(t.DialTimeout), ErrInvalidConfig)
		}
	}
	if t.Proxy != "" {
		u, err := url.Parse(t.Proxy)
		if err != nil || u.Host == "" {
			// A proxy's URL may hold a password.
			return ep, fmt.Errorf("proxy is not a URL such as \"http://proxy:3128\": %w", ErrInvalidConfig)
		}
		ep.proxy = u
	}
	return ep, nil
}

// parseServer parses the URL of an endpoint and completes its path to the API root.
func parseServer(s string, overridePath bool) (url.URL, error) {
	raw := s
	if !strings.Contains(raw, "://") {
		raw = "https://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || (u.Scheme != "https" && u.Scheme != "http") {
		return url.URL{}, fmt.Errorf("%s is not a URL such as \"https://mirror.example\": %w", quote(s), ErrInvalidConfig)
	}
	p := path.Clean("/" + u.Path)
	if !overridePath && !strings.HasSuffix(p, "/v2") {
		p = path.Join(p, "v2")
	}
	return url.URL{Scheme: u.Scheme, Host: u.Host, Path: p}, nil
}

// stringList reads a string or a list of strings, paths relative to dir.
func stringList(key string, v any, dir string) ([]string, error) {
	var list []string
	switch v := v.(type) {
	case nil:
	case string:
		list = append(list, absPath(v, dir))
	case []any:
		for _, x := range v {
			s, ok := x.(string)
			if !ok {
				return nil, fmt.Errorf("%s holds something that is not a string: %w", key, ErrInvalidConfig)
			}
			list = append(list, absPath(s, dir))
		}
	default:
		return nil, fmt.Errorf("%s is neither a string nor a list of strings: %w", key, ErrInvalidConfig)
	}
	return list, nil
}

// keyPairs reads "PEM", ["PEM", …] or [["CERT", "KEY"], …].
func keyPairs(v any, dir string) ([][2]string, error) {
	list, ok := v.([]any)
	if !ok {
		files, err := stringList("client", v, dir)
		if err != nil || len(files) == 0 {
			return nil, err
		}
		return [][2]string{{files[0], ""}}, nil
	}
	var pairs [][2]string
	for _, x := range list {
		if s, ok := x.(string); ok {
			pairs = append(pairs, [2]string{absPath(s, dir), ""})
			continue
		}
		p, ok := x.([]any)
		if !ok || len(p) != 2 {
			return nil, fmt.Errorf("client holds something that is neither a file nor a pair of files: %w", ErrInvalidConfig)
		}
		cert, ok1 := p[0].(string)
		key, ok2 := p[1].(string)
		if !ok1 || !ok2 {
			return nil, fmt.Errorf("client holds a pair that is not of strings: %w", ErrInvalidConfig)
		}
		pair := [2]string{absPath(cert, dir), ""}
		if key != "" {
			pair[1] = absPath(key, dir)
		}
		pairs = append(pairs, pair)
	}
	return pairs, nil
}

// headers reads a table of strings or lists of strings.
func headers(table map[string]any) (http.Header, error) {
	if len(table) == 0 {
		return nil, nil
	}
	h := make(http.Header, len(table))
	for k, v := range table {
		list, ok := v.([]any)
		if !ok {
			list = []any{v}
		}
		for _, x := range list {
			s, ok := x.(string)
			if !ok {
				return nil, fmt.Errorf("header %s is neither a string nor a list of strings: %w", quote(k), ErrInvalidConfig)
			}
			h.Add(k, s)
		}
	}
	return h, nil
}

// absPath resolves p against the directory of the file that names it.
func absPath(p, dir string) string {
	if filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(dir, p)
}
