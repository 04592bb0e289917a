// Command csi-puzzlefs builds, inspects, mounts, moves and extracts PuzzleFS images, and is
// the CSI driver that serves them to Kubernetes pods.
//
// This package only connects flags, logging and the packages that do the work.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// Exit codes.
const (
	exitOK = iota
	exitError
	exitUsage
)

// run runs one command line and returns its exit code.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	// The first signal asks to end in good order; the next one ends at once.
	context.AfterFunc(ctx, stop)
	root := newRootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	var usage *usageError
	var reported *reportedError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &reported):
		return reported.code
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "csi-puzzlefs: %v\n%s", err, usage.hint)
		return exitUsage
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		// With what was being done, and what could not be cleaned up.
		fmt.Fprintf(stderr, "csi-puzzlefs: interrupted: %v\n", err)
		return exitError
	}
	fmt.Fprintf(stderr, "csi-puzzlefs: %v\n", err)
	return exitError
}

// usageError is a command line that makes no sense, as opposed to work that failed.
type usageError struct {
	err  error
	hint string
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// usagef returns a usageError that points at the command's help.
func usagef(cmd *cobra.Command, format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...), fmt.Sprintf("Try '%s --help'.\n", cmd.CommandPath())}
}

// exactArgs demands the named arguments.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return usagef(cmd, "%s takes %d arguments, %s; %d given", cmd.Name(), len(names), strings.Join(names, " and "), len(args))
		}
		return nil
	}
}

func newRootCommand() *cobra.Command {
	var level, logFormat string
	root := &cobra.Command{
		Use:   "csi-puzzlefs",
		Short: "PuzzleFS images: build, mount, move, verify, and serve to Kubernetes pods",
		Long: `csi-puzzlefs works with PuzzleFS images: read-only file trees as content-addressed,
content-defined chunks in an OCI image layout or an OCI registry.

LAYOUT:TAG names an image in a local layout directory; it is split at the last colon. LAYOUT TAG, as
two arguments, means the same to every command.
REF names one in a registry: registry.example/name[:tag][@sha256:digest].`,
		Version:       version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef(cmd, "unknown command %q", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			var l slog.Level
			if err := l.UnmarshalText([]byte(level)); err != nil {
				return usagef(cmd, "--log-level %q: want debug, info, warn or error", level)
			}
			opts := &slog.HandlerOptions{Level: l}
			switch logFormat {
			case "text":
				slog.SetDefault(slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), opts)))
			case "json":
				slog.SetDefault(slog.New(slog.NewJSONHandler(cmd.ErrOrStderr(), opts)))
			default:
				return usagef(cmd, "--log-format %q: want text or json", logFormat)
			}
			return nil
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usagef(cmd, "%w", err) })
	root.PersistentFlags().StringVar(&level, "log-level", "info", "what to log: debug, info, warn or error")
	root.PersistentFlags().StringVar(&logFormat, "log-format", "text", "how to log to stderr: text or json")
	root.AddCommand(
		newBuildCommand(), newCommitCommand(), newMountCommand(), newUmountCommand(), newExtractCommand(), newVerifyCommand(),
		newInspectCommand(), newPushCommand(), newPullCommand(), newDriverCommand(), newStoreCommand(),
		newProbeCommand(), newEnableCommand(),
		newCompletionCommand(),
	)
	complete(root)
	return root
}
