// Command lab starts a Kubernetes cluster of its own on this machine, runs a program in it with
// KUBECONFIG set and kubectl, helm and ctr in its PATH, and takes the cluster down again when the program
// ends. "make e2e-shell" gives a shell in it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/cluster"
)

func main() {
	cluster.Enter()
	status, err := run(context.Background(), os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "lab: %v\n", err)
		os.Exit(1)
	}
	os.Exit(status)
}

// run runs one command line and returns the program's exit status.
func run(ctx context.Context, args []string) (int, error) {
	flags := flag.NewFlagSet("lab", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), "usage: lab [flags] PROGRAM [ARGUMENT...]\n\nRuns a program in a Kubernetes cluster made for it.\n\n")
		flags.PrintDefaults()
	}
	var cfg cluster.Config
	flags.StringVar(&cfg.Kube, "kube", "", "the `directory` that hack/kube.sh printed")
	flags.StringVar(&cfg.Node, "node", "", "the `directory` that hack/node.sh printed")
	images := flags.String("images", "", "a `directory` with archives of container images, which all nodes get")
	flags.IntVar(&cfg.Nodes, "nodes", 2, "the number of nodes, 1 to 9")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0, nil
	} else if err != nil {
		return 2, nil
	}
	if flags.NArg() == 0 {
		flags.Usage()
		return 2, nil
	}
	if *images != "" {
		var err error
		if cfg.Images, err = filepath.Glob(filepath.Join(*images, "*.tar")); err != nil {
			return 0, err
		}
		if len(cfg.Images) == 0 {
			return 0, fmt.Errorf("find images: no archives (*.tar) in %s", *images)
		}
	}
	began := time.Now()
	c, err := cluster.Start(ctx, cfg)
	if err != nil {
		return 0, err
	}
	defer c.Stop()
	fmt.Fprintf(os.Stderr, "lab: Kubernetes with %d nodes is ready after %.1f s; logs are in %s\n", cfg.Nodes, time.Since(began).Seconds(), c.LogDir())

	cmd := exec.CommandContext(ctx, flags.Arg(0), flags.Args()[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "PATH="+c.Path())
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			return 0, err
		}
	}
	return cmd.ProcessState.ExitCode(), nil
}
