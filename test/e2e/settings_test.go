package e2e_test

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/e2e-framework/pkg/envconf"
)

// settings say what the suite runs on. They come from flags and the environment, which hack/e2e.sh sets.
type settings struct {
	// kubeconfig is a file, from -kubeconfig or KUBECONFIG; "" means a cluster of the suite's own.
	kubeconfig string
	// context of that file, "" for its current one.
	context string

	// The images that the pods run: E2E_DRIVER_IMAGE, E2E_DRIVER_NEXT_IMAGE (another build of the
	// driver), E2E_TOOLS_IMAGE, E2E_REGISTRY_IMAGE. The cluster must have them, or be able to pull them.
	driver, next, tools, registry imageName

	// Directories for a cluster of the suite's own, as hack/kube.sh, hack/node.sh and
	// hack/e2e-images.sh print them: E2E_KUBE, E2E_NODE, E2E_IMAGES.
	kube, node, images string

	// program is csi-puzzlefs, which builds and pushes: CSI_PUZZLEFS.
	program string
	// upstream is the program with Kubernetes' storage suites, which hack/upstream.sh prints: E2E_UPSTREAM.
	upstream string
	// kubeletDir is kubelet's --root-dir on the nodes, stateDir the driver's there: E2E_KUBELET_DIR,
	// E2E_STATE_DIR.
	kubeletDir, stateDir string

	// machines says who controls the nodes themselves: own, kind or none: E2E_MACHINES.
	machines string
	// requireAll makes a skip a failure: E2E_REQUIRE_ALL=1.
	requireAll bool
	// keep leaves everything in place after a failure: -e2e.keep.
	keep bool
	// shard says which of the parts to run, "2/3" the second third: -e2e.shard.
	shard string
}

// imageName is the image of a container.
type imageName struct{ repository, tag string }

func (i imageName) String() string { return i.repository + ":" + i.tag }

// imageFrom reads REPOSITORY[:TAG] from the environment; what it does not say is as in the default.
func imageFrom(variable string, def imageName) (imageName, error) {
	text := os.Getenv(variable)
	if text == "" {
		return def, nil
	}
	if strings.Contains(text, "@") {
		return imageName{}, fmt.Errorf("read %s=%s: name it as REPOSITORY[:TAG], without a digest", variable, text)
	}
	i := imageName{repository: text, tag: def.tag}
	if colon := strings.LastIndex(text, ":"); colon > strings.LastIndex(text, "/") {
		i.repository, i.tag = text[:colon], text[colon+1:]
	}
	if i.repository == "" || i.tag == "" {
		return imageName{}, fmt.Errorf("read %s=%s: want REPOSITORY[:TAG]", variable, text)
	}
	return i, nil
}

// readSettings reads flags and environment. It may be called once, for flags can be defined once.
func readSettings() (*settings, *envconf.Config, error) {
	s := &settings{}
	flag.BoolVar(&s.keep, "e2e.keep", false, "after a failure leave the cluster and everything in it as it is, until interrupted")
	flag.StringVar(&s.shard, "e2e.shard", "1/1", "the parts to run, as `I/N`: the I-th of N runs, which have all of them together")
	config, err := envconf.NewFromFlags()
	if err != nil {
		return nil, nil, err
	}
	s.context = config.KubeContext()
	// Not config.KubeconfigFile(): a library may have defined the flag before the framework could.
	s.kubeconfig = os.Getenv("KUBECONFIG")
	if f := flag.Lookup("kubeconfig"); f != nil && f.Value.String() != "" {
		s.kubeconfig = f.Value.String()
	}
	var errs []error
	for _, i := range []struct {
		variable string
		to       *imageName
		def      imageName
	}{
		{"E2E_DRIVER_IMAGE", &s.driver, imageName{"registry.example.com/csi-puzzlefs", "0.1.0"}},
		{"E2E_DRIVER_NEXT_IMAGE", &s.next, imageName{"registry.example.com/csi-puzzlefs", "0.1.1-next"}},
		{"E2E_TOOLS_IMAGE", &s.tools, imageName{"e2e.csi-puzzlefs.io/tools", "1"}},
		{"E2E_REGISTRY_IMAGE", &s.registry, imageName{"e2e.csi-puzzlefs.io/registry", "1"}},
	} {
		name, err := imageFrom(i.variable, i.def)
		errs = append(errs, err)
		*i.to = name
	}
	s.kube, s.node, s.images = os.Getenv("E2E_KUBE"), os.Getenv("E2E_NODE"), os.Getenv("E2E_IMAGES")
	s.program, s.upstream = os.Getenv("CSI_PUZZLEFS"), os.Getenv("E2E_UPSTREAM")
	s.kubeletDir = cmp.Or(os.Getenv("E2E_KUBELET_DIR"), "/var/lib/kubelet")
	s.stateDir = cmp.Or(os.Getenv("E2E_STATE_DIR"), "/var/lib/csi-puzzlefs")
	s.requireAll = os.Getenv("E2E_REQUIRE_ALL") == "1"
	s.machines = os.Getenv("E2E_MACHINES")
	if s.machines == "" {
		s.machines = "none"
		if s.ownCluster() {
			s.machines = "own"
		}
	}
	return s, config, errors.Join(append(errs, s.validate())...)
}

// ownCluster says whether the suite starts a cluster rather than use one.
func (s *settings) ownCluster() bool { return s.kubeconfig == "" }

func (s *settings) validate() error {
	if _, err := share(s.shard, []part{}); err != nil {
		return err
	}
	if strings.ContainsRune(s.kubeconfig, filepath.ListSeparator) {
		return fmt.Errorf("read KUBECONFIG=%s: name one file", s.kubeconfig)
	}
	if s.ownCluster() {
		for _, d := range []struct{ variable, script, dir string }{
			{"E2E_KUBE", "hack/kube.sh", s.kube},
			{"E2E_NODE", "hack/node.sh", s.node},
			{"E2E_IMAGES", "hack/e2e-images.sh", s.images},
		} {
			if d.dir == "" {
				return fmt.Errorf("%s is not set, to the directory that %s prints: run the suite by make e2e, or give it a cluster with -kubeconfig", d.variable, d.script)
			}
		}
	}
	if s.program == "" {
		return errors.New("CSI_PUZZLEFS is not set, to the program csi-puzzlefs: run the suite by make e2e, or make build and CSI_PUZZLEFS=…/bin/csi-puzzlefs")
	}
	if !filepath.IsAbs(s.program) {
		return fmt.Errorf("read CSI_PUZZLEFS=%s: want an absolute path", s.program)
	}
	switch s.machines {
	case "own":
		if !s.ownCluster() {
			return errors.New("E2E_MACHINES=own: it is another cluster; say kind or none")
		}
	case "kind", "none":
	default:
		return fmt.Errorf("read E2E_MACHINES=%s: want own, kind or none", s.machines)
	}
	return nil
}
