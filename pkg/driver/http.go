package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strconv"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	// probeTimeout is how long /healthz waits for the CSI socket. Probe takes no lock, so that
	// it answers in well below a millisecond unless the process is starved or stuck.
	probeTimeout = 2 * time.Second
	// httpStopTimeout is how long the end of the driver waits for requests under way.
	httpStopTimeout = 2 * time.Second
	// Limits of the HTTP server: whoever can reach the port can use up no more than this.
	httpHeaderTimeout  = 5 * time.Second
	httpWriteTimeout   = 30 * time.Second
	httpIdleTimeout    = 2 * time.Minute
	httpMaxHeaderBytes = 16 << 10
	// pprofWriteTimeout bounds the length of a CPU profile or a trace.
	pprofWriteTimeout = 5 * time.Minute
	// maxScrapes is how many requests for metrics are answered at a time.
	maxScrapes = 4
)

// checkHTTPEndpoint wants HOST:PORT, where HOST may be left out.
func checkHTTPEndpoint(addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("read HTTP endpoint %q: want [HOST]:PORT with a number for the port, as in :9809 or 127.0.0.1:9809", addr)
	}
	return nil
}

// serveHTTP serves metrics and probes on Config.HTTPEndpoint until stop is called. Nothing that
// it serves takes the lock of a volume or a mount, or touches a mount.
func (d *Driver) serveHTTP() (stop func() error, err error) {
	if d.cfg.HTTPEndpoint == "" {
		return func() error { return nil }, nil
	}
	l, err := net.Listen("tcp", d.cfg.HTTPEndpoint)
	if err != nil {
		return nil, fmt.Errorf("serve HTTP on %s: %w; free the port, or choose another", d.cfg.HTTPEndpoint, err)
	}
	srv := &http.Server{
		Handler:           d.httpHandler(),
		ReadHeaderTimeout: httpHeaderTimeout,
		ReadTimeout:       httpHeaderTimeout,
		WriteTimeout:      httpWriteTimeout,
		IdleTimeout:       httpIdleTimeout,
		MaxHeaderBytes:    httpMaxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(d.log.Handler(), slog.LevelDebug), // what strangers do wrong
	}
	if d.cfg.Pprof {
		srv.WriteTimeout = pprofWriteTimeout
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	d.log.Info("serving HTTP", "address", l.Addr().String(), "pprof", d.cfg.Pprof)
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), httpStopTimeout)
		defer cancel()
		err := srv.Shutdown(ctx)
		if errors.Is(err, context.DeadlineExceeded) {
			err = srv.Close()
		}
		if e := <-served; !errors.Is(e, http.ErrServerClosed) {
			err = errors.Join(err, e)
		}
		if err != nil {
			return fmt.Errorf("serve HTTP: %w", err)
		}
		return nil
	}, nil
}

// httpHandler answers what Config says is served, to GET and HEAD.
func (d *Driver) httpHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics.registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(d.log.Handler(), slog.LevelError),
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: maxScrapes,
		Timeout:             httpWriteTimeout / 2,
	}))
	answer := func(check func(context.Context) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("Cache-Control", "no-store")
			if err := check(r.Context()); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ok")
		}
	}
	mux.HandleFunc("GET /healthz", answer(d.checkAlive))
	mux.HandleFunc("GET /readyz", answer(func(context.Context) error { return d.checkReady() }))
	if d.cfg.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// checkReady returns nil once the volumes of an earlier driver are taken care of and the CSI
// socket is served, until the driver is to stop. Whether kubelet has registered it does not
// count: kubelet tries again by itself, and a driver that is restarted for it would take the
// mounts of running pods with it. The metric puzzlefs_kubelet_registered tells.
func (d *Driver) checkReady() error {
	if d.ready.Load() {
		return nil
	}
	if d.stopping.Load() {
		return errors.New("the driver is stopping")
	}
	return errors.New("the driver is starting: it mounts the volumes of an earlier one again")
}

// checkAlive asks the CSI socket with a connection of its own whether it answers, as kubelet
// would. There is nobody to ask before it is served and after it was closed: then it is enough
// that this process answers.
func (d *Driver) checkAlive(ctx context.Context) error {
	at := d.serving.Load()
	if at == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var dialer net.Dialer
	conn, err := grpc.NewClient("passthrough:///csi", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, (*at).Network(), (*at).String())
		}))
	if err == nil {
		defer conn.Close()
		_, err = csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{})
	}
	if err != nil && d.serving.Load() == at {
		return fmt.Errorf("the CSI socket does not answer: %w", err)
	}
	return nil
}
