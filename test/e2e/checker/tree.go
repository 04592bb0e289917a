package main

import (
	"fmt"

	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/sample"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/e2e/internal/tree"
)

func describeTree(c *call) error {
	args, err := c.parse()
	if err != nil {
		return err
	}
	t, err := tree.Describe(args[0])
	if err != nil {
		return err
	}
	_, err = c.stdout.Write(t.Format())
	return err
}

func makeSample(c *call) error {
	seed := c.flags.Uint64("seed", 1, "another seed gives the files other contents")
	size := c.flags.Int64("size", sample.DefaultSize, "length in `bytes` of the large file; the sparse one is twice as long")
	args, err := c.parse()
	if err != nil {
		return err
	}
	omitted, err := sample.Make(args[0], sample.Config{Seed: *seed, Size: *size})
	if err != nil {
		return err
	}
	for _, o := range omitted {
		fmt.Fprintf(c.stderr, "checker: left out: %s\n", o)
	}
	return nil
}
