package cluster

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/process"
	"github.com/vishvananda/netlink"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	// bridgeName is the lab's end of the cluster's network.
	bridgeName = "nodes"
	// apiServerPort is where the API server listens at [Address].
	apiServerPort = 6443
	// serviceNetwork is where services are; the API server has its first address.
	serviceNetwork = "10.79.0.0/16"
	apiServerVIP   = "10.79.0.1"
)

func apiServerURL() string { return fmt.Sprintf("https://%s:%d", Address, apiServerPort) }

// startNetwork makes the bridge on which nodes and lab are.
func (c *Cluster) startNetwork() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := up(lo, ""); err != nil {
		return err
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("make network device %s: %w", bridgeName, err)
	}
	if err := up(bridge, Address.String()+"/24"); err != nil {
		return err
	}
	// Nodes send what pods have for each other through their gateway when it is on its way anyway.
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
}

// startControlPlane starts all that is not on a node, and returns when the API server is ready.
func (c *Cluster) startControlPlane(ctx context.Context, client kubernetes.Interface) error {
	etcd := "http://127.0.0.1:2379"
	err := c.start("etcd", c.cfg.Kube,
		"--data-dir="+c.state("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd, "--listen-peer-urls=http://127.0.0.1:2380")
	if err != nil {
		return err
	}
	err = c.start("kube-apiserver", c.cfg.Kube,
		"--etcd-servers="+etcd, "--allow-privileged=true",
		"--bind-address=0.0.0.0", "--advertise-address="+Address.String(), fmt.Sprintf("--secure-port=%d", apiServerPort),
		"--tls-cert-file="+c.files.file("apiserver.crt"), "--tls-private-key-file="+c.files.file("apiserver.key"),
		"--token-auth-file="+c.files.file("tokens.csv"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--kubelet-preferred-address-types=InternalIP",
		"--service-cluster-ip-range="+serviceNetwork,
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-signing-key-file="+c.files.file("sa.key"), "--service-account-key-file="+c.files.file("sa.key"))
	if err != nil {
		return err
	}
	// Which is not waited for when it is dead.
	err = c.wait(ctx, func() error { return client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error() })
	if err != nil {
		return fmt.Errorf("wait for the API server: %w", err)
	}
	err = c.start("kube-controller-manager", c.cfg.Kube,
		"--kubeconfig="+c.files.kubeconfig("kube-controller-manager"), "--use-service-account-credentials=true", "--leader-elect=false",
		"--service-account-private-key-file="+c.files.file("sa.key"), "--root-ca-file="+c.files.file("ca.crt"),
		"--flex-volume-plugin-dir="+c.state("volumeplugins"),
		// Tests reboot nodes, and do not want to wait for what is for larger clusters.
		"--node-monitor-period=1s", "--node-monitor-grace-period=20s")
	if err != nil {
		return err
	}
	err = c.start("kube-scheduler", c.cfg.Kube, "--kubeconfig="+c.files.kubeconfig("kube-scheduler"), "--leader-elect=false")
	if err != nil {
		return err
	}
	return c.startDNS(ctx)
}

// startDNS starts the cluster's DNS, which knows that there are no other names.
func (c *Cluster) startDNS(ctx context.Context) error {
	corefile := fmt.Sprintf(`cluster.local:53 in-addr.arpa:53 {
    bind %[1]s
    errors
    kubernetes cluster.local in-addr.arpa {
        kubeconfig %[2]s
    }
}
.:53 {
    bind %[1]s
    errors
    template ANY ANY {
        rcode NXDOMAIN
    }
}
`, Address, c.Kubeconfig())
	file := c.files.file("Corefile")
	if err := os.WriteFile(file, []byte(corefile), 0o644); err != nil {
		return err
	}
	if err := c.start("coredns", c.cfg.Node, "-conf", file); err != nil {
		return err
	}
	// This process's names are the cluster's, too.
	err := c.wait(ctx, func() error {
		_, err := net.DefaultResolver.LookupHost(ctx, "kubernetes.default.svc.cluster.local")
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for DNS: %w", err)
	}
	return nil
}

// start starts a part of the control plane.
func (c *Cluster) start(name, programs string, args ...string) error {
	p, err := process.Run(filepath.Join(programs, name), c.log(name), args...)
	if err != nil {
		return err
	}
	c.parts = append(c.parts, p)
	return nil
}

// wait is waitFor for what a part of the control plane does: all have to live for that.
func (c *Cluster) wait(ctx context.Context, try func() error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	dead := make(chan struct{}, len(c.parts))
	for _, p := range c.parts {
		go func() {
			select {
			case <-p.Done():
				dead <- struct{}{}
			case <-ctx.Done():
			}
		}()
	}
	return waitFor(ctx.Done(), dead, try)
}

// waitAccount waits for the account that pods have unless they say otherwise.
func (c *Cluster) waitAccount(ctx context.Context, client kubernetes.Interface) error {
	err := c.wait(ctx, func() error {
		_, err := client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for the controller manager: %w", err)
	}
	return nil
}
