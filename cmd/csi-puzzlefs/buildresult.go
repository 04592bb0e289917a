package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// maxTerminationLog is how much of a termination message Kubernetes keeps, in bytes.
const maxTerminationLog = 4096

// buildResult is what a build made, in the form that --json prints. Sizes are in bytes.
type buildResult struct {
	// Reference is where it was pushed to, with the digest; "" if it was not.
	Reference string `json:"reference,omitempty"`
	// Digest is the content digest of the manifest, Verity its fs-verity digest: the two forms
	// that the volume attribute digest takes.
	Digest string `json:"digest"`
	Verity string `json:"verity"`
	Inodes int    `json:"inodes"`
	// Bytes is the content of all files, StoredBytes the distinct blobs of the image, NewBytes
	// those that the registry, or else the layout, did not have.
	Bytes       int64   `json:"bytes"`
	StoredBytes int64   `json:"storedBytes"`
	NewBytes    int64   `json:"newBytes"`
	Seconds     float64 `json:"seconds"`

	manifest format.Descriptor
}

// print writes the result for people, or as one line of JSON.
func (r *buildResult) print(cmd *cobra.Command, asJSON bool) error {
	return printResult(cmd, asJSON, r, func(w io.Writer) {
		fmt.Fprintf(w, "puzzlefs image manifest digest: %s\noci image manifest digest: %s\n", strings.TrimPrefix(r.Verity, "verity:"), r.Digest)
		if r.Reference != "" {
			fmt.Fprintf(w, "pushed: %s (%d of %d bytes were new)\n", r.Reference, r.NewBytes, r.StoredBytes)
		}
	})
}

// writeTo writes the result as JSON, or the error in words, to a termination log. The file
// is written as it is, not replaced: kubelet mounted it there.
func (r *buildResult) writeTo(name string, failed error) error {
	text := []byte(nil)
	if failed != nil {
		text = fmt.Appendf(nil, "csi-puzzlefs: %v\n", failed)
		if len(text) > maxTerminationLog {
			const cut = "…\n"
			text = append([]byte(strings.ToValidUTF8(string(text[:maxTerminationLog-len(cut)]), "")), cut...)
		}
	} else {
		var err error
		if text, err = json.Marshal(r); err != nil {
			return err
		}
		text = append(text, '\n')
	}
	if err := os.WriteFile(name, text, 0o644); err != nil {
		return fmt.Errorf("write termination log: %w", err)
	}
	return nil
}

// countingStore counts what a build adds to a layout.
type countingStore struct {
	*store.Store
	new atomic.Int64
}

// Put implements builder.Store.
func (c *countingStore) Put(data []byte, d format.Digest) error {
	added, err := c.PutNew(data, d)
	if added {
		c.new.Add(int64(len(data)))
	}
	return err
}
