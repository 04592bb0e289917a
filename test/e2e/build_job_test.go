package e2e_test

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/sample"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/tree"
)

// testBuildJob builds and pushes images by the Jobs of examples/, and reads them in pods.
func (s *suite) testBuildJob(t *testing.T) {
	b := &building{s: s}
	s.Test(t, features.New("builder Job").
		Setup(b.start).
		Assess("builds from a directory, without privileges", b.directory).
		Assess("sends nothing twice", b.repeated).
		Assess("builds from files of many owners, as root, to a private registry", b.owners).
		Assess("builds from a container image", b.container).
		Assess("says why it cannot push", b.refused).
		Feature())
}

// building is what the steps of the part share.
type building struct {
	s *suite
	// restricted is a namespace of the restricted Pod Security Standard, privileged one where pods may be
	// root. Both have the claim models-source, of a directory on node, and the secrets and the
	// description of the registries that Jobs want.
	restricted, privileged string
	node                   string
	want                   tree.Tree // what the container image holds in the directory sample
	withTools              bool      // and whether the tools are in it

	plain, asRoot, fromImage, wrong *job
}

const (
	credentials      = "registry-credentials" // as the examples name the secret
	wrongCredentials = "wrong-credentials"
	wrongPassword    = "battery staple"
	sourceClaim      = "models-source" // as the examples name the claim
)

// start starts most of the Jobs, which work side by side.
func (b *building) start(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	s := b.s
	s.driver(ctx, t)
	b.node = s.mustNodes(ctx, t)[0]
	b.restricted = s.namespace(ctx, t, "build", restrictedPods)
	b.privileged = s.namespace(ctx, t, "build-root", privilegedPods)
	for _, namespace := range []string{b.restricted, b.privileged} {
		s.dockerSecret(ctx, t, namespace, credentials, s.private.user, s.private.password, s.private.host())
		s.dockerSecret(ctx, t, namespace, wrongCredentials, s.private.user, wrongPassword, s.private.host())
		s.registryHosts(ctx, t, namespace)
	}
	// What is in modes belongs to many, and is not for everybody to read.
	s.claimDirectory(ctx, t, b.restricted, sourceClaim, b.node, "checker make --size 1000000 --seed 21 . && rm -r modes")
	s.claimDirectory(ctx, t, b.privileged, sourceClaim, b.node, "checker make --size 1000000 --seed 22 .")
	b.pushContainer(ctx, t, "build-job/tools:v1")

	b.plain = s.startJob(ctx, t, b.restricted, b.fromDirectory(t, s.open.ref("build-job/models:v1")))
	b.fromImage = s.startJob(ctx, t, b.restricted, b.convert(t, s.private.ref("build-job/tools-puzzlefs:v1")))
	b.asRoot = s.startJob(ctx, t, b.privileged, runAsRoot(b.fromDirectory(t, s.private.ref("build-job/models:v1"))))

	wrong := b.fromDirectory(t, s.private.ref("build-job/wrong:v1"))
	wrong.Name = "build-job-wrong"
	for i := range wrong.Spec.Template.Spec.Volumes {
		if v := &wrong.Spec.Template.Spec.Volumes[i]; v.Secret != nil {
			v.Secret.SecretName = wrongCredentials
		}
	}
	b.wrong = s.startJob(ctx, t, b.restricted, wrong)
	return ctx
}

// fromDirectory is the example of a Job that builds from a claim.
func (b *building) fromDirectory(t *testing.T, push string) *batchv1.Job {
	return b.s.exampleJob(t, "build-job-pvc.yaml", map[string]string{
		"registry.example.com/csi-puzzlefs:0.1.0": b.s.settings.driver.String(),
		"registry.example.com/team/models:v1":     push,
		"claimName: models-source":                "claimName: " + sourceClaim,
	})
}

