package deploy_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// TestDriverStarts runs the program with the arguments that the chart passes, as they are but for
// places: the driver becomes ready, and answers where kubelet's probes and "helm test" ask.
func TestDriverStarts(t *testing.T) {
	program := filepath.Join(t.TempDir(), "csi-puzzlefs")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", program, "./cmd/csi-puzzlefs")
	build.Dir = rootDir
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as make build does, which has built most of it
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, v := range map[string]func() map[string]any{
		"defaults":   func() map[string]any { return map[string]any{} },
		"everything": func() map[string]any { return everything(t) },
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "driver") // short: sockets are made in it
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			port := freePort(t)
			v := v()
			v["kubeletRootDir"], v["stateDir"] = dir+"/kubelet", dir+"/state"
			v["http"] = map[string]any{"port": port, "pprof": true}
			list := objects(t, mustRender(t, v))
			mountConfig(t, list, dir)

			driver := container(podSpec(find(t, list, "DaemonSet", "")), "driver")
			places := strings.NewReplacer("$(NODE_NAME)", "node-1", "=/etc/csi-puzzlefs/", "="+dir+"/etc/")
			stop := start(t, program, places, stringsAt(driver, "args"))
			defer stop()

			// The arguments of "helm test", with the driver's address for the name of the Service.
			probe := stringsAt(find(t, list, "Pod", "-test-ready").Object, "spec", "containers", 0, "args")
			service := find(t, list, "Service", "-test-ready")
			toDriver := strings.NewReplacer("//"+service.GetName()+"."+service.GetNamespace()+":", "//127.0.0.1:")
			for i, a := range probe {
				probe[i] = toDriver.Replace(a)
			}
			out, err := exec.CommandContext(t.Context(), program, probe...).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "127.0.0.1 is ready") {
				t.Errorf("csi-puzzlefs %q: %v\n%s", probe, err, out)
			}
			for _, kind := range []string{"startupProbe", "livenessProbe", "readinessProbe"} {
				url := fmt.Sprintf("http://127.0.0.1:%d%s", port, textAt(driver, kind, "httpGet", "path"))
				if out, err := exec.CommandContext(t.Context(), program, "probe", "--timeout=10s", url).CombinedOutput(); err != nil {
					t.Errorf("%s: %v\n%s", kind, err, out)
				}
			}
			if name == "everything" {
				readVolume(t, program, list, dir)
			}
			if _, err := os.Stat(dir + "/kubelet/plugins/csi.puzzlefs.io/csi.sock"); err != nil {
				t.Error(err)
			}
			_, err = os.Stat(dir + "/kubelet/plugins_registry/csi.puzzlefs.io-reg.sock")
			if registers := err == nil; registers != (name == "defaults") {
				t.Errorf("the driver registers itself: %v", registers)
			}
		})
	}
}

// start runs the driver until stop, which expects a good end.
func start(t *testing.T, program string, places *strings.Replacer, args []string) (stop func()) {
	t.Helper()
	for i, a := range args {
		args[i] = places.Replace(a)
	}
	var log bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("csi-puzzlefs %q: %v\n%s", args, err, &log)
		}
	}
}

// readVolume runs the other part of "helm test" on a directory that stands for the volume.
func readVolume(t *testing.T, program string, list []*unstructured.Unstructured, dir string) {
	t.Helper()
	for _, sub := range []string{"volume/sub", "scratch"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "volume/sub/file"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	args := stringsAt(find(t, list, "Pod", "-test-volume").Object, "spec", "containers", 0, "args")
	for i, a := range args {
		if strings.HasPrefix(a, "/") {
			args[i] = dir + a
		}
	}
	out, err := exec.CommandContext(t.Context(), program, args...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "digest: sha256:") {
		t.Errorf("csi-puzzlefs %q: %v\n%s", args, err, out)
	}
}

// mountConfig writes the files of the volumes certs, keys and docker-config to dir/etc, as kubelet
// would to /etc/csi-puzzlefs.
func mountConfig(t *testing.T, list []*unstructured.Unstructured, dir string) {
	t.Helper()
	write := func(name, content string) {
		t.Helper()
		path := filepath.Join(dir, "etc", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range certificates(t, list) {
		write("certs.d/"+name, content)
	}
	for _, o := range list {
		if strings.HasSuffix(o.GetName(), "-keys") {
			for name, content := range mapAt(o.Object, "data") {
				write("keys/"+name, textAt(content))
			}
		}
	}
	write("docker/config.json", `{"auths": {}}`)
}

// freePort returns a port that nobody listens on.
func freePort(t *testing.T) int {
	t.Helper()
	var config net.ListenConfig
	l, err := config.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr, _ := l.Addr().(*net.TCPAddr)
	return addr.Port
}
