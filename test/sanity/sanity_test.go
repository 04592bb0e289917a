// Package sanity_test runs csi-sanity, the conformance tests of CSI, against the driver with a real
// registry and real mounts.
//
// csi-sanity makes its volumes with a controller, which the driver does not have: an inline
// volume needs none. A front with a stub controller of this package stands before the
// driver's socket and passes everything else on.
package sanity_test

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// How many of csi-sanity's specs run and pass: those of the identity and the node service that
// concern a driver with these capabilities, and all, with those of the stub controller. Fewer
// would mean that some no longer run.
const (
	driverSpecs = 17
	allSpecs    = 35
)

func TestSanity(t *testing.T) {
	ref, digest := pushImage(t, startRegistry(t))
	dir := t.TempDir()
	socket := startFront(t, startDriver(t, dir), map[string]string{"image": ref, "digest": digest})

	config := sanity.NewTestConfig()
	config.Address = "unix://" + socket
	config.TargetPath = filepath.Join(dir, "targets")
	config.StagingPath = filepath.Join(dir, "staging")
	sanity.GinkgoTest(&config)
	ofDriver, all := 0, 0
	ginkgo.ReportAfterEach(func(r types.SpecReport) {
		if !r.State.Is(types.SpecStatePassed) {
			return
		}
		all++
		if top := r.ContainerHierarchyTexts[0]; top == "Identity Service" || top == "Node Service" {
			ofDriver++
		}
	})
	gomega.RegisterFailHandler(ginkgo.Fail)
	ginkgo.RunSpecs(t, "csi-sanity")
	if ofDriver != driverSpecs || all != allSpecs {
		t.Errorf("%d specs passed, %d of them of the driver; want %d and %d", all, ofDriver, allSpecs, driverSpecs)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("left mounted under %s (%v):\n%s", dir, err, mounts)
	}
}

// startRegistry starts the distribution project's registry and returns its address.
func startRegistry(t *testing.T) string {
	t.Helper()
	logrus.SetOutput(io.Discard)
	config := &configuration.Configuration{Storage: configuration.Storage{"inmemory": {}}}
	config.Catalog.MaxEntries = 100
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	srv := httptest.NewServer(handlers.NewApp(ctx, config))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// pushImage pushes a golden image and returns its reference and digest.
func pushImage(t *testing.T, host string) (ref, digest string) {
	t.Helper()
	src, err := store.Open(store.Config{Dir: "../../testdata/images/v3-master"})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	root, err := src.Resolve("small")
	if err != nil {
		t.Fatal(err)
	}
	client, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	ref = host + "/sanity/small:1"
	to, err := registry.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Push(t.Context(), src, root, to, registry.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	return ref, root.Digest.String()
}

// startDriver runs the real driver and returns a connection to it.
func startDriver(t *testing.T, dir string) *grpc.ClientConn {
	t.Helper()
	endpoint := "unix://" + filepath.Join(dir, "csi.sock")
	d, err := driver.New(driver.Config{
		Endpoint: endpoint, NodeID: "node-1", StateDir: filepath.Join(dir, "state"), Policy: driver.Policy{RequireDigest: true},
		Mounter: mounter{}, Logger: slog.New(slog.DiscardHandler), Version: "sanity",
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("driver ended with: %v", err)
		}
	})
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// startFront serves the stub controller, and the driver behind it, and returns the socket.
func startFront(t *testing.T, behind *grpc.ClientConn, volumeContext map[string]string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sanity")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "csi.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	// Calls that are not the controller's go to the driver as they are.
	pass := func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		if strings.HasPrefix(info.FullMethod, "/csi.v1.Controller/") || strings.HasSuffix(info.FullMethod, "/GetPluginCapabilities") {
			return handle(ctx, req)
		}
		resp := answer(info.FullMethod)
		if resp == nil {
			return nil, status.Errorf(codes.Unimplemented, "%s is not passed on", info.FullMethod)
		}
		return resp, behind.Invoke(ctx, info.FullMethod, req, resp)
	}
	srv := grpc.NewServer(grpc.UnaryInterceptor(pass))
	csi.RegisterIdentityServer(srv, &identity{})
	csi.RegisterNodeServer(srv, &csi.UnimplementedNodeServer{})
	csi.RegisterControllerServer(srv, &controller{context: volumeContext, volumes: map[string]*csi.Volume{}})
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return socket
}

// answer returns an empty answer of a call that the driver serves.
func answer(method string) any {
	_, name, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	switch name {
	case "GetPluginInfo":
		return &csi.GetPluginInfoResponse{}
	case "Probe":
		return &csi.ProbeResponse{}
	case "NodePublishVolume":
		return &csi.NodePublishVolumeResponse{}
	case "NodeUnpublishVolume":
		return &csi.NodeUnpublishVolumeResponse{}
	case "NodeGetInfo":
		return &csi.NodeGetInfoResponse{}
	case "NodeGetCapabilities":
		return &csi.NodeGetCapabilitiesResponse{}
	case "NodeGetVolumeStats":
		return &csi.NodeGetVolumeStatsResponse{}
	default:
		return nil
	}
}

// identity says that there is a controller.
type identity struct {
	csi.UnimplementedIdentityServer
}

func (*identity) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{{
		Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}},
	}}}, nil
}

// controller makes volumes that are all of one image.
type controller struct {
	csi.UnimplementedControllerServer
	context map[string]string
	mu      sync.Mutex // guards volumes
	volumes map[string]*csi.Volume
}

func (c *controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	can := func(t csi.ControllerServiceCapability_RPC_Type) *csi.ControllerServiceCapability {
		return &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}}
	}
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: []*csi.ControllerServiceCapability{
		can(csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME), can(csi.ControllerServiceCapability_RPC_LIST_VOLUMES),
	}}, nil
}

func (c *controller) ListVolumes(_ context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	if req.GetStartingToken() != "" {
		return nil, status.Error(codes.Aborted, "everything comes at once: there is no token")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	list := &csi.ListVolumesResponse{}
	for _, v := range c.volumes {
		list.Entries = append(list.Entries, &csi.ListVolumesResponse_Entry{Volume: v})
	}
	return list, nil
}

func (c *controller) CreateVolume(_ context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if req.GetName() == "" || len(req.GetVolumeCapabilities()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "want a name and capabilities")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	id, size := "volume-"+req.GetName(), req.GetCapacityRange().GetRequiredBytes()
	v := c.volumes[id]
	if v == nil {
		v = &csi.Volume{VolumeId: id, CapacityBytes: size, VolumeContext: maps.Clone(c.context)}
		c.volumes[id] = v
	}
	if v.GetCapacityBytes() != size {
		return nil, status.Error(codes.AlreadyExists, "there is one of another size")
	}
	return &csi.CreateVolumeResponse{Volume: v}, nil
}

func (c *controller) DeleteVolume(_ context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, status.Error(codes.InvalidArgument, "want a volume id")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.volumes, req.GetVolumeId())
	return &csi.DeleteVolumeResponse{}, nil
}

func (c *controller) ValidateVolumeCapabilities(_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if req.GetVolumeId() == "" || len(req.GetVolumeCapabilities()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "want a volume id and capabilities")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.volumes[req.GetVolumeId()] == nil {
		return nil, status.Error(codes.NotFound, "no such volume")
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{VolumeCapabilities: req.GetVolumeCapabilities()}}, nil
}