// convert is the example of a Job that converts a container image.
func (b *building) convert(t *testing.T, push string) *batchv1.Job {
	return b.s.exampleJob(t, "build-job-image.yaml", map[string]string{
		"registry.example.com/csi-puzzlefs:0.1.0":     b.s.settings.driver.String(),
		"registry.example.com/team/tools:v1":          b.s.open.ref("build-job/tools:v1"),
		"registry.example.com/team/tools-puzzlefs:v1": push,
	})
}

// runAsRoot changes a Job as the example says for files of many owners.
func runAsRoot(j *batchv1.Job) *batchv1.Job {
	root, no := int64(0), false
	pod := &j.Spec.Template.Spec
	pod.SecurityContext.RunAsUser, pod.SecurityContext.RunAsNonRoot = &root, &no
	pod.Containers[0].SecurityContext.Capabilities.Add = []corev1.Capability{"DAC_READ_SEARCH"}
	return j
}

func (b *building) directory(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	r := b.plain.result(ctx, t)
	if r.NewBytes != r.StoredBytes || r.Bytes == 0 || r.Inodes < sample.SmallFiles {
		t.Errorf("the first build says %+v, want all of it to be new", r)
	}
	img := r.image(t, b.s.open.ref("build-job/models:v1"))
	p := b.s.reader(b.restricted, "compare", claimed("source", sourceClaim), inline("data", img.attributes()))
	b.same(ctx, t, b.s.start(ctx, t, p), "/source", "/data")
	return ctx
}

func (b *building) repeated(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	again := b.fromDirectory(t, b.s.open.ref("build-job/models:v2"))
	again.Name = "build-job-again"
	first, second := b.plain.result(ctx, t), b.s.startJob(ctx, t, b.restricted, again).result(ctx, t)
	if second.NewBytes != 0 {
		t.Errorf("the second build of a tree sent %d bytes that the registry had", second.NewBytes)
	}
	if second.Digest != first.Digest || second.Verity != first.Verity || second.StoredBytes != first.StoredBytes {
		t.Errorf("the same tree became %+v, then %+v", first, second)
	}
	return ctx
}

func (b *building) owners(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	img := b.asRoot.result(ctx, t).image(t, b.s.private.ref("build-job/models:v1"))
	p := b.s.rootReader(b.privileged, "compare", claimed("source", sourceClaim), inlineWithSecret("data", img.attributes(), credentials))
	// As much as the Job may: trusted.* attributes, which take CAP_SYS_ADMIN, it did not see.
	p.Spec.Containers[0].SecurityContext.Capabilities.Add = []corev1.Capability{"DAC_READ_SEARCH"}
	b.same(ctx, t, b.s.start(ctx, t, p), "/source", "/data")
	return ctx
}

// same checks that a pod sees the same tree at two places.
func (b *building) same(ctx context.Context, t *testing.T, p *pod, source, volume string) {
	t.Helper()
	p.waitReady(ctx, t)
	want, got := seenBy(ctx, t, p, source), seenBy(ctx, t, p, volume)
	if diff := tree.Diff(want, got); diff != "" {
		t.Errorf("%s and what was built of it differ (- source, + volume):\n%s", source, diff)
	}
}

// seenBy returns the tree that a pod sees at a directory.
func seenBy(ctx context.Context, t *testing.T, p *pod, dir string) tree.Tree {
	t.Helper()
	seen, err := tree.Parse(strings.NewReader(p.exec(ctx, t, "checker", "tree", dir)))
	must(t, err)
	return seen
}

func (b *building) container(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	img := b.fromImage.result(ctx, t).image(t, b.s.private.ref("build-job/tools-puzzlefs:v1"))
	p := b.s.start(ctx, t, b.s.rootReader(b.privileged, "converted", inlineWithSecret("data", img.attributes(), credentials)))
	p.waitReady(ctx, t)
	if diff := tree.Diff(b.want, seenBy(ctx, t, p, "/data/sample")); diff != "" {
		t.Errorf("the container image and what was built of it differ (- layers, + volume):\n%s", diff)
	}
	if b.withTools {
		b.same(ctx, t, p, "/bin", "/data/bin") // it runs the image that was converted
	}
	return ctx
}

