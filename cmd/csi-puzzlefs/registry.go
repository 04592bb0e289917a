package main

import (
	"errors"
	"fmt"
	"log/slog"

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

func (f *registryFlags) config() registry.Config {
	return registry.Config{
		CertsDir:    f.certsDir,
		Credentials: registry.DockerKeychain(f.dockerConfig),
		UserAgent:   "csi-puzzlefs/" + version(),
		Logger:      slog.Default(),
	}
}

func newPushCommand() *cobra.Command {
	form := argForm{layoutTag, "REF"}
	var flags registryFlags
	cmd := &cobra.Command{
		Use:   "push LAYOUT:TAG REF",
		Short: "Push an image to a registry",
		Long: `Push an image from a local layout to a registry. Blobs that the registry has are not sent again.
Credentials come from the Docker config. Registries are spoken to by HTTPS, but for loopback
addresses and what --certs-dir says otherwise. LAYOUT TAG may be two arguments, too.`,
		Example: `  csi-puzzlefs build /usr/share/doc /tmp/images:docs
  csi-puzzlefs push /tmp/images:docs localhost:5000/docs:v1`,
		Args: form.check,
		RunE: func(cmd *cobra.Command, args []string) error {
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
				m := newMeter(cmd.ErrOrStderr(), "pushing")
				d, err := client.Push(cmd.Context(), s, root, ref, registry.PushOptions{
					Progress: func(p registry.Progress) { m.set(p.DoneBytes, p.TotalBytes) },
					Warn:     func(message string) { warn(cmd, message) },
				})
				m.close()
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "oci image manifest digest: %s\n", d.Digest)
				return err
			})
		},
	}
	flags.add(cmd)
	return cmd
}

func newPullCommand() *cobra.Command {
	form := argForm{"REF", layoutTag}
	var flags registryFlags
	cmd := &cobra.Command{
		Use:   "pull REF LAYOUT:TAG",
		Short: "Pull an image from a registry",
		Long: `Pull an image from a registry into a local layout, which is made if it does not exist. Blobs that
the layout has are not fetched again, and what was fetched by a pull that failed is kept. Every
blob is checked against its digest. LAYOUT TAG may be two arguments, too.`,
		Example: `  csi-puzzlefs pull localhost:5000/docs:v1 /tmp/pulled:docs`,
		Args:    form.check,
		RunE: func(cmd *cobra.Command, args []string) error {
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
			return errors.Join(pull(cmd, client, ref, s, local.tag), s.Close())
		},
	}
	flags.add(cmd)
	return cmd
}

func pull(cmd *cobra.Command, client *registry.Client, ref registry.Reference, s *store.Store, tag string) error {
	if s.Layout() != store.LayoutOCI {
		return fmt.Errorf("pull into %s: %w", s.Dir(), store.ErrReadOnly)
	}
	m := newMeter(cmd.ErrOrStderr(), "pulling")
	d, err := client.Pull(cmd.Context(), ref, s, registry.PullOptions{
		Progress: func(p registry.Progress) { m.set(p.DoneBytes, p.TotalBytes) },
	})
	m.close()
	if err != nil {
		return err
	}
	if err := s.Tag(tag, d); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "oci image manifest digest: %s\n", d.Digest)
	return err
}
