package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
	"sigs.k8s.io/e2e-framework/pkg/features"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/sample"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/tree"
)

// testVolumes tests what a pod sees in a volume, and who shares what.
func (s *suite) testVolumes(t *testing.T) {
	v := &volumes{s: s}
	s.Test(t,
		features.New("content").
			Setup(v.prepare).
			Assess("is the tree that the image was made of", v.sameTree).
			Assess("has the owners and modes that other users are held to", v.otherUsers).
			Assess("is shown from subPath, and with mtime", v.attributes).
			Assess("is shown by a container's subPath, after its restart too", v.containerSubPath).
			Assess("is there for init containers and sidecars", v.containers).
			Feature(),
		features.New("read-only").
			Setup(v.prepare).
			Assess("for users, for root, and for privileged containers", v.readOnly).
			Assess("without set-user-ID bits and devices", v.nosuid).
			Feature(),
		features.New("sharing").
			Setup(v.prepare).
			Assess("is one mount for an image on a node", v.oneMount).
			Assess("holds for thirty pods at once", v.thirtyPods).
			Feature(),
		features.New("pullPolicy").
			Setup(v.prepare).
			Assess("says when the registry is asked", v.pullPolicy).
			Feature())
}

// volumes is what the features of this part share.
type volumes struct {
	s         *suite
	namespace string
	node      string // where the pods of a test are that do not belong elsewhere
	image     image  // of the sample tree
	changed   image  // of a changed one, as a delta on it
	zstd      image  // of the sample tree again, compressed

	tree, changedTree tree.Tree
}

// prepare installs the driver and makes the images, the first time, and a namespace each time.
func (v *volumes) prepare(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	v.s.driver(ctx, t)
	v.namespace = v.s.namespace(ctx, t, "volumes", privilegedPods)
	if v.node != "" {
		return ctx
	}
	nodes, err := v.s.nodes(ctx)
	must(t, err)
	dir := v.s.sampleTree(t, 1)
	v.tree, err = tree.Describe(dir)
	must(t, err)
	v.image = v.s.open.pushTree(ctx, t, dir, "volumes/sample:v1")
	v.zstd = v.s.open.pushTree(ctx, t, dir, "volumes/sample:zstd", "--compression")

	must(t, os.RemoveAll(filepath.Join(dir, "many")))
	must(t, os.Rename(filepath.Join(dir, "hello.txt"), filepath.Join(dir, "many")))
	must(t, os.WriteFile(filepath.Join(dir, "large"), []byte("small\n"), 0o600))
	v.changedTree, err = tree.Describe(dir)
	must(t, err)
	v.changed = v.s.open.pushDelta(ctx, t, dir, "volumes/sample:v2", v.image)
	v.node = nodes[len(nodes)-1] // not where the registry is, if there is another
	return ctx
}

// sampleTree makes a directory with everything that an image can hold. Trees of different seeds differ in
// the contents of their files.
func (s *suite) sampleTree(t testing.TB, seed uint64) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "sample")
	omitted, err := sample.Make(dir, sample.Config{Seed: seed})
	must(t, err)
	for _, what := range omitted {
		t.Logf("the sample tree is without what this machine does not allow: %s", what)
	}
	return dir
}

// start starts a pod in the namespace of the test, on its node.
func (v *volumes) start(ctx context.Context, t *testing.T, p *corev1.Pod) *pod {
	t.Helper()
	p.Namespace = v.namespace
	return v.s.start(ctx, t, on(v.node, p))
}

// sees compares what a container sees in a directory with a tree.
func (p *pod) sees(ctx context.Context, t testing.TB, container, dir string, want tree.Tree) {
	t.Helper()
	out, err := p.tryIn(ctx, container, "checker", "tree", dir)
	must(t, err)
	got, err := tree.Parse(strings.NewReader(out))
	must(t, err)
	if diff := tree.Diff(want, got); diff != "" {
		t.Errorf("pod %s does not see in %s what the image was made of (- source, + pod):\n%s", p, dir, tail(diff, 40))
	}
}