func (b *building) refused(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	message := b.wrong.failure(ctx, t)
	t.Log(message)
	want := `^csi-puzzlefs: .*` + regexp.QuoteMeta(b.s.private.ref("build-job/wrong:v1")) + `.* 401 Unauthorized.*no or wrong credentials.*give credentials for ` + regexp.QuoteMeta(b.s.private.host())
	if !regexp.MustCompile(want).MatchString(message) {
		t.Errorf("the Job with a wrong secret says %q, want it to match %q", message, want)
	}
	if strings.Contains(message, wrongPassword) {
		t.Errorf("the Job tells its password: %s", message)
	}
	return ctx
}

// pushContainer pushes a container image to the open registry: the tools, where the suite has their
// archive, then a layer with a sample tree, and one that hides and replaces some of it.
func (b *building) pushContainer(ctx context.Context, t *testing.T, as string) {
	t.Helper()
	img := empty.Image
	if b.s.settings.images != "" {
		tag, err := name.NewTag(b.s.settings.tools.String())
		must(t, err)
		img, err = tarball.ImageFromPath(filepath.Join(b.s.settings.images, "tools.tar"), &tag)
		must(t, err)
		b.withTools = true
	}
	dir := b.s.sampleTree(t, 23)
	must(t, os.Remove(filepath.Join(dir, "names", ".wh.whiteout"))) // in a layer it would hide another file
	var files []string
	files = append(files, filepath.Join(t.TempDir(), "layer.tar"))
	pack := exec.CommandContext(ctx, "tar", "-C", filepath.Dir(dir), "--format=posix", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-cf", files[0], filepath.Base(dir))
	if out, err := pack.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", pack, err, out)
	}
	files = append(files, b.hidingLayer(t, dir))
	for _, file := range files {
		layer, err := tarball.LayerFromFile(file)
		must(t, err)
		img, err = mutate.AppendLayers(img, layer)
		must(t, err)
	}
	config, err := img.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64" // what the example asks for; nothing of it is run
	img, err = mutate.ConfigFile(img, config)
	must(t, err)
	b.want, err = tree.Describe(dir)
	must(t, err)

	addr, stop := b.s.open.forward(ctx, t)
	defer stop()
	to, err := name.NewTag(addr+"/"+as, name.Insecure)
	must(t, err)
	must(t, remote.Write(to, img, remote.WithContext(ctx)))
}

// hidingLayer writes a layer that hides a file, hides all of a directory but what it has there itself,
// and replaces a file; it does the same to the directory.
func (b *building) hidingLayer(t *testing.T, dir string) string {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, f := range []struct{ name, text string }{
		{"sample/many/.wh.0001", ""},
		{"sample/links/.wh..wh..opq", ""},
		{"sample/links/new", "over an opaque directory\n"},
		{"sample/hello.txt", "replaced\n"},
	} {
		must(t, w.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.text)), Typeflag: tar.TypeReg}))
		_, err := w.Write([]byte(f.text))
		must(t, err)
	}
	must(t, w.Close())

	must(t, os.Remove(filepath.Join(dir, "many", "0001")))
	must(t, os.Remove(filepath.Join(dir, "hello.txt")))
	old, err := filepath.Glob(filepath.Join(dir, "links", "*"))
	must(t, err)
	for _, name := range old {
		must(t, os.RemoveAll(name))
	}
	for name, text := range map[string]string{"links/new": "over an opaque directory\n", "hello.txt": "replaced\n"} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	file := filepath.Join(t.TempDir(), "layer.tar")
	must(t, os.WriteFile(file, layer.Bytes(), 0o600))
	return file
}
