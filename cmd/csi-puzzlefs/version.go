package main

import (
	_ "embed" // for release
	"runtime/debug"
	"strings"
)

// release is the version that this source tree is or becomes, without a leading v. It is never
// assigned to: hack/image puts another file in the place of VERSION to build another version.
//
//go:embed VERSION
var release string

// version returns the program's version, without a leading v: as the Go tool recorded it, which is
// a tag or names a commit, or that of the source tree where the Go tool knew none.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return strings.TrimPrefix(info.Main.Version, "v")
	}
	return strings.TrimSpace(release)
}
