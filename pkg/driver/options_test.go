package driver_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
)

// TestMountName: volumes share a mount exactly if no option of the file system differs.
func TestMountName(t *testing.T) {
	name := func(mtime string, flags ...string) string {
		t.Helper()
		req := goodRequest()
		req.VolumeCapability = mountCapability(flags...)
		if mtime != "" {
			req.VolumeContext["mtime"] = mtime
		}
		n, err := driver.MountName(req)
		if err != nil {
			t.Fatal(err)
		}
		if n != hexA && !strings.HasPrefix(n, hexA+"-") {
			t.Errorf("name %q does not begin with the digest", n)
		}
		return n
	}
	same := [][]string{
		// What the drivers before this one called them.
		{hexA, name(""), name("0"), name("1970-01-01T00:00:00Z"), name("1970-01-01T02:00:00+02:00"), name("", "noexec", "ro", "nodev")},
		{name("1767225600"), name("2026-01-01T00:00:00Z"), name("2026-01-01T01:00:00+01:00"), name("1767225600", "noexec")},
		{name("2026-01-01T00:00:00.5Z")},
		{name("", `context="s0:c1,c2"`), name("", "context=s0:c1,c2"), name("", "ro", `context="s0:c1,c2"`, "context=s0:c1,c2")},
		{name("", `context="s0:c1,c3"`)},
		{name("", `fscontext="s0:c1,c2"`)},
		{name("", `fscontext="b"`, `context="a"`), name("", `context="a"`, `fscontext="b"`)},
		{name("1767225600", `context="s0:c1,c2"`)},
	}
	seen := map[string]int{}
	for i, group := range same {
		for _, n := range group {
			if n != group[0] {
				t.Errorf("group %d: %s and %s differ", i, n, group[0])
			}
		}
		if j, dup := seen[group[0]]; dup {
			t.Errorf("groups %d and %d share the name %s", j, i, group[0])
		}
		seen[group[0]] = i
	}
}

// TestModTime: one mount per image and time, shared by all that want it, and made again by
// the next driver; the names that drivers gave before there were options stay valid.
func TestModTime(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 2)
	ref := reg.push(t, im, "app", "1")
	with := func(pod, mtime string) *csi.NodePublishVolumeRequest {
		req := n.request(pod, ref, im.digest.String())
		if mtime != "" {
			req.VolumeContext["mtime"] = mtime
		}
		return req
	}
	plain, dated, again := with("plain", ""), with("dated", "2026-01-01T00:00:00Z"), with("again", "1767225600")
	all := []*csi.NodePublishVolumeRequest{plain, dated, again}
	look := func() {
		t.Helper()
		for i, want := range []int64{0, 1767225600, 1767225600} {
			n.shows(all[i].TargetPath, im)
			fi, err := os.Stat(filepath.Join(all[i].TargetPath, "hello.txt"))
			if err != nil || fi.ModTime().Unix() != want {
				t.Errorf("%s: time %v, %v; want %v", all[i].VolumeId, fi.ModTime(), err, time.Unix(want, 0))
			}
		}
		shared := n.mountsUnder("state")
		if len(shared) != 2 || !slices.Contains(shared, filepath.Join(n.dir, "state/mounts", im.digest.Hex())) {
			t.Errorf("mounts are %v, want two, one of them named by the digest alone", shared)
		}
	}
	n.startProcess("")
	n.waitReady()
	for _, req := range all {
		n.publish(req)
	}
	look()
	n.kill()
	n.startProcess("")
	n.waitReady()
	look()
	stats, err := n.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: again.VolumeId, VolumePath: again.TargetPath})
	if err != nil || len(stats.Usage) != 2 {
		t.Errorf("stats: %v, %v", stats, err)
	}
	changed := with("again", "1")
	if _, err := n.NodePublishVolume(t.Context(), changed); status.Code(err) != codes.AlreadyExists {
		t.Errorf("another time at the same target: %v, want AlreadyExists", err)
	}
	n.unpublish(plain)
	n.unpublish(dated)
	if shared := n.mountsUnder("state"); len(shared) != 1 {
		t.Errorf("mounts are %v, want the one that is still used", shared)
	}
	n.unpublish(again)
	n.nothingLeft()
}

