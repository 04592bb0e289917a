//go:build man

package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/manpage"
)

// With the build tag man the program is another one, which writes the manual pages of this one. The
// commands are in this package, which nobody can import; and the program itself does without
// what writes pages. hack/man.sh runs it.
func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: SOURCE_DATE_EPOCH=SECONDS go run -tags man ./cmd/csi-puzzlefs DIR")
		os.Exit(exitUsage)
	}
	if err := writeManPages(os.Args[1]); err != nil {
		fmt.Fprintf(os.Stderr, "csi-puzzlefs: %v\n", err)
		os.Exit(exitError)
	}
}

func writeManPages(dir string) error {
	seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return errors.New("write manual pages: SOURCE_DATE_EPOCH is to be the seconds since 1970 of the day that they bear")
	}
	_, err = manpage.Write(manpage.Config{
		// Not that of the Go tool, which depends on how it is called.
		Version: strings.TrimSpace(release),
		Date:    time.Unix(seconds, 0),
		ExitStatus: [][2]string{
			{"0", "It worked."},
			{"1", "The work failed, for the reason that is on standard error."},
			{"2", "The command line makes no sense."},
		},
	}, newRootCommand(), dir)
	return err
}
