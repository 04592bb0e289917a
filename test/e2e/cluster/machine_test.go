package cluster_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/cluster"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// TestMountPoints: cgroups are where the distributions mount them, for either version.
func TestMountPoints(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []string // mount points
	}{
		{"version 2", "0::/user.slice/user-0.slice/session-1.scope\n", []string{"/sys/fs/cgroup"}},
		{
			"both", "4:cpu,cpuacct:/\n1:name=systemd:/init.scope\n0::/init.scope\n",
			[]string{"/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"},
		},
		{"a path with colons", "0::/system.slice/a:b.service\n", []string{"/sys/fs/cgroup"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := cluster.MountPoints(tt.text)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("mount points (-want +got):\n%s", diff)
			}
		})
	}
	if _, err := cluster.MountPoints("nonsense\n"); err == nil {
		t.Error("a line without colons is taken")
	}
}

// TestMissingControllers: names are compared as a whole.
func TestMissingControllers(t *testing.T) {
	for _, tt := range []struct {
		listed string
		want   []string
	}{
		{"cpuset cpu io memory hugetlb pids\n", nil},
		{"cpuset memory\n", []string{"cpu", "pids"}},
		{"\n", []string{"cpu", "memory", "pids"}},
	} {
		if diff := cmp.Diff(tt.want, cluster.MissingControllers(tt.listed), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("missing of %q (-want +got):\n%s", tt.listed, diff)
		}
	}
}

// TestResolveByDNS: the line for hosts is replaced, wherever it is, and no other.
func TestResolveByDNS(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"with resolved", "passwd: files systemd\nhosts: mymachines resolve [!UNAVAIL=return] files\nnetworks: files\n", "passwd: files systemd\nnetworks: files\nhosts: files dns\n"},
		{"no newline at the end", "passwd: files", "passwd: files\nhosts: files dns\n"},
		{"empty", "", "hosts: files dns\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, cluster.ResolveByDNS(tt.text)); diff != "" {
				t.Errorf("nsswitch.conf (-want +got):\n%s", diff)
			}
		})
	}
}

// TestMakeDir: directories of clusters that have ended are removed, those of living ones are not, and what only has such a name
// and leads elsewhere is not followed.
func TestMakeDir(t *testing.T) {
	parent, elsewhere := t.TempDir(), t.TempDir()
	precious := filepath.Join(elsewhere, "precious")
	link := filepath.Join(parent, "puzzlefs-e2e-1")
	dead := filepath.Join(parent, "puzzlefs-e2e-2")
	for _, err := range []error{
		os.WriteFile(precious, nil, 0o600),
		os.Symlink(elsewhere, link),
		os.MkdirAll(filepath.Join(dead, "log"), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	first, err := cluster.MakeDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	second, err := cluster.MakeDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{precious, link, first, second} {
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("it was removed: %v", err)
		}
	}
	if _, err := os.Lstat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory of a cluster that has ended: got %v, want it removed", err)
	}
}