// below returns what a tree has below one of its directories. Links that lead out of it are links no more.
func below(all tree.Tree, dir string) tree.Tree {
	cut := func(p string) (string, bool) {
		rest, found := strings.CutPrefix(p, dir)
		return path.Join("/", rest), found && (rest == "" || rest[0] == '/')
	}
	var out tree.Tree
	for _, e := range all.Entries {
		if p, in := cut(e.Path); in {
			e.Path = p
			out.Entries = append(out.Entries, e)
		}
	}
	for _, group := range all.Links {
		var names []string
		for _, name := range group {
			if p, in := cut(name); in {
				names = append(names, p)
			}
		}
		if len(names) > 1 {
			out.Links = append(out.Links, names)
		}
	}
	return out
}

// sameTree compares whole volumes, of images that are made in different ways and named in different ways.
func (v *volumes) sameTree(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	plain := v.start(ctx, t, v.s.rootReader("", "plain", inline("data", v.image.attributes())))
	two := v.start(ctx, t, v.s.rootReader("", "two", inline("delta", v.changed.attributes()), inline("zstd", v.zstd.attributes())))
	pinned := v.start(ctx, t, v.s.rootReader("", "pinned",
		inline("image", map[string]string{"image": v.image.Ref + "@" + v.image.Digest}),
		inline("verity", map[string]string{"image": v.image.Ref, "digest": v.image.Verity})))
	for _, p := range []*pod{plain, two, pinned} {
		p.waitReady(ctx, t)
	}
	plain.sees(ctx, t, "", "/data", v.tree)
	two.sees(ctx, t, "", "/delta", v.changedTree)
	two.sees(ctx, t, "", "/zstd", v.tree)
	pinned.sees(ctx, t, "", "/image", v.tree)
	if same := pinned.exec(ctx, t, "stat", "-c", "%d", "/image", "/verity"); strings.Count(same, strings.Fields(same)[0]) != 2 {
		t.Errorf("two volumes of one image in a pod have the devices %q, want one", same)
	}
	return ctx
}

// otherUsers holds a user who is not root to the modes of the image's files.
func (v *volumes) otherUsers(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	p := v.start(ctx, t, v.s.reader("", "user", inline("data", v.image.attributes())))
	p.waitReady(ctx, t)
	const user = 65532
	var want, names bytes.Buffer
	refused := 0
	for _, e := range below(v.tree, "/modes").Entries {
		if e.Type == testtree.Symlink || path.Dir(e.Path) != "/" {
			continue
		}
		// The owner's bits count for the owner, whatever those of the group are, and so on.
		bits := e.Perm & 7
		switch {
		case e.UID == user:
			bits = e.Perm >> 6 & 7
		case e.GID == user:
			bits = e.Perm >> 3 & 7
		}
		answer := "may be read"
		if bits&4 == 0 {
			answer = "Permission denied"
			refused++
		}
		fmt.Fprintf(&names, "%s\n", path.Base(e.Path))
		fmt.Fprintf(&want, "%s %o %d:%d %s\n", path.Base(e.Path), e.Perm, e.UID, e.GID, answer)
	}
	if refused < 3 {
		t.Fatalf("the sample has %d paths that user %d may not read, want some", refused, user)
	}
	got := p.execWith(ctx, t, &names, "sh", "-c", `cd /data/modes && while read -r name; do
	if [ -d "$name" ]; then error=$(ls "$name" 2>&1 >/dev/null); else error=$(cat "$name" 2>&1 >/dev/null); fi
	echo "$(stat -c '%n %a %u:%g' "$name") ${error:-may be read}" | sed 's/ [a-z]*: .*: / /'
done`)
	if got != want.String() {
		t.Errorf("user %d sees\n%swant\n%s", user, got, want.String())
	}
	return ctx
}