// TestMountOptions: the driver's flags are on every mount, and a volume's own can only add.
func TestMountOptions(t *testing.T) {
	reg := newRegistry(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	for _, tt := range []struct {
		name           string
		options, flags []string
		shared, target []string
	}{
		{"default", nil, nil, []string{"nodev", "nosuid"}, []string{"nodev", "nosuid"}},
		{"default spelt out", []string{"nodev", "nosuid"}, []string{"noexec", "noatime"}, []string{"nodev", "nosuid"}, []string{"nodev", "noexec", "nosuid"}},
		{"noexec", []string{"noexec"}, nil, []string{"nodev", "noexec", "nosuid"}, []string{"nodev", "noexec", "nosuid"}},
		{"suid", []string{"suid", "exec"}, nil, []string{"nodev"}, []string{"nodev"}},
		{"suid, not for this volume", []string{"suid"}, []string{"nosuid"}, []string{"nodev"}, []string{"nodev", "nosuid"}},
		{"dev and suid", []string{"dev", "suid"}, []string{"nodev", "ro"}, nil, []string{"nodev"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			n.cfg.MountOptions = tt.options
			n.start()
			req := n.request("a", ref, im.digest.String())
			req.VolumeCapability = mountCapability(tt.flags...)
			n.publish(req)
			for path, want := range map[string][]string{n.mountsUnder("state")[0]: tt.shared, req.TargetPath: tt.target} {
				if diff := cmp.Diff(want, flagsAt(t, path)); diff != "" {
					t.Errorf("flags of %s (-want +got):\n%s", path, diff)
				}
			}
			n.unpublish(req)
			n.nothingLeft()
		})
	}
}

// flagsAt returns which flags keep something from working at a mount point.
func flagsAt(t *testing.T, path string) []string {
	t.Helper()
	table, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		t.Fatal(err)
	}
	var flags []string
	for _, m := range table.At(path) {
		if !slices.Contains(m.Options, "ro") {
			t.Errorf("%s is not read-only: %v", path, m.Options)
		}
		for _, o := range m.Options {
			if slices.Contains([]string{"nodev", "nosuid", "noexec"}, o) {
				flags = append(flags, o)
			}
		}
	}
	slices.Sort(flags)
	return flags
}

// TestMountOptionsRefused: a driver does not start with options that make no sense.
func TestMountOptionsRefused(t *testing.T) {
	for _, tt := range []struct {
		options []string
		says    string
	}{
		{[]string{"nodev", "dev"}, "contradict"},
		{[]string{"rw"}, `"rw"`},
		{[]string{""}, "nosuid"},
		{[]string{"context=x"}, "context=x"},
	} {
		cfg := testConfig("unix:///run/x.sock", "/var/lib/x", "")
		cfg.MountOptions = tt.options
		if _, err := driver.New(cfg); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%q: got %v, want an error that says %s", tt.options, err, tt.says)
		}
	}
}

// TestSELinux publishes with the context that kubelet passes for seLinuxMount. A kernel
// without SELinux refuses it: then the error says so, and nothing is left.
func TestSELinux(t *testing.T) {
	reg, n := newRegistry(t), newNode(t)
	im := makeImage(t, "hello\n", 1)
	ref := reg.push(t, im, "app", "1")
	n.start()
	req := n.request("a", ref, im.digest.String())
	const label = "system_u:object_r:container_file_t:s0:c1,c2"
	req.VolumeCapability = mountCapability(`context="` + label + `"`)
	if _, err := os.Stat("/sys/fs/selinux/enforce"); err != nil {
		n.refused(req, codes.Internal, "the kernel has no SELinux", label)
		n.nothingLeft()
		// The image itself is fine.
		plain := n.request("b", ref, im.digest.String())
		n.publish(plain)
		n.shows(plain.TargetPath, im)
		n.unpublish(plain)
		n.nothingLeft()
		return
	}
	n.publish(req)
	value := make([]byte, 256)
	size, err := unix.Getxattr(req.TargetPath, "security.selinux", value)
	if err != nil || strings.TrimRight(string(value[:size]), "\x00") != label {
		t.Errorf("the label is %q, %v; want %s", value[:max(size, 0)], err, label)
	}
	n.unpublish(req)
	n.nothingLeft()
}
