// Command registry is the CNCF's distribution registry with the storage that a test gives it, a
// directory or memory, and a file of passwords or a token server to know its users by.
//
// The registry as it is released also stores in three clouds, whose libraries would be most of
// what hack/node.sh builds for it.
package main

import (
	"os"

	"github.com/distribution/distribution/v3/registry"
	_ "github.com/distribution/distribution/v3/registry/auth/htpasswd"
	_ "github.com/distribution/distribution/v3/registry/auth/token"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
)

func main() {
	if registry.RootCmd.Execute() != nil {
		os.Exit(1) // the command has said why
	}
}
