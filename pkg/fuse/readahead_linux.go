package fuse

import (
	"fmt"
	"os"
	"strconv"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/mountinfo"
)

// readAheadKiB is how far the kernel reads ahead of who reads a file from its beginning to its end, in
// KiB: eight READs of the largest size. The kernel's own choice, 128, makes each READ that small, and leaves one of two
// CPUs idle; with two or four READs at a time the server waits for the reader now and then, with sixteen not less.
const readAheadKiB = 8192

// raiseReadAhead tells the kernel to read far ahead. There is no other way to than sysfs, which is root's,
// and may be read-only in a container: it costs speed only.
func raiseReadAhead(d mountinfo.Device) error {
	path := fmt.Sprintf("/sys/class/bdi/%s/read_ahead_kb", d)
	if err := os.WriteFile(path, []byte(strconv.Itoa(readAheadKiB)), 0); err != nil {
		return fmt.Errorf("raise read-ahead: %w", err)
	}
	return nil
}
