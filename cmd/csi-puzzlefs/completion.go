package main

import (
	_ "embed" // for bashWords
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
)

// bashWords takes a command line apart where the package bash-completion is not there to do it.
//
//go:embed completion.bash
var bashWords string

func newCompletionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion SHELL",
		Short: "Print what makes a shell complete command lines",
		Long: `Print a script that makes a shell complete commands, flags, LAYOUT:TAG with the tags that a layout
has, and the values of flags. SHELL is bash, zsh, fish or powershell. To try it:

  bash         source <(csi-puzzlefs completion bash)
  zsh          source <(csi-puzzlefs completion zsh)
  fish         csi-puzzlefs completion fish | source
  powershell   csi-puzzlefs completion powershell | Out-String | Invoke-Expression

To have it always, write it to where the shell looks for it:

  bash   /usr/share/bash-completion/completions/csi-puzzlefs, or below ~/.local for one user
  zsh    _csi-puzzlefs in a directory of $fpath
  fish   ~/.config/fish/completions/csi-puzzlefs.fish`,
		Example:   `  csi-puzzlefs completion bash > /tmp/csi-puzzlefs.bash`,
		ValidArgs: []cobra.Completion{"bash", "fish", "powershell", "zsh"},
		Args:      exactArgs("SHELL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "bash":
				if err := root.GenBashCompletionV2(out, true); err != nil {
					return err
				}
				_, err := out.Write([]byte(bashWords))
				return err
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			case "powershell":
				return root.GenPowerShellCompletionWithDesc(out)
			}
			return usagef(cmd, "completion for %q: want bash, zsh, fish or powershell", args[0])
		},
	}
}

// flagValues are the values of flags that take one of a few.
func flagValues() map[string][]cobra.Completion {
	return map[string][]cobra.Completion{
		"log-level":         {"debug", "info", "warn", "error"},
		"log-format":        {"text", "json"},
		"chunker":           {"canonical", "jotfs", "jotfs:16K", "jotfs:64K", "jotfs:256K", "jotfs:1M", "jotfs:4M"},
		"compression-level": {"fastest", "medium", "better", "best"},
		"verity":            {"auto", "require", "hash"},
		// Of overlays: where the kernel keeps what it notes in upper directories.
		"overlay-xattrs": {"auto", "trusted", "user"},
		"platform":       {"linux/amd64", "linux/arm64"},
	}
}

// complete teaches a command and those below it to complete their arguments and flags.
func complete(cmd *cobra.Command) {
	if form := formOf(cmd.Use); len(form) > 0 && cmd.ValidArgs == nil && cmd.ValidArgsFunction == nil {
		cmd.ValidArgsFunction = form.complete
	}
	fixed := flagValues()
	add := func(f *pflag.Flag) {
		what, _ := pflag.UnquoteUsage(f)
		var fn cobra.CompletionFunc
		switch values, ok := fixed[f.Name]; {
		case ok:
			fn = cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)
		case what == "directory":
			fn = completeDirs
		case f.Name == "options":
			fn = completeMountOptions
		case what == "file", what == "named pipe":
			return // which shells do
		case f.Value.Type() == "bool":
			return
		default:
			fn = cobra.NoFileCompletions
		}
		// It fails where a command has said already how to complete a flag of its own.
		_ = cmd.RegisterFlagCompletionFunc(f.Name, fn)
	}
	cmd.LocalNonPersistentFlags().VisitAll(add)
	cmd.PersistentFlags().VisitAll(add)
	for _, sub := range cmd.Commands() {
		complete(sub)
	}
}

// flagsInUse are the flags in the line that says how a command is used.
var flagsInUse = regexp.MustCompile(`\[-[^]]*\]|(^| )-\S+`)

// formOf returns the names of a command's arguments, from the line that says how it is used.
func formOf(use string) argForm {
	fields := strings.Fields(flagsInUse.ReplaceAllString(use, ""))
	var form argForm
	for _, f := range fields[1:] {
		form = append(form, strings.Trim(f, "[]"))
	}
	return form
}

// complete implements cobra.CompletionFunc.
func (f argForm) complete(_ *cobra.Command, args []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
	at := slices.Index(f, layoutTag)
	next := len(args)
	if at >= 0 && next > at {
		if next == at+1 && !strings.Contains(args[at], ":") {
			return tagsOf(args[at], "", part)
		}
		if _, _, err := store.SplitRef(args[at]); err != nil {
			next-- // LAYOUT TAG took the place of one
		}
	}
	if next >= len(f) {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	switch f[next] {
	case layoutTag:
		return completeLayoutTag(part)
	case "DIR":
		return completeDirs(nil, nil, part)
	case "SOURCE":
		if ref, ok := strings.CutPrefix(part, "oci:"); ok {
			list, directive := completeLayoutTag(ref)
			for i := range list {
				list[i] = "oci:" + list[i]
			}
			return list, directive
		}
		return nil, cobra.ShellCompDirectiveDefault
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// completeLayoutTag completes LAYOUT:TAG: directories, a colon after those that are layouts,
// and then the tags.
func completeLayoutTag(part string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if i := strings.LastIndexByte(part, ':'); i > 0 {
		return tagsOf(part[:i], part[:i+1], part)
	}
	return directories(part, func(path string) string {
		if _, err := os.Stat(filepath.Join(path, "oci-layout")); err == nil {
			return path + ":"
		}
		return path + "/"
	})
}

// tagsOf completes the tags of a layout, with what stands before them on the command line.
func tagsOf(dir, before, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
	s, err := store.Open(store.Config{Dir: dir})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer s.Close()
	tags, err := s.Tags()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var list []cobra.Completion
	for _, d := range tags {
		// One with a colon cannot be said.
		if tag := d.Annotations[format.AnnotationRefName]; !strings.Contains(tag, ":") && strings.HasPrefix(before+tag, part) {
			list = append(list, before+tag)
		}
	}
	return list, cobra.ShellCompDirectiveNoFileComp
}

// completeMountOptions implements cobra.CompletionFunc for a list of options of a mount, whose
// last one is to be completed.
func completeMountOptions(_ *cobra.Command, _ []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
	before := part[:strings.LastIndexByte(part, ',')+1]
	var list []cobra.Completion
	for _, name := range mountOptionNames() {
		if strings.HasPrefix(before+name, part) {
			list = append(list, before+name)
		}
	}
	return list, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}

// completeDirs implements cobra.CompletionFunc for a directory, without the help of the shell,
// which for bash is a package that may not be there.
func completeDirs(_ *cobra.Command, _ []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return directories(part, func(path string) string { return path + "/" })
}

// directories lists the directories that part may become, as word spells them.
func directories(part string, word func(path string) string) ([]cobra.Completion, cobra.ShellCompDirective) {
	dir, name := filepath.Split(part)
	look := dir
	if look == "" {
		look = "."
	}
	entries, err := os.ReadDir(look)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var list []cobra.Completion
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), name) || strings.HasPrefix(e.Name(), ".") && name == "" {
			continue
		}
		if fi, err := os.Stat(filepath.Join(look, e.Name())); err == nil && fi.IsDir() {
			list = append(list, word(dir+e.Name()))
		}
	}
	return list, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}
