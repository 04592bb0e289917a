// Command upstream runs Kubernetes' own end-to-end tests of storage drivers against our driver, in
// the cluster that a kubeconfig names, where the driver must be installed.
//
// Kubernetes builds these tests into a program with all of its other ones (test/e2e). They only
// need the packages that this one imports, and what is compiled for the cluster's own programs is
// most of it.
//
// The suites are those that CSI drivers are tested with, all of them, from the same module as the
// cluster's Kubernetes. Three things are ours: what the driver is and has (driver.go), what our
// clusters lack or our driver insists on (pods.go), and package cases, which says of each of the
// suites' cases whether it applies, and why not. The program fails if a case that applies does not
// pass, and also if the suites skip one that it does not know: new cases of a new Kubernetes are
// looked at by a person.
//
// It writes one line per case to the file that -report names, as JSON, and exits with 0 if all is
// as it should be, with 1 if not, and with 2 if it was called in a wrong way. The flags of
// Kubernetes' program and of Ginkgo are there as well: -ginkgo.v shows what a case does,
// -ginkgo.focus runs some, after which the others are missing and the exit status is 1.
//
// hack/upstream.sh builds it.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"k8s.io/kubernetes/test/e2e/framework"
	_ "k8s.io/kubernetes/test/e2e/framework/debug/init" // events and logs of the namespace when a case fails
	storageframework "k8s.io/kubernetes/test/e2e/storage/framework"
	"k8s.io/kubernetes/test/e2e/storage/testsuites"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/kube/upstream/cases"
)

// suite is what Kubernetes calls the suites of drivers that are not its own.
const suite = "External Storage"

// prefix begins the names of all cases for our driver.
const prefix = suite + " [Driver: " + driverName + "] "

// config is what our own flags say.
type config struct {
	image, digest string // of the volumes
	podImage      string // of the pods
	label         string // of the namespaces, or "" for none
	report        string // a file, or "" for none
}

func main() {
	os.Exit(run())
}

func run() int {
	cfg, err := parseFlags()
	if err != nil {
		fmt.Fprintf(os.Stderr, "upstream: %v\n", err)
		return 2
	}
	adaptSuites()

	driver := newTestDriver(map[string]string{"image": cfg.image, "digest": cfg.digest})
	args := append([]any{suite}, storageframework.GetDriverNameWithFeatureTags(driver)...)
	framework.Describe(append(args, func() {
		storageframework.DefineTestSuites(driver, testsuites.CSISuites)
	})...)
	var results []cases.Result
	var incomplete []string // why not all cases were run
	ginkgo.ReportAfterSuite("our report", func(r ginkgo.Report) {
		results, incomplete = resultsOf(r), r.SpecialSuiteFailureReasons
	})
	framework.AfterReadingAllFlags(&framework.TestContext)
	gomega.RegisterFailHandler(framework.Fail)

	// Importing the suites brings cases of other parts of Kubernetes with it.
	suiteConfig, reporterConfig := ginkgo.GinkgoConfiguration()
	if len(suiteConfig.FocusStrings) == 0 {
		suiteConfig.FocusStrings = []string{regexp.QuoteMeta(prefix)}
	}
	suiteConfig.SkipStrings = append(suiteConfig.SkipStrings, cases.LeftOut()...)
	reporterConfig.Succinct = !reporterConfig.Verbose && !reporterConfig.VeryVerbose
	var status status
	ginkgo.RunSpecs(&status, "Kubernetes' storage suites", suiteConfig, reporterConfig)

	if cfg.report != "" {
		if err := writeReport(cfg.report, cases.Explain(results)); err != nil {
			fmt.Fprintf(os.Stderr, "upstream: %v\n", err)
			return 1
		}
	}
	complaints := incomplete
	if len(incomplete) == 0 {
		complaints = cases.Check(results)
	}
	for _, c := range complaints {
		fmt.Fprintf(os.Stderr, "upstream: %s\n", c)
	}
	fmt.Fprintln(os.Stderr, "upstream: "+cases.Summary(results))
	if status.failed || len(complaints) > 0 {
		return 1
	}
	return 0
}

// status is told by Ginkgo when something failed, as a *testing.T is.
type status struct{ failed bool }

func (s *status) Fail() { s.failed = true }

func parseFlags() (config, error) {
	var cfg config
	flag.StringVar(&cfg.image, "image", "", "PuzzleFS image of the volumes, as in a pod's volumeAttributes; it must have a file")
	flag.StringVar(&cfg.digest, "digest", "", "its digest, sha256:...")
	flag.StringVar(&cfg.podImage, "pod-image", "e2e.csi-puzzlefs.io/tools:1", "container image of the pods, with a shell and busybox's programs; nodes must have it or be able to pull it")
	flag.StringVar(&cfg.label, "namespace-label", "", "label for the namespaces that the suites make and remove, KEY=VALUE")
	flag.StringVar(&cfg.report, "report", "", "file to write a line of JSON per case to")
	framework.RegisterCommonFlags(flag.CommandLine)
	framework.RegisterClusterFlags(flag.CommandLine)
	flag.Parse()
	switch {
	case flag.NArg() > 0:
		return config{}, fmt.Errorf("parse flags: %q is not a flag", flag.Arg(0))
	case cfg.image == "" || cfg.digest == "":
		return config{}, errors.New("parse flags: -image and -digest must say what is in the volumes")
	case framework.TestContext.KubeConfig == "":
		return config{}, errors.New("parse flags: -kubeconfig, or KUBECONFIG, must say which cluster to use")
	}
	if framework.TestContext.Provider == "" {
		framework.TestContext.Provider = "skeleton" // a cluster of no cloud in particular
	}
	if cfg.label != "" {
		if err := labelNamespaces(cfg.label); err != nil {
			return config{}, err
		}
	}
	return cfg, usePodImage(cfg.podImage)
}

// resultsOf takes from a report what is about our driver.
func resultsOf(r ginkgo.Report) []cases.Result {
	var results []cases.Result
	for _, spec := range r.SpecReports {
		name, ours := strings.CutPrefix(spec.FullText(), prefix)
		if spec.LeafNodeType != types.NodeTypeIt || !ours {
			continue
		}
		result := cases.Result{Name: name, Message: spec.Failure.Message, Seconds: spec.RunTime.Seconds()}
		switch {
		case spec.State.Is(types.SpecStatePassed):
			result.Outcome = cases.Passed
		case spec.State.Is(types.SpecStateSkipped | types.SpecStatePending):
			result.Outcome = cases.Skipped
		default:
			result.Outcome = cases.Failed
		}
		results = append(results, result)
	}
	return results
}
