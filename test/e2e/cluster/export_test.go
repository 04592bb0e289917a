package cluster

// For tests of what another machine than that of the test would show, and of what takes no cluster.
var (
	MakeDir            = makeDir
	MissingControllers = missingControllers
	ResolveByDNS       = resolveByDNS
)

// MountPoints are where the hierarchies of a /proc/self/cgroup are mounted.
func MountPoints(text string) ([]string, error) {
	all, err := parseHierarchies(text)
	var points []string
	for _, h := range all {
		points = append(points, h.mounted(hybrid(all)))
	}
	return points, err
}