// attributes tests the attributes of volumes that change what is seen.
func (v *volumes) attributes(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	p := v.start(ctx, t, v.s.rootReader("", "attributes",
		inline("sub", v.image.attributes("subPath", "links/directory")),
		inline("timed", v.image.attributes("mtime", "2026-01-31T12:00:00Z", "subPath", "names")),
		inline("stamped", v.image.attributes("mtime", "1769860800")),
		inline("plain", v.image.attributes())))
	p.waitReady(ctx, t)
	p.sees(ctx, t, "", "/sub", below(v.tree, "/links/directory"))
	p.sees(ctx, t, "", "/timed", below(v.tree, "/names"))
	for dir, want := range map[string]string{"timed": "1769860800", "stamped": "1769860800", "plain": "0", "sub": "0"} {
		times := p.exec(ctx, t, "sh", "-c", fmt.Sprintf("find /%s -exec stat -c '%%X %%Y %%Z' {} + | sort -u", dir))
		if all := want + " " + want + " " + want + "\n"; times != all {
			t.Errorf("access, modification and change times below /%s are %q, want %q for everything", dir, times, all)
		}
	}
	return ctx
}

// containerSubPath tests kubelet's own subPath, of a directory and of a file.
func (v *volumes) containerSubPath(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	spec := v.s.rootReader("", "container-sub-path", inline("data", v.image.attributes()))
	c := &spec.Spec.Containers[0]
	c.Command = []string{"sh", "-c", "trap 'exit 0' TERM; sleep infinity & wait"}
	c.VolumeMounts = []corev1.VolumeMount{
		{Name: "data", MountPath: "/directory", SubPath: "links/directory"},
		{Name: "data", MountPath: "/file", SubPath: "hello.txt"},
	}
	p := v.start(ctx, t, spec)
	p.waitReady(ctx, t)
	look := func() {
		p.sees(ctx, t, "", "/directory", below(v.tree, "/links/directory"))
		if got := p.exec(ctx, t, "cat", "/file"); got != "hello\n" {
			t.Errorf("the file that is mounted alone holds %q", got)
		}
	}
	look()
	// It may take what tells it to end along, before that can say so.
	if _, err := p.try(ctx, "kill", "1"); err != nil {
		t.Logf("end the container: %v", err)
	}
	mustAwait(ctx, t, slowPatience, "the container of "+p.String()+" to be started again", func(ctx context.Context) (bool, string, error) {
		now := p.get(ctx, t)
		return restarts(now) == 1 && podReady(now), podState(now), nil
	})
	look()
	p.delete(ctx, t)
	v.s.agent(v.node).waitClean(ctx, t) // of kubelet's binds of subdirectories too
	return ctx
}

// containers tests a volume that containers of all kinds have.
func (v *volumes) containers(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	spec := v.s.rootReader("", "containers", inline("data", v.image.attributes("subPath", "attributes")))
	first, sidecar, always := spec.Spec.Containers[0], spec.Spec.Containers[0], corev1.ContainerRestartPolicyAlways
	first.Name, first.Command = "first", []string{"sh", "-c", "checker tree /data | sha256sum > /dev/termination-log"}
	sidecar.Name, sidecar.RestartPolicy = "sidecar", &always
	spec.Spec.InitContainers = []corev1.Container{first, sidecar}
	p := v.start(ctx, t, spec)
	p.waitReady(ctx, t)
	want := below(v.tree, "/attributes")
	p.sees(ctx, t, "sidecar", "/data", want)
	p.sees(ctx, t, "reader", "/data", want)
	again := p.exec(ctx, t, "sh", "-c", "checker tree /data | sha256sum")
	if ended := p.get(ctx, t).Status.InitContainerStatuses[0].State.Terminated; ended == nil || ended.Message != again {
		t.Errorf("the init container ended with %+v, want the message %q", ended, again)
	}
	return ctx
}

