package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

func newDriverCommand() *cobra.Command {
	var flags registryFlags
	var quota, reserve, cache string
	var policy policyFlags
	var register bool
	cfg := driver.Config{Version: version(), Mounter: mounter{}}
	cmd := &cobra.Command{
		Use:   "driver --endpoint unix:///PATH --node-id NAME --state-dir DIR",
		Short: "Run the CSI node driver",
		Long: `Run the CSI identity and node services on a unix socket. With --kubelet-root-dir the driver also
registers itself with kubelet. SIGTERM ends it; volumes stay as they are and are served again by
the next driver with the same state directory.

--http-endpoint serves /metrics for Prometheus, /healthz, which is fine as long as the CSI socket
answers, and /readyz, which is fine once the volumes of an earlier driver are mounted again and the
socket is served. Whoever can reach it can read them.`,
		Example: `  csi-puzzlefs driver --endpoint unix:///run/csi-puzzlefs/csi.sock --node-id $(hostname) --state-dir /var/lib/csi-puzzlefs`,
		Args:    exactArgs(),
		// The line that says how it is used has flags with values only.
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for name, value := range map[string]string{"endpoint": cfg.Endpoint, "node-id": cfg.NodeID, "state-dir": cfg.StateDir} {
				if value == "" {
					return usagef(cmd, "--%s is needed", name)
				}
			}
			var err error
			if cfg.StoreQuota, err = driver.ParseQuantity(quota); err != nil {
				return usagef(cmd, "--store-quota: %w", err)
			}
			if cfg.StoreReserve, err = driver.ParseReserve(reserve); err != nil {
				return usagef(cmd, "--store-reserve: %w", err)
			}
			if cfg.ContentCache, err = driver.ParseQuantity(cache); err != nil {
				return usagef(cmd, "--content-cache: %w", err)
			}
			cfg.Registry = flags.config()
			cfg.Logger = slog.Default()
			klog.SetSlogLogger(cfg.Logger) // what the Kubernetes client complains about
			if err := policy.apply(&cfg); err != nil {
				return usagef(cmd, "%w", err)
			}
			cfg.ExternalRegistration = !register
			d, err := driver.New(cfg)
			if err != nil {
				return usagef(cmd, "%w", err)
			}
			return d.Run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&cfg.Endpoint, "endpoint", "", "the CSI socket, `unix:///PATH`")
	cmd.Flags().StringVar(&cfg.NodeID, "node-id", "", "`name` of the Kubernetes node")
	cmd.Flags().StringVar(&cfg.StateDir, "state-dir", "", "`directory` for blobs, mounts and records")
	cmd.Flags().StringVar(&cfg.KubeletRootDir, "kubelet-root-dir", "", "kubelet's --root-dir; if given, register with kubelet")
	cmd.Flags().BoolVar(&register, "register", true, "register with kubelet; false leaves that to the sidecar node-driver-registrar")
	policy.add(cmd)
	cmd.Flags().StringSliceVar(&cfg.MountOptions, "mount-options", []string{"nodev", "nosuid"}, "`list` of nodev, nosuid, noexec, dev, suid and exec, for all volumes")
	cmd.Flags().StringVar(&cfg.HTTPEndpoint, "http-endpoint", "", "serve /metrics, /healthz and /readyz on `[HOST]:PORT`")
	cmd.Flags().BoolVar(&cfg.Pprof, "pprof", false, "serve profiles of the process there, too, under /debug/pprof")
	cmd.Flags().BoolVar(&cfg.PodEvents, "pod-events", true, "send events to pods, in a cluster or with --kubeconfig")
	cmd.Flags().StringVar(&cfg.Kubeconfig, "kubeconfig", "", "`file` that names the API server for events; default is the cluster that this is a pod of")
	cmd.Flags().DurationVar(&cfg.SlowPull, "slow-pull", 30*time.Second, "after what time pods are told how far the pull of their image is; 0 for never")
	cmd.Flags().StringVar(&quota, "store-quota", "0", "how much disk images may take up, a `quantity` such as 50Gi; 0 for any")
	cmd.Flags().StringVar(&reserve, "store-reserve", "20%", "how much of the disk images leave free, a `quantity or percentage`")
	cmd.Flags().StringVar(&cache, "content-cache", "64Mi", "what all images keep of decoded content in memory, a `quantity`; 0 for 64Mi")
	flags.add(cmd)
	return cmd
}

// mounter lets the driver serve images by FUSE.
type mounter struct{}

var _ driver.Mounter = mounter{}

// Mount implements driver.Mounter.
func (mounter) Mount(_ context.Context, im *image.Image, spec driver.MountSpec) (driver.Mount, error) {
	//nolint:contextcheck // the mount outlives the call
	return fuse.Mount(fuse.Config{
		Image: im, Dir: spec.Dir, FSName: spec.Source, Logger: slog.Default(),
		ModTime: spec.ModTime, Dev: spec.Dev, Suid: spec.Suid, NoExec: spec.NoExec, SELinux: spec.SELinux,
	})
}
