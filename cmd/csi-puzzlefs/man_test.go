package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// There is a page for every command, of which a checker says nothing, and the same again from the
// same source.
func TestManPages(t *testing.T) {
	if _, err := exec.LookPath("mandoc"); err != nil {
		t.Fatalf("%v: hack/install-deps.sh installs it", err)
	}
	program := filepath.Join(t.TempDir(), "man")
	if out, err := exec.Command("go", "build", "-tags", "man", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	dirs := []string{t.TempDir(), t.TempDir()}
	for _, dir := range dirs {
		cmd := exec.Command(program, dir)
		cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000")
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	var check func(c *cobra.Command)
	check = func(c *cobra.Command) {
		if !c.IsAvailableCommand() && c.HasParent() {
			return
		}
		name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
		page, err := os.ReadFile(filepath.Join(dirs[0], name))
		if err != nil {
			t.Error(err)
			return
		}
		if again, _ := os.ReadFile(filepath.Join(dirs[1], name)); string(again) != string(page) {
			t.Errorf("%s is another one the second time", name)
		}
		if !strings.Contains(string(page), " 2023-11-14 ") {
			t.Errorf("%s does not bear the date of SOURCE_DATE_EPOCH", name)
		}
		if out, err := exec.Command("mandoc", "-T", "lint", "-W", "warning", filepath.Join(dirs[0], name)).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%v\n%s", err, out)
		}
		for _, sub := range c.Commands() {
			check(sub)
		}
	}
	check(newRootCommand())
	// Without a date they could not be the same again.
	cmd := exec.Command(program, t.TempDir())
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "SOURCE_DATE_EPOCH") {
		t.Errorf("without a date: %v\n%s", err, out)
	}
}
