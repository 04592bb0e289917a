package driver

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"

	"google.golang.org/grpc"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// registration is the service with which kubelet learns about the driver. It is what the
// sidecar node-driver-registrar does, so that a pod of ours needs one container only.
type registration struct {
	registerapi.UnsafeRegistrationServer
	// endpoint is the path of the CSI socket, which must be the same for kubelet.
	endpoint string
	metrics  *metrics
	log      *slog.Logger
}

var _ registerapi.RegistrationServer = (*registration)(nil)

// GetInfo tells kubelet where the CSI socket is.
func (r *registration) GetInfo(context.Context, *registerapi.InfoRequest) (*registerapi.PluginInfo, error) {
	return &registerapi.PluginInfo{
		Type:              registerapi.CSIPlugin,
		Name:              DriverName,
		Endpoint:          r.endpoint,
		SupportedVersions: []string{"1.0.0"},
	}, nil
}

// NotifyRegistrationStatus learns what became of it. Kubelet tries again by itself, with
// back-off, as long as the socket is there. Ending the process, as node-driver-registrar
// does, would take down the mounts that this process serves.
func (r *registration) NotifyRegistrationStatus(_ context.Context, s *registerapi.RegistrationStatus) (*registerapi.RegistrationStatusResponse, error) {
	if s.GetPluginRegistered() {
		r.metrics.registered.Set(1)
		r.log.Info("kubelet registered the driver", "endpoint", r.endpoint)
	} else {
		r.metrics.registered.Set(0)
		r.log.Error("kubelet did not register the driver and will try again; is the socket at the same path for kubelet?",
			"endpoint", r.endpoint, "error", s.GetError())
	}
	return &registerapi.RegistrationStatusResponse{}, nil
}

// register serves the registration service where kubelet looks for it, until stop is called.
func (d *Driver) register(endpoint string) (stop func() error, err error) {
	path := filepath.Join(d.cfg.KubeletRootDir, "plugins_registry", DriverName+"-reg.sock")
	l, err := listen(path)
	if err != nil {
		return nil, fmt.Errorf("register with kubelet: %w", err)
	}
	srv := grpc.NewServer()
	registerapi.RegisterRegistrationServer(srv, &registration{endpoint: endpoint, metrics: d.metrics, log: d.log})
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	return func() error {
		srv.Stop()
		if err := stopped(<-served); err != nil {
			return fmt.Errorf("serve registration: %w", err)
		}
		return nil
	}, nil
}
