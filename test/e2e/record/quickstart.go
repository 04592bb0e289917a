package record

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"
)

// Where the session is, and what is made of it, below the source.
const (
	SessionFile = "docs/quickstart.session"
	CastFile    = "docs/quickstart.cast"
	SVGFile     = "docs/quickstart.svg"
)

// title is what the terminal's window is called.
const title = "csi-puzzlefs: quick start"

// Config says where the quick start runs.
type Config struct {
	// Source is the root of the source tree: the chart, the examples and the session are read from there.
	Source string
	// Program is csi-puzzlefs.
	Program string
	// Kubeconfig names a cluster without the driver, whose nodes have the driver's image as the chart names it by
	// default, and the image of examples/inline-volume.yaml.
	Kubeconfig string
	// Path are directories with kubectl and helm, in front of those of the environment.
	Path []string
	// Address is one of this machine that the pods of the cluster reach. If it is not given, it is the one
	// from which this machine reaches the API server.
	Address netip.Addr
	// Progress gets the commands and what they print, as it was. Nil means nobody does.
	Progress io.Writer
}

// Files are what is made of a session.
type Files struct {
	Cast, SVG []byte
}

// Quickstart runs the session of the source and returns what is to be recorded of it. It leaves the cluster as it found
// it if nothing fails, but for the driver's state directory on the nodes; when a command fails, the error has its output, and the
// cluster is as it was then.
func Quickstart(ctx context.Context, cfg Config) (f *Files, err error) {
	text, err := os.ReadFile(filepath.Join(cfg.Source, SessionFile))
	if err != nil {
		return nil, err
	}
	session, err := ParseSession(string(text))
	if err != nil {
		return nil, err
	}
	server, err := apiServer(cfg.Kubeconfig)
	if err != nil {
		return nil, err
	}
	if !cfg.Address.IsValid() {
		if cfg.Address, err = localAddress(server); err != nil {
			return nil, err
		}
	}
	registry, err := StartRegistry(cfg.Address)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	dir, err := os.MkdirTemp("", "quickstart-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	sh, values, err := prepare(cfg, dir, registry, server.Hostname())
	if err != nil {
		return nil, fmt.Errorf("prepare the session: %w", err)
	}
	rec, err := record(ctx, session, sh, values)
	if err != nil {
		return nil, errors.Join(err, sh.events(ctx))
	}
	return rec.files()
}

// events returns the events of the cluster as an error, for a person who asks why a command failed.
func (sh *shell) events(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	output, err := sh.run(ctx, "kubectl get events --all-namespaces --sort-by=.lastTimestamp | tail -n 30")
	if err != nil {
		return fmt.Errorf("get the events of the cluster: %w; it printed:\n%s", err, output)
	}
	return fmt.Errorf("the last events of the cluster:\n%s", output)
}

// files makes of a recording what is kept of it.
func (r *Recording) files() (*Files, error) {
	cast, err := r.Cast(title)
	if err != nil {
		return nil, err
	}
	svg, err := SVG(cast)
	if err != nil {
		return nil, err
	}
	return &Files{Cast: cast, SVG: svg}, nil
}

// prepare makes the directory in which the commands run, as much of a checkout as they need, and returns a shell in it
// and the values of the names that the session begins with.
func prepare(cfg Config, dir string, registry *Registry, server string) (shell, map[string]string, error) {
	checkout, home := filepath.Join(dir, "checkout"), filepath.Join(dir, "home")
	ca, values := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "values.yaml")
	for _, d := range []string{home, filepath.Join(checkout, "bin")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return shell{}, nil, err
		}
	}
	for _, d := range []string{"charts", "examples"} {
		if err := os.CopyFS(filepath.Join(checkout, d), os.DirFS(filepath.Join(cfg.Source, d))); err != nil {
			return shell{}, nil, err
		}
	}
	program, err := filepath.Abs(cfg.Program)
	if err != nil {
		return shell{}, nil, err
	}
	if err := os.Symlink(program, filepath.Join(checkout, "bin", "csi-puzzlefs")); err != nil {
		return shell{}, nil, err
	}
	config, err := filepath.Abs(cfg.Kubeconfig)
	if err != nil {
		return shell{}, nil, err
	}
	chartValues, err := yaml.Marshal(map[string]any{
		"registries": map[string]any{"hosts": registry.hosts()},
		// The disk of a test machine may be nearly full of other things.
		"store": map[string]any{"reserve": "1Mi"},
	})
	if err != nil {
		return shell{}, nil, err
	}
	if err := errors.Join(os.WriteFile(ca, registry.certificate, 0o644), os.WriteFile(values, chartValues, 0o644)); err != nil {
		return shell{}, nil, err
	}
	sh := shell{dir: checkout, env: environment(home, config, cfg.Path, registry.env(ca, server)...), progress: cfg.Progress}
	if sh.progress == nil {
		sh.progress = io.Discard
	}
	return sh, map[string]string{"VALUES": values}, nil
}

// apiServer returns where the API server of a kubeconfig's current context is.
func apiServer(kubeconfig string) (*url.URL, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig %s: %w", kubeconfig, err)
	}
	u, err := url.Parse(config.Host)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig %s: %w", kubeconfig, err)
	}
	return u, nil
}

// localAddress returns the address from which this machine reaches a server. Nothing is sent.
func localAddress(server *url.URL) (netip.Addr, error) {
	port := server.Port()
	if port == "" {
		port = "443"
	}
	conn, err := net.Dial("udp", net.JoinHostPort(server.Hostname(), port))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("find the address that pods reach this machine at: %w", err)
	}
	defer conn.Close()
	addr, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return netip.Addr{}, err
	}
	if addr.Addr().IsLoopback() {
		return netip.Addr{}, fmt.Errorf("find the address that pods reach this machine at: the API server is on loopback (%s), which says nothing; give the address", server)
	}
	return addr.Addr(), nil
}
