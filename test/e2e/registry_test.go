package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	registryPort = 5000
	// registryFiles is the directory on a node that registries keep their content in: more than a pod's
	// own, so that one can be stopped and started, and is as it was.
	registryFiles = "/var/lib/puzzlefs-e2e"
)

// registry is a distribution registry in the cluster, with a Service of its name.
type registry struct {
	s    *suite
	name string
	// user and password that it wants, "" for none; it then speaks TLS too, with a certificate of ca.
	user, password string
	ca             []byte
}

// startRegistries starts the two registries that all parts use.
func (s *suite) startRegistries(ctx context.Context) error {
	s.open = &registry{s: s, name: "registry"}
	s.private = &registry{s: s, name: "private", user: "reader", password: "correct horse"}
	nodes, err := s.nodes(ctx)
	if err != nil {
		return err
	}
	for _, r := range []*registry{s.open, s.private} {
		if err := r.create(ctx, nodes[0]); err != nil {
			return fmt.Errorf("create registry %s: %w", r.name, err)
		}
	}
	for _, r := range []*registry{s.open, s.private} {
		if err := r.scale(ctx, 1); err != nil {
			return err
		}
	}
	return nil
}

// host is HOST:PORT within the cluster.
func (r *registry) host() string {
	return fmt.Sprintf("%s.%s.svc:%d", r.name, suiteNamespace, registryPort)
}

// ref is the name of an image in the cluster, from repository and tag, or only a repository.
func (r *registry) ref(name string) string { return r.host() + "/" + name }

// hosts is the entry of this registry in the chart's value registries.hosts.
func (r *registry) hosts() map[string]any {
	entry := map[string]any{"hostsToml": r.hostsToml()}
	if r.ca != nil {
		entry["files"] = map[string]any{"ca.crt": string(r.ca)}
	}
	return entry
}

// hostsToml is the file hosts.toml that says how to speak to this registry; ca.crt is beside it.
func (r *registry) hostsToml() string {
	if r.ca == nil {
		return fmt.Sprintf("server = \"http://%s\"\n", r.host())
	}
	return fmt.Sprintf("server = \"https://%s\"\nca = \"ca.crt\"\n", r.host())
}

// stop ends the registry: connections are refused until start. What it holds stays.
func (r *registry) stop(ctx context.Context, t testing.TB) {
	t.Helper()
	must(t, r.scale(ctx, 0))
}

// start starts the registry again and waits until it answers.
func (r *registry) start(ctx context.Context, t testing.TB) {
	t.Helper()
	must(t, r.scale(ctx, 1))
}

// create makes the objects of the registry, which does not run yet.
func (r *registry) create(ctx context.Context, node string) error {
	secret, err := r.configuration()
	if err != nil {
		return err
	}
	meta := metav1.ObjectMeta{Namespace: suiteNamespace, Name: r.name}
	labels := map[string]string{"app": r.name}
	client := r.s.client
	if _, err := client.CoreV1().Secrets(suiteNamespace).Create(ctx, &corev1.Secret{ObjectMeta: meta, StringData: secret}, metav1.CreateOptions{}); err != nil {
		return err
	}
	if _, err := client.CoreV1().Services(suiteNamespace).Create(ctx, &corev1.Service{ObjectMeta: meta, Spec: corev1.ServiceSpec{
		Selector: labels, Ports: []corev1.ServicePort{{Port: registryPort}},
	}}, metav1.CreateOptions{}); err != nil {
		return err
	}
	replicas, grace, no, root, create := int32(0), int64(1), false, int64(0), corev1.HostPathDirectoryOrCreate
	_, err = client.AppsV1().Deployments(suiteNamespace).Create(ctx, &appsv1.Deployment{ObjectMeta: meta, Spec: appsv1.DeploymentSpec{
		Replicas: &replicas,
		Strategy: appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType},
		Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{
			NodeSelector:                  map[string]string{corev1.LabelHostname: node},
			AutomountServiceAccountToken:  &no,
			EnableServiceLinks:            &no, // REGISTRY_PORT=tcp://… would be taken for configuration
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "registry", Image: r.s.settings.registry.String(), ImagePullPolicy: corev1.PullIfNotPresent,
				Command: []string{"/registry", "serve", "/etc/registry/config.json"},
				// The directory on the node is root's.
				SecurityContext: &corev1.SecurityContext{RunAsUser: &root},
				// Whatever the image sets: no traces are sent anywhere.
				Env:   []corev1.EnvVar{{Name: "OTEL_TRACES_EXPORTER", Value: "none"}},
				Ports: []corev1.ContainerPort{{ContainerPort: registryPort}},
				ReadinessProbe: &corev1.Probe{
					PeriodSeconds: 1, FailureThreshold: 1,
					ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(registryPort)}},
				},
				VolumeMounts: []corev1.VolumeMount{
					{Name: "configuration", MountPath: "/etc/registry", ReadOnly: true},
					{Name: "content", MountPath: "/var/lib/registry"},
				},
			}},
			Volumes: []corev1.Volume{
				{Name: "configuration", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: r.name}}},
				{Name: "content", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{
					Path: registryFiles + "/" + r.name, Type: &create,
				}}},
			},
		}},
	}}, metav1.CreateOptions{})
	return err
}

