package apiserver_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/deploy/internal/apiserver"
)

// TestStartShowsLogs: when a program ends at once, the error shows what it said.
func TestStartShowsLogs(t *testing.T) {
	programs := t.TempDir()
	for name, script := range map[string]string{
		"etcd":           "#!/bin/sh\nexec sleep 1000\n",
		"kube-apiserver": "#!/bin/sh\necho no such luck\nexit 1\n",
	} {
		if err := os.WriteFile(filepath.Join(programs, name), []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	_, err := apiserver.Start(t.Context(), apiserver.Config{Programs: programs, Dir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "kube-apiserver has ended") || !strings.Contains(err.Error(), "no such luck") {
		t.Errorf("got %v, want the log of kube-apiserver", err)
	}
}
