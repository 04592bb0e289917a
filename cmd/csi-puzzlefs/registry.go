package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/registry"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// registryFlags are the flags of every command that talks to a registry.
type registryFlags struct{ certsDir, dockerConfig string }

func (f *registryFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.certsDir, "certs-dir", "", "`directory` with HOST/hosts.toml as containerd reads it: CAs, client certificates, mirrors, plain HTTP")
	cmd.Flags().StringVar(&f.dockerConfig, "docker-config", "", "Docker config `file` with credentials; default $DOCKER_CONFIG/config.json or ~/.docker/config.json")
}

// config returns what they say, for a command that goes on to talk to registries.
func (f *registryFlags) config() registry.Config {
	trustFallbackRoots()
	return registry.Config{
		CertsDir:    f.certsDir,
		Credentials: registry.DockerKeychain(f.dockerConfig),
		UserAgent:   "csi-puzzlefs/" + version(),
		Logger:      slog.Default(),
	}
}

// moved is what push and pull print with --json.
type moved struct {
	// Reference is the image in the registry, with its digest.
	Reference string        `json:"reference"`
	Digest    format.Digest `json:"digest"`
	Blobs     int           `json:"blobs"`
	// StoredBytes is the size of all blobs, NewBytes of those that were not there.
	StoredBytes int64   `json:"storedBytes"`
	NewBytes    int64   `json:"newBytes"`
	Seconds     float64 `json:"seconds"`
}

// printMoved prints what a push or pull came to, given its last report of progress.
func printMoved(cmd *cobra.Command, asJSON bool, ref registry.Reference, d format.Digest, last registry.Progress, started time.Time) error {
	ref.Digest = d
	return printResult(cmd, asJSON, moved{
		Reference: ref.String(), Digest: d, Blobs: last.TotalBlobs,
		StoredBytes: last.TotalBytes, NewBytes: last.TotalBytes - last.ReusedBytes, Seconds: secondsSince(started),
	}, func(w io.Writer) { fmt.Fprintf(w, "oci image manifest digest: %s\n", d) })
}

func newPushCommand() *cobra.Command {
	form := argForm{layoutTag, "REF"}
	var flags registryFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "push LAYOUT:TAG REF",
		Short: "Push an image to a registry",
		Long: `Push an image from a local layout to a registry. Blobs that the registry has are not sent again.
Credentials come from the Docker config. Registries are spoken to by HTTPS, but for loopback
addresses and what --certs-dir says otherwise. LAYOUT TAG may be two arguments, too.

--json prints "reference", the image in the registry with its digest, "digest", the number of
"blobs", "storedBytes", what they take up together, "newBytes", what of it the registry did not
have, and "seconds".`,
		Example: `  csi-puzzlefs build /usr/share/doc /tmp/images:docs
  csi-puzzlefs push /tmp/images:docs localhost:5000/docs:v1`,
		Args: form.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			started := time.Now()
			local, others, err := form.split(cmd, args)
			if err != nil {
				return err
			}
			ref, err := registry.ParseReference(others[0])
			if err != nil {
				return usagef(cmd, "%w", err)
			}
			client, err := registry.New(flags.config())
			if err != nil {
				return err
			}
			return withTag(local, func(s *store.Store, root format.Descriptor) error {
				var last registry.Progress
				m := newMeter(cmd.ErrOrStderr(), "pushing")
				d, err := client.Push(cmd.Context(), s, root, ref, registry.PushOptions{
					Progress: func(p registry.Progress) {
						last = p
						m.set(p.DoneBytes, p.TotalBytes)
					},
					Warn: func(message string) { warn(cmd, message) },
				})
				m.close()
				if err != nil {
					return err
				}
				return printMoved(cmd, asJSON, ref, d.Digest, last, started)
			})
		},
	}
	jsonFlag(cmd, &asJSON)
	flags.add(cmd)
	return cmd
}

func newPullCommand() *cobra.Command {
	form := argForm{"REF", layoutTag}
	var flags registryFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "pull REF LAYOUT:TAG",
		Short: "Pull an image from a registry",
		Long: `Pull an image from a registry into a local layout, which is made if it does not exist. Blobs that
the layout has are not fetched again, and what was fetched by a pull that failed is kept. Every
blob is checked against its digest. LAYOUT TAG may be two arguments, too.

--json prints "reference", the image in the registry with its digest, "digest", the number of
"blobs", "storedBytes", what they take up together, "newBytes", what of it the layout did not
have, and "seconds".`,
		Example: `  csi-puzzlefs pull localhost:5000/docs:v1 /tmp/pulled:docs`,
		Args:    form.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			started := time.Now()
			local, others, err := form.split(cmd, args)
			if err != nil {
				return err
			}
			ref, err := registry.ParseReference(others[0])
			if err != nil {
				return usagef(cmd, "%w", err)
			}
			client, err := registry.New(flags.config())
			if err != nil {
				return err
			}
			// Asked first, so that a mistyped reference does not leave an empty layout.
			if _, _, err := client.Resolve(cmd.Context(), ref); err != nil {
				return err
			}
			s, err := store.Open(store.Config{Dir: local.dir, Create: true})
			if err != nil {
				return err
			}
			last, d, err := pull(cmd, client, ref, s, local.tag)
			if err = errors.Join(err, s.Close()); err != nil {
				return err
			}
			return printMoved(cmd, asJSON, ref, d, last, started)
		},
	}
	jsonFlag(cmd, &asJSON)
	flags.add(cmd)
	return cmd
}

// pull pulls an image and tags it. It returns the last report of progress.
func pull(cmd *cobra.Command, client *registry.Client, ref registry.Reference, s *store.Store, tag string) (last registry.Progress, _ format.Digest, _ error) {
	if s.Layout() != store.LayoutOCI {
		return last, format.Digest{}, fmt.Errorf("pull into %s: %w", s.Dir(), store.ErrReadOnly)
	}
	m := newMeter(cmd.ErrOrStderr(), "pulling")
	d, err := client.Pull(cmd.Context(), ref, s, registry.PullOptions{
		Progress: func(p registry.Progress) {
			last = p
			m.set(p.DoneBytes, p.TotalBytes)
		},
	})
	m.close()
	if err == nil {
		err = s.Tag(tag, d)
	}
	return last, d.Digest, err
}
