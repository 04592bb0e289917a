package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// DriverName is what a pod's volume names as its driver.
const DriverName = "csi.puzzlefs.io"

// stopTimeout is how long Run waits for calls under way when it is to stop.
const stopTimeout = 10 * time.Second

// Config says how to run a driver.
type Config struct {
	// Endpoint is the CSI socket, "unix:///path".
	Endpoint string
	// NodeID is the name of the Kubernetes node.
	NodeID string
	// StateDir is where everything is kept, see the package comment. It is made if it
	// does not exist, and used by one driver at a time.
	StateDir string
	// KubeletRootDir is kubelet's --root-dir. If it is not empty the driver registers
	// itself with kubelet, and takes every PuzzleFS mount in kubelet's pods for its own:
	// at start it detaches those of volumes that it does not know.
	KubeletRootDir string
	// ExternalRegistration leaves it to node-driver-registrar, a sidecar, to register the
	// driver with kubelet; everything else that KubeletRootDir is for stays.
	ExternalRegistration bool
	// Policy says which images may be mounted.
	Policy Policy
	// MountOptions are some of nodev, nosuid, noexec, dev, suid and exec, for all volumes.
	// What is not said of is as with nodev, nosuid and exec. A volume can only be stricter.
	MountOptions []string
	// StoreQuota is how many bytes of disk the images on the node may take up, 0 for any
	// number. Images that no volume uses make room for others, least recently used first.
	StoreQuota int64
	// StoreReserve is how much of the disk of StateDir they leave free, whoever uses the rest.
	StoreReserve Reserve
	// MetadataMemory is about how many bytes the metadata of all mounted images may take
	// together, with what decoding one of them takes; 0 means [DefaultMetadataMemory]. It is
	// never without a limit: one image could otherwise end the process, and with it all volumes.
	MetadataMemory int64
	// ContentCache is how many bytes of decoded content are kept in memory for all mounted images
	// together; 0 means [image.DefaultCacheBytes]. What the kernel was given it keeps by itself.
	ContentCache int64
	// Registry says how registries are reached. Its Credentials are the node's own, which
	// every pod may use; a pod's secret goes before them.
	Registry registry.Config
	// Mounter serves images.
	Mounter Mounter
	// HTTPEndpoint is where metrics and probes are served, "[HOST]:PORT"; "" for nowhere.
	// Whoever can reach it can read them.
	HTTPEndpoint string
	// Pprof also serves profiles of the process there.
	Pprof bool
	// PodEvents sends events to the pods whose volumes they are about, by way of the API server
	// that Kubeconfig names or, if that is "", of the cluster that this process is a pod of.
	// Where there is neither, pods get none.
	PodEvents  bool
	Kubeconfig string
	// SlowPull is after what time the pods that wait for a pull are told how far it is; 0 for
	// never.
	SlowPull time.Duration
	// Logger is where calls and repairs are written, with an id for each call; nil means
	// slog.Default.
	Logger *slog.Logger
	// Version is the driver's version, "" means "unknown".
	Version string
	// Fault, in tests, is called at each step of a publish and an unpublish. An error is
	// taken for the step's own.
	Fault func(step string) error
}

// Driver is a CSI node driver. New makes one, Run runs it once.
type Driver struct {
	cfg      Config
	log      *slog.Logger
	socket   string
	client   *registry.Client
	metrics  *metrics
	events   *events
	requests *requestIDs
	flags    mountFlags
	locks    locks
	turns    turns

	// opened says that what start sets may be read. serving is where the CSI socket is, nil
	// before it is served and when it is closed. ready is what /readyz and Probe say.
	opened, ready, stopping atomic.Bool
	serving                 atomic.Pointer[net.Addr]

	// What follows is set by start.
	images  *images
	pins    *store.Pins
	space   *space
	volumes *volumes
	mounts  *mounts
	pulls   *pulls
}

