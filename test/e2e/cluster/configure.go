package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"
)

// daemons are the programs of a node, with their logs opened, which are outside of its root.
func (s *nodeSpec) daemons() ([]*daemon, error) {
	all := []*daemon{
		{name: "containerd", argv: []string{programsDir + "/containerd", "--config", "/etc/containerd/config.toml"}},
		{name: "kubelet", argv: []string{
			kubeDir + "/kubelet", "--config=/etc/kubernetes/kubelet.yaml", "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig",
			"--hostname-override=" + s.Name, "--node-ip=" + s.address(), "--v=2",
		}},
		{name: "kube-proxy", argv: []string{kubeDir + "/kube-proxy", "--config=/etc/kubernetes/kube-proxy.yaml"}},
	}
	for _, d := range all {
		var err error
		d.log, err = os.OpenFile(filepath.Join(s.LogDir, s.Name+"-"+d.name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// configure writes the node's files in /etc.
func (s *nodeSpec) configure(secrets map[string][]byte) error {
	files := map[string]string{
		"hostname":                         s.Name + "\n",
		"hosts":                            "127.0.0.1 localhost\n" + s.address() + " " + s.Name + "\n",
		"resolv.conf":                      "nameserver " + Address.String() + "\n",
		"machine-id":                       fmt.Sprintf("%032x\n", s.Index),
		"containerd/config.toml":           containerdConfig,
		"cni/net.d/10-e2e.conflist":        networkConfig,
		"kubernetes/kubelet.yaml":          kubeletConfig,
		"kubernetes/kube-proxy.yaml":       proxyConfig,
		"kubernetes/ca.crt":                string(secrets["ca.crt"]),
		"kubernetes/kubelet.kubeconfig":    string(secrets["kubelet.kubeconfig"]),
		"kubernetes/kube-proxy.kubeconfig": string(secrets["kube-proxy.kubeconfig"]),
	}
	data := map[string]string{
		"Name": s.Name, "Address": s.address(), "DNS": Address.String(), "PodNetwork": podNetwork(s.Index),
		"Programs": programsDir, "Pause": PauseImage,
	}
	for name, text := range files {
		t, err := template.New(name).Parse(text)
		if err != nil {
			return err
		}
		var content strings.Builder
		if err := t.Execute(&content, data); err != nil {
			return err
		}
		file := filepath.Join("/etc", name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(content.String()), 0o600); err != nil {
			return err
		}
		if !strings.HasSuffix(name, ".kubeconfig") {
			if err := os.Chmod(file, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// containerdConfig is containerd's: version 3 of the format, containerd 2. Where the test has not the
// capability to lower a process's oom_score_adj, containers get that of containerd.
const containerdConfig = `version = 3
root = '/var/lib/containerd'
state = '/run/containerd'

[grpc]
  address = '/run/containerd/containerd.sock'

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{{.Pause}}'

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['{{.Programs}}/cni']
  conf_dir = '/etc/cni/net.d'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    BinaryName = '{{.Programs}}/runc'
    SystemdCgroup = false

[plugins.'io.containerd.nri.v1.nri']
  disable = true
`

// networkConfig lets pods be on a bridge of their node, which routes.
const networkConfig = `{
  "cniVersion": "1.0.0", "name": "e2e",
  "plugins": [{
    "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
    "ipam": {"type": "host-local", "ranges": [[{"subnet": "{{.PodNetwork}}"}]], "routes": [{"dst": "0.0.0.0/0"}]}
  }]
}
`

// kubeletConfig has kubelet's defaults but where these do not go with what the machine is: either version of
// cgroups without systemd, capabilities that may be missing, a disk that may be nearly full,
// images that nobody could pull again.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
oomScoreAdj: 0
maxOpenFiles: 20000
failSwapOn: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
address: {{.Address}}
authentication:
  anonymous: {enabled: true}
  webhook: {enabled: false}
  x509: {clientCAFile: /etc/kubernetes/ca.crt}
authorization: {mode: AlwaysAllow}
clusterDomain: cluster.local
clusterDNS: [{{.DNS}}]
resolvConf: /etc/resolv.conf
makeIPTablesUtilChains: false
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 1Mi, nodefs.available: 1Mi, imagefs.available: 1Mi}
imagePullCredentialsVerificationPolicy: NeverVerify
serializeImagePulls: false
volumePluginDir: /var/lib/kubelet/volumeplugins
volumeStatsAggPeriod: 10s
`

// proxyConfig lets kube-proxy write its rules, and leave alone what belongs to the machine's kernel.
const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {kubeconfig: /etc/kubernetes/kube-proxy.kubeconfig}
hostnameOverride: {{.Name}}
clusterCIDR: 10.78.0.0/16
oomScoreAdj: 0
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
healthzBindAddress: ""
metricsBindAddress: ""
`
