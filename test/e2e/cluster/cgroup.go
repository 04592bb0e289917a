package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupRoot is where all distributions mount the hierarchies.
const cgroupRoot = "/sys/fs/cgroup"

// hierarchy is one tree of cgroups: the one of version 2, or one of version 1 for some controllers.
type hierarchy struct {
	// controllers is as the kernel writes it: "memory", "cpu,cpuacct", "name=systemd", or "" for version 2.
	controllers string
	// path is this process's cgroup in it.
	path string
}

// hierarchies are those that this kernel has in use and that are mounted where they are by convention. What is not
// mounted on the machine does not get into the lab either: groups made there would stay.
func hierarchies() ([]hierarchy, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	all, err := parseHierarchies(string(b))
	if err != nil {
		return nil, err
	}
	exists := func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "cgroup.procs"))
		return err == nil
	}
	if exists(cgroupRoot) {
		// Version 2 is mounted there, and then it is what programs use, even beside some of version 1.
		all = slices.DeleteFunc(all, func(h hierarchy) bool { return h.controllers != "" })
	}
	beside := hybrid(all)
	all = slices.DeleteFunc(all, func(h hierarchy) bool { return !exists(h.mounted(beside)) })
	if len(all) == 0 {
		return nil, fmt.Errorf("no cgroups are mounted in %s", cgroupRoot)
	}
	return all, nil
}

// parseHierarchies reads what the kernel shows as /proc/self/cgroup.
func parseHierarchies(text string) ([]hierarchy, error) {
	var all []hierarchy
	for line := range strings.Lines(text) {
		// 4:memory:/user.slice
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			return nil, fmt.Errorf("/proc/self/cgroup: line %q", line)
		}
		all = append(all, hierarchy{controllers: fields[1], path: fields[2]})
	}
	return all, nil
}

// mounted is where the hierarchy is, by convention. Where there are hierarchies of version 1, that
// of version 2 is beside them and has no controllers.
func (h hierarchy) mounted(hybrid bool) string {
	switch {
	case h.controllers != "":
		return filepath.Join(cgroupRoot, strings.TrimPrefix(h.controllers, "name="))
	case hybrid:
		return filepath.Join(cgroupRoot, "unified")
	default:
		return cgroupRoot
	}
}

// hybrid says whether there are hierarchies of version 1.
func hybrid(all []hierarchy) bool {
	return slices.ContainsFunc(all, func(h hierarchy) bool { return h.controllers != "" })
}

// cgroup names one group in every hierarchy.
type cgroup struct {
	name string
	// inside: the hierarchies are mounted as this process's cgroup namespace shows them, so
	// that its own cgroup is their root.
	inside bool
}

func outsideCgroup(name string) cgroup { return cgroup{name: name} }
func insideCgroup(name string) cgroup  { return cgroup{name: name, inside: true} }

// dirs are the directories of the group by the mount points of their hierarchies.
func (g cgroup) dirs() ([]string, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, h := range all {
		root := h.mounted(hybrid(all))
		// With version 2 alone the group that this process is in has processes, and so cannot give
		// controllers to a group below it: the root can.
		if !g.inside && hybrid(all) {
			root = filepath.Join(root, h.path)
		}
		dirs = append(dirs, filepath.Join(root, g.name))
	}
	return dirs, nil
}

// make makes the group in every hierarchy.
func (g cgroup) make() error {
	dirs, err := g.dirs()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup: %w", err)
		}
		// Version 1 lets no process into a cpuset that has no processors yet.
		for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
			if err != nil || strings.TrimSpace(string(value)) == "" {
				continue // another hierarchy, or version 2, where an empty one means its parent's
			}
			if err := os.WriteFile(filepath.Join(dir, name), value, 0o644); err != nil {
				return fmt.Errorf("make cgroup: %w", err)
			}
		}
	}
	return nil
}

// leaf is the group for this namespace's own processes in version 2, where a group that gives
// controllers to its children has no processes.
const leaf = "own"

// delegate lets the root of this process's cgroup namespace, as it is mounted, give its controllers to groups
// below. Version 1 has nothing to say about that.
func delegate() error {
	controllers, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	own := filepath.Join(cgroupRoot, leaf)
	if err := os.MkdirAll(own, 0o755); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	if err := enterCgroup(own); err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(controllers)) {
		// Some cannot be given; kubelet says which of them it misses.
		_ = os.WriteFile(filepath.Join(cgroupRoot, "cgroup.subtree_control"), []byte("+"+name), 0o644)
	}
	return nil
}

// join puts this process into the group.
//
// It has to be called from a cgroup namespace in which the group that the process comes from is seen as well: with
// version 2, as systemd mounts it, a process cannot be taken over a namespace's border from inside.
func (g cgroup) join() error {
	dirs, err := g.dirs()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := enterCgroup(dir); err != nil {
			return err
		}
	}
	return nil
}

// joinOwn puts this process among those of the group that are in none below it, where [delegate] has put them.
func (g cgroup) joinOwn() error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	if !hybrid(all) {
		g.name = filepath.Join(g.name, leaf)
	}
	return g.join()
}

// checkControllers says which controllers the group lacks that pods need. Only version 2 can lack any: there a group has
// what its parent gives it.
func (g cgroup) checkControllers() error {
	all, err := hierarchies()
	if err != nil || hybrid(all) {
		return err
	}
	dirs, err := g.dirs()
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			return err
		}
		if missing := missingControllers(string(controllers)); len(missing) > 0 {
			parent := filepath.Dir(dir)
			return fmt.Errorf("find the cgroup controllers that pods need: %s does not hand down %s: run, outside of any container: echo '+%s' > %s/cgroup.subtree_control",
				parent, strings.Join(missing, ", "), strings.Join(missing, " +"), parent)
		}
	}
	return nil
}

// missingControllers are those that kubelet and runc do not go without, and that are not listed.
func missingControllers(listed string) []string {
	return slices.DeleteFunc([]string{"cpu", "memory", "pids"}, func(name string) bool {
		return slices.Contains(strings.Fields(listed), name)
	})
}

// enterCgroup puts this process into one directory's group.
func enterCgroup(dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0o644); err != nil {
		return fmt.Errorf("join cgroup: %w", err)
	}
	return nil
}

// removeTimeout is how long the processes of a group that were killed may take to be gone.
const removeTimeout = 30 * time.Second

// remove removes the group and all below it. Its processes may take a moment to be gone.
func (g cgroup) remove() error {
	dirs, err := g.dirs()
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		for until := time.Now().Add(removeTimeout); ; time.Sleep(50 * time.Millisecond) {
			if err = removeTree(dir); err == nil || time.Now().After(until) {
				break
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// removeTree removes directories from the bottom up: those of cgroups are empty for that, whatever
// files they show.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}

// mountCgroups mounts the hierarchies below root as this process's namespace shows them.
func mountCgroups(root string, all []hierarchy) error {
	target := filepath.Join(root, cgroupRoot)
	if !hybrid(all) {
		return mountOne("cgroup2", target, "cgroup2", 0, "")
	}
	if err := mountOne("tmpfs", target, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, h := range all {
		dir := filepath.Join(root, h.mounted(true))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		var err error
		if h.controllers == "" {
			err = mountOne("cgroup2", dir, "cgroup2", 0, "")
		} else if strings.HasPrefix(h.controllers, "name=") {
			err = mountOne("cgroup", dir, "cgroup", 0, "none,"+h.controllers)
		} else {
			err = mountOne("cgroup", dir, "cgroup", 0, h.controllers)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