// New checks cfg. It changes nothing on disk.
func New(cfg Config) (*Driver, error) {
	socket, err := parseEndpoint(cfg.Endpoint)
	switch {
	case err != nil:
		return nil, fmt.Errorf("configure driver: %w", err)
	case cfg.NodeID == "":
		return nil, errors.New("configure driver: no node id; give the name of the Kubernetes node")
	case len(cfg.NodeID) > 256:
		return nil, fmt.Errorf("configure driver: the node id has %d bytes, CSI takes 256", len(cfg.NodeID))
	case !filepath.IsAbs(cfg.StateDir):
		return nil, fmt.Errorf("configure driver: state directory %q; give an absolute path", cfg.StateDir)
	case cfg.KubeletRootDir != "" && !filepath.IsAbs(cfg.KubeletRootDir):
		return nil, fmt.Errorf("configure driver: kubelet root directory %q; give an absolute path", cfg.KubeletRootDir)
	case cfg.Mounter == nil:
		return nil, errors.New("configure driver: no Mounter")
	case cfg.ContentCache < 0:
		return nil, fmt.Errorf("configure driver: %d bytes for the content cache; give 0 or more", cfg.ContentCache)
	case cfg.SlowPull < 0:
		return nil, fmt.Errorf("configure driver: slow pulls after %v; give 0 or more", cfg.SlowPull)
	case cfg.Pprof && cfg.HTTPEndpoint == "":
		return nil, errors.New("configure driver: profiles need an HTTP endpoint")
	case cfg.HTTPEndpoint != "":
		if err := checkHTTPEndpoint(cfg.HTTPEndpoint); err != nil {
			return nil, fmt.Errorf("configure driver: %w", err)
		}
	}
	flags, err := parseMountFlags(cfg.MountOptions)
	if err != nil {
		return nil, fmt.Errorf("configure driver: %w", err)
	}
	if cfg.StoreQuota < 0 {
		return nil, fmt.Errorf("configure driver: a quota of %d bytes for the store; give 0 for none, or more", cfg.StoreQuota)
	}
	if err := cfg.StoreReserve.validate(); err != nil {
		return nil, fmt.Errorf("configure driver: %w", err)
	}
	if err := cfg.Policy.validate(); err != nil {
		return nil, fmt.Errorf("configure driver: %w", err)
	}
	if cfg.MetadataMemory != 0 && cfg.MetadataMemory < minMetadataMemory {
		return nil, fmt.Errorf("configure driver: memory for metadata: %d bytes; want at least %s", cfg.MetadataMemory, humanBytes(minMetadataMemory))
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.ContentCache == 0 {
		cfg.ContentCache = image.DefaultCacheBytes
	}
	if cfg.Version == "" {
		cfg.Version = "unknown"
	}
	cfg.Logger = slog.New(callHandler{cfg.Logger.Handler()})
	if cfg.Registry.Logger == nil {
		cfg.Registry.Logger = cfg.Logger
	}
	if cfg.Registry.MaxManifestBytes == 0 {
		cfg.Registry.MaxManifestBytes = maxManifest(cfg.MetadataMemory)
	}
	client, err := registry.New(cfg.Registry)
	if err != nil {
		return nil, fmt.Errorf("configure driver: %w", err)
	}
	d := &Driver{cfg: cfg, log: cfg.Logger, socket: socket, client: client, flags: flags, metrics: newMetrics(cfg.Version), requests: newRequestIDs()}
	d.metrics.watch(d)
	if d.events, err = newEvents(cfg, d.metrics, d.log); err != nil {
		return nil, fmt.Errorf("configure driver: %w", err)
	}
	return d, nil
}

// Run serves HTTP if Config says so, puts the node right after an earlier driver, listens on
// Config.Endpoint, registers with kubelet if Config says so, and serves until ctx is done. Then
// it is not ready any more, ends the pulls, lets calls finish, removes its sockets, sends the
// events that are left, ends HTTP and returns nil. It unmounts nothing: the volumes are served
// as long as the process lives, and mounted again by the next driver.
func (d *Driver) Run(ctx context.Context) error {
	return d.run(ctx, func() (net.Listener, error) { return listen(d.socket) })
}

// Serve is Run with a listener of the caller's, which it closes.
func (d *Driver) Serve(ctx context.Context, l net.Listener) error {
	err := d.run(ctx, func() (net.Listener, error) { return l, nil })
	if closeErr := l.Close(); closeErr != nil && !errors.Is(closeErr, net.ErrClosed) {
		err = errors.Join(err, closeErr)
	}
	return err
}

func (d *Driver) run(ctx context.Context, listen func() (net.Listener, error)) (err error) {
	stopHTTP, err := d.serveHTTP() //nolint:contextcheck // it ends after ctx
	if err != nil {
		return fmt.Errorf("start driver: %w", err)
	}
	defer func() { err = errors.Join(err, stopHTTP()) }()
	d.events.start() //nolint:contextcheck // they end after ctx
	defer d.events.close()
	unlock, err := d.start(ctx)
	if err != nil && errors.Is(err, ctx.Err()) {
		return nil // told to stop before there was anything to serve
	}
	if err != nil {
		return fmt.Errorf("start driver: %w", err)
	}
	defer func() { err = errors.Join(err, unlock()) }()
	defer d.client.CloseIdleConnections()
	defer d.volumes.keepOnDisk()() //nolint:contextcheck // calls under way commit after ctx
	defer d.watchSpace(ctx)()
	defer d.pulls.close()

	l, err := listen()
	if err != nil {
		return fmt.Errorf("start driver: %w", err)
	}
	defer d.removePluginDir() // while no other driver can make it
	srv := grpc.NewServer(grpc.UnaryInterceptor(d.intercept))
	csi.RegisterIdentityServer(srv, &identity{version: d.cfg.Version, ready: d.ready.Load})
	csi.RegisterNodeServer(srv, &node{d: d})
	addr := l.Addr()
	d.serving.Store(&addr)
	d.ready.Store(true)
	defer d.notReady()
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	d.log.Info("serving", "driver", DriverName, "version", d.cfg.Version, "socket", l.Addr().String(), "state", d.cfg.StateDir)

	if d.cfg.KubeletRootDir != "" && !d.cfg.ExternalRegistration {
		unregister, failed := d.register(d.socket)
		if failed != nil {
			srv.Stop()
			return errors.Join(failed, stopped(<-served))
		}
		defer func() { err = errors.Join(err, unregister()) }()
	}
	select {
	case err := <-served:
		return fmt.Errorf("serve CSI: %w", err)
	case <-ctx.Done():
	}
	d.notReady()
	d.log.Info("stopping; volumes stay mounted")
	// Calls that wait for a pull end with it.
	d.pulls.close()
	timer := time.AfterFunc(stopTimeout, srv.Stop)
	defer timer.Stop()
	srv.GracefulStop()
	return stopped(<-served)
}

// stopped is the error of a gRPC server that was told to stop: none if it was told before it had begun to serve.
func stopped(err error) error {
	if errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return err
}

// removePluginDir removes the directory below kubelet's that was made for the socket, so that nothing
// stays there of a driver that is uninstalled. One that somebody else uses, or has mounted, is left.
func (d *Driver) removePluginDir() {
	dir := filepath.Dir(d.socket)
	if d.cfg.KubeletRootDir == "" || dir != filepath.Join(d.cfg.KubeletRootDir, "plugins", DriverName) {
		return
	}
	if err := os.Remove(dir); err != nil {
		d.log.Debug("the directory of the socket stays", "directory", dir, "error", err)
	}
}

// notReady says that the driver stops.
func (d *Driver) notReady() {
	d.stopping.Store(true)
	d.ready.Store(false)
	d.serving.Store(nil)
}

// start makes the state directory ours, opens what is in it, and reconciles.
func (d *Driver) start(ctx context.Context) (unlock func() error, err error) {
	dir := func(name string) string { return filepath.Join(d.cfg.StateDir, name) }
	for _, name := range []string{"", "images", "mounts", "volumes"} {
		if err := os.MkdirAll(dir(name), 0o700); err != nil {
			return nil, fmt.Errorf("make state directory: %w", err)
		}
	}
	lock, err := lockFile(dir("lock"))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	// The store stays open when the driver stops: mounts go on reading from it.
	st, err := store.Open(store.Config{Dir: dir("store"), Create: true})
	if err != nil {
		return nil, err
	}
	if d.images, err = openImages(dir("images"), st, d); err != nil {
		return nil, err
	}
	if err := d.openSpace(dir("pins"), st); err != nil {
		return nil, err
	}
	if d.volumes, err = openVolumes(dir("volumes"), d.log); err != nil {
		return nil, err
	}
	mountsDir, err := filepath.EvalSymlinks(dir("mounts"))
	if err != nil {
		return nil, fmt.Errorf("resolve state directory: %w", err)
	}
	d.mounts = &mounts{
		dir: mountsDir, mounter: d.cfg.Mounter, open: d.images.open, pin: d.pinMount,
		memory: newMemory(d.cfg.MetadataMemory), flags: d.flags, log: d.log,
		shared: map[mountKey]*sharedMount{},
	}
	d.pulls = newPulls()
	d.opened.Store(true)
	stale, err := d.pins.List()
	if err != nil {
		return nil, err
	}
	if err := d.reconcile(ctx); err != nil {
		return nil, err
	}
	// Until now the pins of the earlier driver kept the images of its volumes.
	d.unpinMounts(stale)
	if err := d.pins.Prune(); err != nil {
		d.log.Error("cannot remove what a killed process held; a collection does", "error", err)
	}
	return lock.Close, nil
}

// lockFile takes the lock that says whose state directory it is. Closing the file, or the
// death of the process, releases it.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: another driver uses this state directory; stop it, or choose another directory: %w", path, err), f.Close())
	}
	return f, nil
}
