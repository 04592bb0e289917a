// Command demo shows the main job from one end to the other, with the real parts: the
// program builds an image of a real tree and pushes it to a registry; the driver, a process
// of its own, publishes it for two pods over gRPC; every file is compared with the source;
// what must be refused is refused; and nothing is left behind. "make demo" runs it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/internal/node"
)

// readerEnv tells a child process, which runs as another user, which directory to read.
const readerEnv = "CSI_PUZZLEFS_DEMO_READER"

func main() {
	if dir := os.Getenv(readerEnv); dir != "" {
		exit(readTree(dir))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	exit(run(ctx))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// demo is one run. Its steps build on each other.
type demo struct {
	ctx     context.Context
	program string // csi-puzzlefs
	source  string // the tree
	dir     string // everything the demo makes
	step    int

	ref, digest, verity string
	node                *node.Node
}

func run(ctx context.Context) (err error) {
	d := &demo{ctx: ctx, program: os.Getenv("CSI_PUZZLEFS")}
	if d.program == "" {
		return errors.New("CSI_PUZZLEFS does not name the program: use make demo")
	}
	if os.Geteuid() != 0 {
		return errors.New("mounts need root: run make demo as root")
	}
	if d.source, err = goSource(ctx); err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "csi-puzzlefs-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()
	// Another user than root is to reach the volumes below it.
	if err := os.Chmod(d.dir, 0o755); err != nil {
		return err
	}
	begin := time.Now()
	//nolint:contextcheck // it is stopped at the end, not when the context ends
	registryAddr, stopRegistry, err := startRegistry()
	if err != nil {
		return fmt.Errorf("start the registry: %w", err)
	}
	defer func() { err = errors.Join(err, stopRegistry()) }()
	d.ref = registryAddr + "/demo/go-src:v1"
	for _, step := range []func() error{d.build, d.push, d.startDriver} {
		if err := step(); err != nil {
			return errors.Join(err, d.cleanUp())
		}
	}
	for _, step := range []func() error{
		d.publishTwice, d.compare, d.readAsNobody, d.wrongDigest, d.unpublish, d.flippedByte, d.stopDriver,
	} {
		if err := step(); err != nil {
			return errors.Join(err, d.cleanUp())
		}
	}
	fmt.Printf("done in %.1f s: a pod reads exactly what the digest names, or an error\n", time.Since(begin).Seconds())
	return nil
}

// say prints a step's result and how long it took.
func (d *demo) say(begin time.Time, format string, args ...any) {
	d.step++
	fmt.Printf("%2d  %6.2f s  %s\n", d.step, time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
}

// target is where kubelet would want the volume of a pod.
func (d *demo) target(pod string) string { return filepath.Join(d.dir, "pods", pod, "volume") }

// volume is the image in a volume of a pod.
func (d *demo) volume(pod, digest string) node.Volume {
	return node.Volume{Pod: pod, Target: d.target(pod), Image: d.ref, Digest: digest}
}