// readOnly tests that nobody can change a volume.
func (v *volumes) readOnly(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	yes := true
	privileged := v.s.rootReader("", "privileged", inline("data", v.image.attributes()))
	privileged.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: &yes}
	user := v.start(ctx, t, v.s.reader("", "user", inline("data", v.image.attributes())))
	root := v.start(ctx, t, v.s.rootReader("", "root", inline("data", v.image.attributes())))
	mighty := v.start(ctx, t, privileged)
	for _, p := range []*pod{user, root, mighty} {
		p.waitReady(ctx, t)
		p.exec(ctx, t, "checker", "write", "--file", "hello.txt", "/data") // fails unless all is EROFS
	}
	// Who may mount can make the container's mount writable, and even the file system; not the image.
	mighty.exec(ctx, t, "mount", "-o", "remount,bind,rw", "/data")
	mighty.exec(ctx, t, "checker", "write", "--file", "hello.txt", "/data")
	mighty.exec(ctx, t, "mount", "-o", "remount,rw", "/data")
	for _, change := range []string{"echo changed >> /data/hello.txt", "echo changed > /data/hello.txt", "touch /data/new", "rm /data/hello.txt"} {
		if out, err := mighty.try(ctx, "sh", "-c", change); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
			t.Errorf("%s, after a remount: %q, %v; want Read-only file system", change, out, err)
		}
	}
	mighty.exec(ctx, t, "mount", "-o", "remount,ro", "/data")
	for _, p := range []*pod{mighty, root} {
		p.sees(ctx, t, "", "/data", v.tree)
	}
	return ctx
}

// nosuid tests that an image gives nobody rights that its pod has not: set-user-ID bits and devices do
// not work on the node, nor in a pod that obeys the restricted Pod Security Standard.
func (v *volumes) nosuid(ctx context.Context, t *testing.T, _ *envconf.Config) context.Context {
	a := v.s.agent(v.node)
	dir := t.TempDir()
	secret := filepath.Join(dir, "of-root")
	must(t, os.Chmod(dir, 0o755)) // pods of any user read it
	must(t, os.Mkdir(secret, 0o700))
	must(t, os.WriteFile(filepath.Join(secret, "file"), []byte("of root\n"), 0o600))
	// A program that reads files, with the rights of root for everybody.
	program := a.run(ctx, t, "cat", "/bin/checker")
	must(t, os.WriteFile(filepath.Join(dir, "program"), []byte(program), 0o600))
	must(t, os.Chmod(filepath.Join(dir, "program"), 0o755|os.ModeSetuid))
	must(t, unix.Mknod(filepath.Join(dir, "zero"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))))
	must(t, unix.Chmod(filepath.Join(dir, "zero"), 0o666))
	img := v.s.open.pushTree(ctx, t, dir, "volumes/rights:v1")
	p := v.start(ctx, t, v.s.reader("", "user", inline("data", img.attributes())))
	p.waitReady(ctx, t)

	mounts := a.fuseMounts(ctx, t)
	if len(mounts) != 1 {
		t.Fatalf("the node has the volumes %v, want one", mounts)
	}
	for _, option := range []string{"ro", "nosuid", "nodev"} {
		if !slices.Contains(strings.Split(mounts[0].Options, ","), option) {
			t.Errorf("the volume is mounted on the node with %s, want %s too", mounts[0].Options, option)
		}
	}
	device := hostRoot + mounts[0].Point + "/zero"
	if out, err := a.try(ctx, "head", "-c", "1", device); err == nil || !strings.Contains(err.Error(), "Permission denied") {
		t.Errorf("reading %s on the node: %q, %v; want Permission denied", device, out, err)
	}
	// What is in the image is shown as it is.
	if got := p.exec(ctx, t, "stat", "-c", "%a %u", "/data/program"); got != "4755 0\n" {
		t.Errorf("the program has mode and owner %q, want 4755 0", got)
	}
	if out, err := p.try(ctx, "/data/program", "tree", "/data/of-root"); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("a set-user-ID program of the image read what is root's: %q, %v; want permission denied", out, err)
	}
	return ctx
}
