package fuse

import (
	"fmt"
	"slices"
	"strings"
)

// maxLabel bounds an SELinux label in bytes: options have to fit into a page together.
const maxLabel = 1024

// SELinuxOptions returns the names of the mount options that SELinux knows.
func SELinuxOptions() []string { return []string{"context", "fscontext", "defcontext", "rootcontext"} }

// checkSELinux accepts one option of Config.SELinux. A label must not have what could end it,
// and with it begin another option of ours, such as a descriptor or a user.
func checkSELinux(option string) error {
	name, label, _ := strings.Cut(option, "=")
	bad := func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '"' || r == '\\' }
	switch {
	case !slices.Contains(SELinuxOptions(), name):
		return fmt.Errorf("the SELinux option %q is none of %s: %w", name, strings.Join(SELinuxOptions(), ", "), ErrConfig)
	case label == "" || len(label) > maxLabel || strings.ContainsFunc(label, bad):
		return fmt.Errorf("the SELinux option %s has the label %q, want 1 to %d printable characters without spaces, quotes and backslashes: %w", name, label, maxLabel, ErrConfig)
	}
	return nil
}

// quoteSELinux writes an option as the kernel wants it: a label may have commas.
func quoteSELinux(option string) string {
	name, label, _ := strings.Cut(option, "=")
	return name + `="` + label + `"`
}
