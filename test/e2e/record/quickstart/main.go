// Command quickstart runs the session docs/quickstart.session on the cluster that KUBECONFIG names and writes
// docs/quickstart.cast and docs/quickstart.svg. "make docs" runs it on a cluster of its own.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/record"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintf(os.Stderr, "quickstart: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("quickstart", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), `usage: KUBECONFIG=FILE quickstart [flags]

Runs docs/quickstart.session, with the helm and kubectl of PATH, and records it.

`)
		flags.PrintDefaults()
	}
	source := flags.String("source", "../..", "the source tree, `directory` of the module csi-puzzlefs, with bin/csi-puzzlefs built")
	address := flags.String("address", "", "an `IP` of this machine that pods reach (default: the one from which it reaches the API server)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("takes no arguments but flags; %q given", flags.Args())
	}
	cfg := record.Config{
		Source:     *source,
		Program:    filepath.Join(*source, "bin", "csi-puzzlefs"),
		Kubeconfig: os.Getenv("KUBECONFIG"),
		Progress:   os.Stderr,
	}
	if cfg.Kubeconfig == "" {
		return errors.New("KUBECONFIG names no cluster; make docs starts one")
	}
	if *address != "" {
		var err error
		if cfg.Address, err = netip.ParseAddr(*address); err != nil {
			return fmt.Errorf("-address: %w", err)
		}
	}
	files, err := record.Quickstart(ctx, cfg)
	if err != nil {
		return err
	}
	return errors.Join(
		write(filepath.Join(*source, record.CastFile), files.Cast),
		write(filepath.Join(*source, record.SVGFile), files.SVG),
	)
}

// write writes a file if it is not what it should be, and says which.
func write(name string, content []byte) error {
	old, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if bytes.Equal(old, content) {
		fmt.Printf("%s is current\n", name)
		return nil
	}
	fmt.Printf("writing %s\n", name)
	return os.WriteFile(name, content, 0o644)
}
