package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"
)

// execIn runs a command in a container and returns what it wrote. container may be "" where there is one.
// A command that fails is an error with the end of its stderr; errors.As finds its exec.CodeExitError.
func (s *suite) execIn(ctx context.Context, namespace, pod, container string, stdin io.Reader, command ...string) (string, error) {
	req := s.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{
			Container: container, Command: command, Stdin: stdin != nil, Stdout: true, Stderr: true,
		}, scheme.ParameterCodec)
	// As kubectl does: WebSocket, and SPDY for API servers and proxies that know only that.
	web, err := remotecommand.NewWebSocketExecutor(s.config, http.MethodGet, req.URL().String())
	if err != nil {
		return "", fmt.Errorf("exec in %s/%s: %w", namespace, pod, err)
	}
	old, err := remotecommand.NewSPDYExecutor(s.config, http.MethodPost, req.URL())
	if err != nil {
		return "", fmt.Errorf("exec in %s/%s: %w", namespace, pod, err)
	}
	executor, err := remotecommand.NewFallbackExecutor(web, old, mustFallBack)
	if err != nil {
		return "", fmt.Errorf("exec in %s/%s: %w", namespace, pod, err)
	}
	var stdout, stderr bytes.Buffer
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		return stdout.String(), fmt.Errorf("run %q in %s/%s: %w: %s", command, namespace, pod, err, tail(stderr.String(), 20))
	}
	return stdout.String(), nil
}

// mustFallBack says whether an error means that WebSockets do not get through.
func mustFallBack(err error) bool {
	return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
}

// forward makes a port of a pod reachable at the address that it returns, HOST:PORT on loopback, until
// stop is called.
func (s *suite) forward(ctx context.Context, namespace, pod string, port int) (addr string, stop func(), err error) {
	url := s.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("portforward").URL()
	transport, upgrader, err := spdy.RoundTripperFor(s.config)
	if err != nil {
		return "", nil, fmt.Errorf("forward to %s/%s: %w", namespace, pod, err)
	}
	old := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, url)
	web, err := portforward.NewSPDYOverWebsocketDialer(url, s.config)
	if err != nil {
		return "", nil, fmt.Errorf("forward to %s/%s: %w", namespace, pod, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	isReady := make(chan struct{})
	var said bytes.Buffer // read only when the forwarder has ended
	forwarder, err := portforward.NewOnAddressesWithContext(ctx, portforward.NewFallbackDialer(web, old, mustFallBack),
		[]string{"127.0.0.1"}, []string{"0:" + strconv.Itoa(port)}, isReady, io.Discard, &said)
	if err != nil {
		cancel()
		return "", nil, fmt.Errorf("forward to %s/%s: %w", namespace, pod, err)
	}
	ended := make(chan struct{})
	var result error // read only when the forwarder has ended
	go func() {
		defer close(ended)
		result = forwarder.ForwardPorts()
	}()
	stop = func() {
		cancel()
		<-ended
	}
	select {
	case <-ended:
		cancel()
		return "", nil, fmt.Errorf("forward to %s/%s: %w: %s", namespace, pod, result, said.String())
	case <-isReady:
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		stop()
		return "", nil, fmt.Errorf("forward to %s/%s: %w", namespace, pod, err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(int(ports[0].Local))), stop, nil
}
