package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// unpackImage unpacks the image of this machine and returns the directory, which is all that a
// program with its root there sees. Runtimes mount /proc into every container.
func unpackImage(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a changed root directory needs root")
	}
	im, _ := builtImage(t, runtime.GOARCH)
	headers, contents := layerFiles(t, im)
	dir := t.TempDir()
	for _, h := range headers {
		name := filepath.Join(dir, h.Name)
		var err error
		if h.FileInfo().IsDir() {
			err = os.Mkdir(name, 0o755)
		} else {
			err = os.WriteFile(name, contents[h.Name], 0o644)
		}
		if err == nil {
			err = os.Chmod(name, h.FileInfo().Mode())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	proc := filepath.Join(dir, "proc")
	if err := os.Mkdir(proc, 0o555); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("proc", proc, "proc", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(proc, 0); err != nil {
			t.Errorf("unmount %s: %v", proc, err)
		}
	})
	return dir
}

// inImage is a command line as a runtime would start it.
func inImage(t *testing.T, root string, args ...string) *exec.Cmd {
	t.Helper()
	im, _ := builtImage(t, runtime.GOARCH)
	config := must(im.ConfigFile())(t).Config
	cmd := exec.Command(config.Entrypoint[0], args...)
	cmd.Dir, cmd.Env = config.WorkingDir, config.Env
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Pdeathsig: unix.SIGKILL}
	return cmd
}

