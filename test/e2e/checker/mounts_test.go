package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	dir := filepath.Join(t.TempDir(), "with a space")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("the source", dir, "tmpfs", unix.MS_NOSUID, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	out, err := checker(t, "mounts", "--pid", strconv.Itoa(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	var all []mountLine
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(all, func(m mountLine) bool { return m.Point == dir })
	if at < 0 || len(all) < 2 {
		t.Fatalf("no mount at %s in %+v", dir, all)
	}
	m := all[at]
	if m.Type != "tmpfs" || m.Source != "the source" || m.Root != "/" || m.ID == 0 || m.Parent == 0 ||
		!strings.Contains(m.Device, ":") || !strings.Contains(m.Options, "nosuid") {
		t.Errorf("the mount at %s: %+v", dir, m)
	}
}