// scale starts or stops the registry and waits until it has.
func (r *registry) scale(ctx context.Context, replicas int32) error {
	patch := fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, replicas)
	_, err := r.s.client.AppsV1().Deployments(suiteNamespace).Patch(ctx, r.name, types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		return fmt.Errorf("scale registry %s: %w", r.name, err)
	}
	what := fmt.Sprintf("registry %s to have %d pods", r.name, replicas)
	return await(ctx, patience, what, func(ctx context.Context) (bool, string, error) {
		list, err := r.s.client.CoreV1().Pods(suiteNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + r.name})
		if err != nil {
			return false, "", err
		}
		running, states := int32(0), []string{}
		for i := range list.Items {
			states = append(states, podState(&list.Items[i]))
			if podReady(&list.Items[i]) {
				running++
			}
		}
		return running == replicas && len(list.Items) == int(replicas), strings.Join(states, "; "), nil
	})
}

// configuration returns the files that the registry reads. JSON is YAML.
func (r *registry) configuration() (map[string]string, error) {
	httpConfig := map[string]any{"addr": fmt.Sprintf(":%d", registryPort), "secret": "of this suite only"}
	config := map[string]any{
		"version": "0.1",
		"log":     map[string]any{"level": "warn"},
		"storage": map[string]any{
			"filesystem": map[string]any{"rootdirectory": "/var/lib/registry"},
			"delete":     map[string]any{"enabled": true},
		},
		"http": httpConfig,
	}
	files := map[string]string{}
	if r.user != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(r.password), bcrypt.MinCost)
		if err != nil {
			return nil, err
		}
		files["htpasswd"] = fmt.Sprintf("%s:%s\n", r.user, hash)
		if files["tls.crt"], files["tls.key"], err = certificate(fmt.Sprintf("%s.%s.svc", r.name, suiteNamespace)); err != nil {
			return nil, err
		}
		r.ca = []byte(files["tls.crt"])
		config["auth"] = map[string]any{"htpasswd": map[string]any{"realm": "e2e", "path": "/etc/registry/htpasswd"}}
		httpConfig["tls"] = map[string]any{"certificate": "/etc/registry/tls.crt", "key": "/etc/registry/tls.key"}
	}
	b, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	files["config.json"] = string(b)
	return files, nil
}

// certificate makes a key and a certificate signed by it, for host and, for port-forwarding, 127.0.0.1.
func certificate(host string) (cert, key string, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: host},
		DNSNames:     []string{host, host + ".cluster.local"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA:        true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return "", "", err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return "", "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})), nil
}

// dockerConfig is a Docker config.json with one name and password for hosts.
func dockerConfig(user, password string, hosts ...string) []byte {
	auths := map[string]any{}
	for _, h := range hosts {
		auths[h] = map[string]any{
			"username": user, "password": password,
			"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password)),
		}
	}
	b, err := json.Marshal(map[string]any{"auths": auths})
	if err != nil {
		panic(err) // maps of strings
	}
	return b
}

// removeRegistryFiles stops the registries and removes what they hold from the node.
func (s *suite) removeRegistryFiles(ctx context.Context) error {
	for _, r := range []*registry{s.open, s.private} {
		if err := r.scale(ctx, 0); err != nil {
			return err
		}
	}
	nodes, err := s.nodes(ctx)
	if err != nil {
		return err
	}
	for _, node := range nodes {
		if _, err := s.agent(node).try(ctx, "rm", "-rf", hostRoot+registryFiles); err != nil {
			return err
		}
	}
	return nil
}
