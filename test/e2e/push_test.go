package e2e_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// image is an image in a registry of the cluster.
type image struct {
	Ref    string // as pods name it, with its tag
	Digest string // sha256:…
	Verity string // verity:…
	Stored int64  // bytes of its blobs
}

// attributes are those of a volume with the image, and more in pairs of key and value; a pair with an
// attribute that is there already is taken instead.
func (i image) attributes(more ...string) map[string]string {
	return with(map[string]string{"image": i.Ref, "digest": i.Digest}, more...)
}

// pushTree builds an image of a directory and pushes it as name, as in "team/models:v1". args are more
// arguments of csi-puzzlefs build.
func (r *registry) pushTree(ctx context.Context, t testing.TB, dir, name string, args ...string) image {
	t.Helper()
	return r.build(ctx, t, dir, name, func(string) []string { return args })
}

// pushDelta is pushTree for a delta on an image that the registry has, in any repository.
func (r *registry) pushDelta(ctx context.Context, t testing.TB, dir, name string, base image) image {
	t.Helper()
	return r.build(ctx, t, dir, name, func(addr string) []string {
		return []string{"--base-ref", addr + strings.TrimPrefix(base.Ref, r.host()) + "@" + base.Digest}
	})
}

// build builds an image and pushes it; args are told where the registry is for the test.
func (r *registry) build(ctx context.Context, t testing.TB, dir, name string, args func(addr string) []string) image {
	t.Helper()
	addr, stop := r.forward(ctx, t)
	defer stop()
	line := []string{"build", dir, "--push", addr + "/" + name, "--json", "--work-dir", t.TempDir()}
	out := r.s.puzzlefs(ctx, t, slices.Concat(line, args(addr), r.pushFlags(t, addr))...)
	var result struct {
		Digest, Verity string
		StoredBytes    int64
	}
	if err := json.Unmarshal([]byte(out), &result); err != nil || result.Digest == "" || result.Verity == "" {
		t.Fatalf("read what csi-puzzlefs build --json printed: %v: %s", err, out)
	}
	return image{Ref: r.ref(name), Digest: result.Digest, Verity: result.Verity, Stored: result.StoredBytes}
}

// textTree makes a directory with the file text, and another that makes its image one that no node has seen.
func textTree(t testing.TB, text string) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755)) // pods of any user read it
	for name, content := range map[string]string{"text": text, "unique": rand.Text()} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644))
	}
	return dir
}

// forward makes the registry reachable for the test, at HOST:PORT on loopback, until stop is called or
// the registry's pod ends.
func (r *registry) forward(ctx context.Context, t testing.TB) (addr string, stop func()) {
	t.Helper()
	for _, p := range r.s.pods(ctx, t, suiteNamespace, "app="+r.name) {
		if podReady(&p) {
			addr, stop, err := r.s.forward(ctx, p.Namespace, p.Name, registryPort)
			must(t, err)
			return addr, stop
		}
	}
	t.Fatalf("forward to registry %s: none of its pods is ready; is it stopped?", r.name)
	return "", nil
}

// pushFlags are the flags of csi-puzzlefs that name certificates and credentials for the registry at addr.
func (r *registry) pushFlags(t testing.TB, addr string) []string {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		must(t, os.WriteFile(file, []byte(text), 0o600))
		return file
	}
	if r.user == "" {
		return []string{"--docker-config", write("config.json", "{}")} // not whoever runs the test
	}
	certs := filepath.Join("certs.d", addr)
	write(filepath.Join(certs, "ca.crt"), string(r.ca))
	write(filepath.Join(certs, "hosts.toml"), fmt.Sprintf("server = \"https://%s\"\nca = \"ca.crt\"\n", addr))
	return []string{
		"--certs-dir", filepath.Join(dir, "certs.d"),
		"--docker-config", write("config.json", string(dockerConfig(r.user, r.password, addr))),
	}
}

// puzzlefs runs csi-puzzlefs on the machine of the test and returns its stdout.
func (s *suite) puzzlefs(ctx context.Context, t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(ctx, s.settings.program, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("csi-puzzlefs %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String()
}
