package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/spelling"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
)

// mountOptions is what -o asks for.
type mountOptions struct {
	given map[string]string // by name; the value is "" where there is none
	root  bool              // who mounts
	// writable says that an overlay will be mounted on top.
	writable bool
}

// mountOptionNames are the options of -o, those of the reference. A name that ends with = has
// a value.
func mountOptionNames() []string {
	return []string{
		"allow_other", "allow_root", "async", "atime", "auto_unmount", "default_permissions", "dev", "dirsync", "exec",
		"fsname=", "noatime", "nodev", "noexec", "nosuid", "ro", "rw", "subtype=", "suid", "sync",
	}
}

// parseMountOptions reads the values of all -o, lists with commas between. A comma in a value
// has a backslash before it.
func parseMountOptions(cmd *cobra.Command, lists []string, root, writable bool) (*mountOptions, error) {
	o := &mountOptions{given: make(map[string]string), root: root, writable: writable}
	for _, list := range lists {
		for _, option := range splitOptions(list) {
			if option == "" {
				continue // as mount(8) has it
			}
			if err := o.add(option); err != nil {
				return nil, usagef(cmd, "-o %s: %w", option, err)
			}
		}
	}
	if err := o.check(); err != nil {
		return nil, usagef(cmd, "-o: %w", err)
	}
	return o, nil
}

// splitOptions splits a list at its commas, but for those with a backslash before them, and
// takes the backslashes away.
func splitOptions(list string) []string {
	var options []string
	var option strings.Builder
	for i := 0; i < len(list); i++ {
		switch c := list[i]; {
		case c == ',':
			options = append(options, option.String())
			option.Reset()
			continue
		case c == '\\' && i+1 < len(list):
			i++
		}
		option.WriteByte(list[i])
	}
	return append(options, option.String())
}

// add adds one option.
func (o *mountOptions) add(option string) error {
	name, value, hasValue := strings.Cut(option, "=")
	known := mountOptionNames()
	switch {
	case hasValue && slices.Contains(known, name+"="):
		if value == "" {
			return fmt.Errorf("a value is missing")
		}
		if old, ok := o.given[name]; ok && old != value {
			return fmt.Errorf("%s=%s was given, too: leave one out", name, old)
		}
	case hasValue && slices.Contains(known, name):
		return fmt.Errorf("%s takes no value", name)
	case slices.Contains(known, name+"="):
		return fmt.Errorf("a value is missing: want %s=…", name)
	case !slices.Contains(known, name):
		hint := ""
		if nearest := spelling.Nearest(name, known); nearest != "" {
			hint = fmt.Sprintf("; did you mean %s?", nearest)
		}
		return fmt.Errorf("unknown mount option %q%s (known are %s)", name, hint, strings.Join(known, ", "))
	}
	o.given[name] = value
	return nil
}

func (o *mountOptions) has(name string) bool {
	_, ok := o.given[name]
	return ok
}

// check refuses what contradicts itself and what cannot be.
func (o *mountOptions) check() error {
	for _, pair := range [][2]string{
		{"allow_other", "allow_root"},
		{"dev", "nodev"},
		{"suid", "nosuid"},
		{"ro", "rw"},
		{"exec", "noexec"},
		{"atime", "noatime"},
		{"sync", "async"},
	} {
		if o.has(pair[0]) && o.has(pair[1]) {
			return fmt.Errorf("%s and %s contradict each other: leave one out", pair[0], pair[1])
		}
	}
	switch {
	case !o.root && o.has("dev"), !o.root && o.has("suid"):
		return fmt.Errorf("dev and suid are for root")
	case !o.root && o.has("allow_root"):
		// The reference looks at who asks; but what the kernel has cached it gives to everybody.
		return fmt.Errorf("allow_root is for root: the kernel lets in either only you or, with allow_other, everybody")
	case o.writable && o.has("ro"):
		return fmt.Errorf("ro contradicts -w and -p: leave one out")
	case o.writable && o.has("allow_root"):
		return fmt.Errorf("allow_root does not go with -w and -p: an overlay lets every user in")
	case o.writable && o.has("auto_unmount"):
		return fmt.Errorf("auto_unmount does not go with -w and -p: what would be unmounted lies below the overlay")
	}
	return nil
}

// warnings says which options have no effect though a user might count on it.
func (o *mountOptions) warnings() []string {
	var all []string
	if o.has("rw") && !o.writable {
		all = append(all, "-o rw: images are read-only, and mounted so; -w stacks a writable overlay")
	}
	for _, name := range []string{"sync", "dirsync"} {
		if o.has(name) && o.writable {
			all = append(all, "-o "+name+" has no effect: how changes are written is up to the file system that has the upper directory")
		}
	}
	if subtype := o.given["subtype"]; o.has("fsname") && subtype != "" && subtype != fuse.Subtype {
		all = append(all, "-o fsname=…,subtype="+subtype+": csi-puzzlefs umount cannot tell this mount from others: unmount it by umount or fusermount3 -u")
	}
	return all
}

// apply says it all to a mount. What is not mentioned a read-only mount has, or needs not have:
// default_permissions, ro, atime, sync, dirsync and async.
func (o *mountOptions) apply(cfg *fuse.Config) {
	if name, ok := o.given["fsname"]; ok {
		cfg.FSName = name
	}
	cfg.Subtype = o.given["subtype"]
	cfg.AllowOther = o.has("allow_other")
	cfg.RootOnly = o.has("allow_root")
	cfg.AutoUnmount = o.has("auto_unmount")
	cfg.Dev, cfg.Suid, cfg.NoExec = o.has("dev"), o.has("suid"), o.has("noexec")
	cfg.NoAtime = o.has("noatime")
}