func TestProgramInImage(t *testing.T) {
	root := unpackImage(t)
	output := func(args ...string) string {
		t.Helper()
		out, err := inImage(t, root, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	if got, want := output("--version"), "csi-puzzlefs version "+testVersion+"\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
	for name, content := range map[string]string{"a": "hello\n", "sub/b": strings.Repeat("0123456789abcdef", 1<<16)} {
		name = filepath.Join(root, "tmp", "tree", name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := output("build", "/tmp/tree", "/tmp/images:v1"); !strings.Contains(got, "sha256:") {
		t.Errorf("build printed %q", got)
	}
	output("verify", "/tmp/images:v1")
	output("extract", "/tmp/images:v1", "/tmp/copy")
	if out, err := exec.Command("diff", "-r", filepath.Join(root, "tmp/tree"), filepath.Join(root, "tmp/copy")).CombinedOutput(); err != nil {
		t.Errorf("extracted: %v\n%s", err, out)
	}
}

// The driver starts with nothing but the image, and ends in good order when a runtime sends the
// signal that the image names.
func TestDriverInImage(t *testing.T) {
	root := unpackImage(t)
	cmd := inImage(t, root, "driver", "--endpoint", "unix:///tmp/csi.sock", "--node-id", "node", "--state-dir", "/var/lib/csi-puzzlefs")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	kill := func(why string) {
		t.Helper()
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		t.Fatalf("%s: %v\n%s", why, <-ended, log.String())
	}
	deadline := time.After(30 * time.Second)
	for {
		if conn, err := net.Dial("unix", filepath.Join(root, "tmp", "csi.sock")); err == nil {
			conn.Close()
			break
		}
		select {
		case err := <-ended:
			t.Fatalf("the driver ended: %v\n%s", err, log.String())
		case <-deadline:
			kill("the driver does not listen after 30 s")
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("the driver ended with %v\n%s", err, log.String())
		}
	case <-deadline:
		kill("the driver does not end")
	}
}

// The image has no certificates, but the program has. It is shown one that claims to be from a
// known authority, and refuses it because that did not sign it: a program that knew no authority
// would not have found a key to try.
func TestRootsInImage(t *testing.T) {
	const authority = "ISRG Root X1"
	root := unpackImage(t)
	srv := httptest.NewUnstartedServer(http.NotFoundHandler())
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{forgedCertificate(t, pkix.Name{
		Country: []string{"US"}, Organization: []string{"Internet Security Research Group"}, CommonName: authority,
	})}}
	srv.StartTLS()
	defer srv.Close()
	host := srv.Listener.Addr().String()
	hosts := filepath.Join(root, "etc/csi-puzzlefs/certs.d", host, "hosts.toml")
	if err := os.Mkdir(filepath.Dir(hosts), 0o755); err != nil {
		t.Fatal(err)
	}
	// Plain HTTP is for loopback addresses, unless this says otherwise.
	if err := os.WriteFile(hosts, []byte("server = \"https://"+host+"\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := inImage(t, root, "pull", "--certs-dir", "/etc/csi-puzzlefs/certs.d", host+"/x:1", "/tmp/images:x").CombinedOutput()
	if err == nil {
		t.Fatal("the certificate was accepted")
	}
	if !strings.Contains(string(out), `candidate authority certificate "`+authority+`"`) {
		t.Errorf("the program does not know %s: %s", authority, out)
	}
}

// forgedCertificate makes a certificate for this machine that bears the issuer's name, not its
// signature.
func forgedCertificate(t *testing.T, issuer pkix.Name) tls.Certificate {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "registry"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, &x509.Certificate{Subject: issuer}, &key.PublicKey, key))(t)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// A real containerd imports the archive under its name, as kind does, and finds it whole.
func TestContainerd(t *testing.T) {
	ctr := startContainerd(t)
	archive, _ := builtArchive(t)
	must(ctr("images", "import", "--all-platforms", "--snapshotter", "native", archive))(t)
	// Version 1 lists the platform of the bills of materials, too.
	listed := strings.ReplaceAll(must(ctr("images", "list"))(t), ",unknown/unknown", "")
	check := must(ctr("images", "check", "--snapshotter", "native", "name=="+testName))(t)
	digest := must(builtIndex(t).Digest())(t)
	wantFields(t, listed, testName, digest, "linux/amd64,linux/arm64")
	wantFields(t, check, testName, digest, "complete")
	wantFields(t, check, testName, digest, "true")
}

// It imports the image of a tree under all its names, and unpacks it for each.
func TestContainerdTree(t *testing.T) {
	ctr := startContainerd(t)
	archive := filepath.Join(t.TempDir(), "tools.tar")
	buildTree(t, sampleTree(t), archive, "-name", "busybox:9,registry.example.com/tools:1")
	digest := must(treeFromArchive(t, archive).Digest())(t)
	must(ctr("images", "import", "--snapshotter", "native", archive))(t)
	listed := must(ctr("images", "list"))(t)
	for _, n := range []string{"docker.io/library/busybox:9", "registry.example.com/tools:1"} {
		wantFields(t, listed, n, digest, "linux/"+runtime.GOARCH)
		check := must(ctr("images", "check", "--snapshotter", "native", "name=="+n))(t)
		wantFields(t, check, n, digest, "complete")
		wantFields(t, check, n, digest, "true")
	}
}

// startContainerd starts a containerd, which ends with the test, and returns what runs its client.
func startContainerd(t *testing.T) (ctr func(args ...string) (string, error)) {
	t.Helper()
	programs := os.Getenv("CONTAINERD")
	if programs == "" {
		t.Skip("CONTAINERD does not name a directory with containerd and ctr; hack/containerd.sh makes one")
	}
	if os.Geteuid() != 0 {
		t.Skip("containerd needs root")
	}
	dir := t.TempDir()
	socket := filepath.Join(dir, "sock")
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, []byte(`version = 2
root = "`+dir+`/root"
state = "`+dir+`/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
# For containerd 2, whose daemon unpacks; in 1 it is the client.
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux/`+runtime.GOARCH+`"
snapshotter = "native"
[grpc]
address = "`+socket+`"
[ttrpc]
address = "`+socket+`.ttrpc"
`), 0o644); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	daemon := exec.Command(filepath.Join(programs, "containerd"), "--config", config)
	daemon.Stdout, daemon.Stderr = &log, &log
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := daemon.Process.Signal(unix.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := daemon.Wait(); err != nil {
			t.Errorf("containerd: %v\n%s", err, log.String())
		}
	})
	ctr = func(args ...string) (string, error) {
		out, err := exec.Command(filepath.Join(programs, "ctr"), append([]string{"--address", socket, "--namespace", "k8s.io"}, args...)...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("ctr %q: %w\n%s", args, err, out)
		}
		return string(out), err
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := ctr("version")
		if err == nil {
			return ctr
		}
		if time.Now().After(end) {
			t.Fatalf("containerd does not answer: %v", err)
		}
	}
}

// wantFields looks for a line about an image of this name and digest with a field.
func wantFields(t *testing.T, out, name string, digest v1.Hash, field string) {
	t.Helper()
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		if len(fields) > 3 && fields[0] == name && fields[2] == digest.String() && slices.Contains(fields, field) {
			return
		}
	}
	t.Errorf("no line with %s, %s and %s in\n%s", name, digest, field, out)
}
