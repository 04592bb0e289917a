package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/driver"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/signature"
)

// policyFlags are the driver's flags that say which images a node mounts.
type policyFlags struct {
	requireDigest          bool
	allowed, keys          []string
	maxImageSize, metadata string
	maxInodes              uint64
}

func (f *policyFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.requireDigest, "require-digest", true, "refuse volumes that name an image by tag only")
	cmd.Flags().StringSliceVar(&f.allowed, "allowed-registries", nil, "mount images of these only: `HOST[:PORT][/PATH]`,..., by whole components of the path; none for all")
	cmd.Flags().StringArrayVar(&f.keys, "signature-key", nil, "mount images only that cosign signed with the key whose public part this PEM `file` holds; one of several is enough")
	cmd.Flags().StringVar(&f.maxImageSize, "max-image-size", "0", "what the blobs of an image may take on disk, and its files together, a `quantity` such as 20Gi; 0 for no limit")
	cmd.Flags().Uint64Var(&f.maxInodes, "max-inodes", 0, "how many `inodes` an image may have; 0 for no limit")
	cmd.Flags().StringVar(&f.metadata, "metadata-memory", "256Mi", "what the metadata of all mounted images may take of memory, with that of decoding one, a `quantity`; 0 for 256Mi")
}

// apply puts what the flags say into cfg, and reads the keys.
func (f *policyFlags) apply(cfg *driver.Config) error {
	cfg.Policy = driver.Policy{
		RequireDigest: f.requireDigest, AllowedRegistries: f.allowed,
		MaxInodes: f.maxInodes,
	}
	var err error
	if cfg.Policy.MaxImageBytes, err = driver.ParseQuantity(f.maxImageSize); err != nil {
		return fmt.Errorf("--max-image-size: %w", err)
	}
	if cfg.MetadataMemory, err = driver.ParseQuantity(f.metadata); err != nil {
		return fmt.Errorf("--metadata-memory: %w", err)
	}
	if len(f.keys) == 0 {
		return nil
	}
	var files [][]byte
	for _, path := range f.keys {
		b, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("--signature-key: %w", err)
		}
		if _, err := signature.ParseKeys(b); err != nil {
			return fmt.Errorf("--signature-key %s: %w", path, err)
		}
		files = append(files, b)
	}
	cfg.Policy.SignatureKeys, err = signature.ParseKeys(files...)
	return err
}
