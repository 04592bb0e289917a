package main

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// jsonFields returns the names of the fields of what a command prints, those of objects in it
// included.
func jsonFields(typ reflect.Type) []string {
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
		typ = typ.Elem()
	}
	var names []string
	if typ.Kind() != reflect.Struct || typ.PkgPath() != reflect.TypeFor[moved]().PkgPath() {
		return nil
	}
	for f := range typ.Fields() {
		if tag, _, _ := strings.Cut(f.Tag.Get("json"), ","); tag != "" {
			names = append(append(names, tag), jsonFields(f.Type)...)
		}
	}
	return names
}

// docs/cli.md has every field of every result, and every command that has --json is here.
func TestResultsAreDocumented(t *testing.T) {
	results := map[string][]string{
		"build":            jsonFields(reflect.TypeFor[buildResult]()),
		"commit":           jsonFields(reflect.TypeFor[buildResult]()),
		"extract":          jsonFields(reflect.TypeFor[extracted]()),
		"verify":           jsonFields(reflect.TypeFor[verified]()),
		"push":             jsonFields(reflect.TypeFor[moved]()),
		"pull":             jsonFields(reflect.TypeFor[moved]()),
		"enable-fs-verity": jsonFields(reflect.TypeFor[sealed]()),
		"probe":            jsonFields(reflect.TypeFor[probed]()),
		"store ls":         jsonFields(reflect.TypeFor[storeListing]()),
		"store gc":         jsonFields(reflect.TypeFor[storeCollected]()),
		"store verify":     jsonFields(reflect.TypeFor[storeVerified]()),
		"store pin":        {"pinned", "note"},
		"store unpin":      {"unpinned"},
	}
	b, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := make(map[string]string)
	for _, s := range regexp.MustCompile(`(?m)^##+ `).Split(string(b), -1) {
		heading, text, _ := strings.Cut(s, "\n")
		for name := range strings.SplitSeq(heading, ", ") {
			sections[name] = text
		}
	}
	for name, fields := range results {
		if len(fields) == 0 {
			t.Errorf("%s has no fields", name)
		}
		for _, f := range fields {
			if !strings.Contains(sections[name], "`"+f+"`") {
				t.Errorf("docs/cli.md does not say what the field %q of %s means", f, name)
			}
		}
	}
	var check func(cmd *cobra.Command)
	check = func(cmd *cobra.Command) {
		name := strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name()+" ")
		if cmd.Flag("json") != nil && !cmd.HasSubCommands() && results[name] == nil {
			t.Errorf("%s has --json: put its fields here and into docs/cli.md", name)
		}
		for _, sub := range cmd.Commands() {
			check(sub)
		}
	}
	check(newRootCommand())
}
