package spelling_test

import (
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/spelling"
)

func TestNearest(t *testing.T) {
	known := []string{"image", "digest", "mode", "nodev", "noexec"}
	for word, want := range map[string]string{
		"image": "image", "imgae": "image", "Digset": "digest", "nodeev": "nodev", "mod": "mode",
		"noexex": "noexec", "nodex": "nodev", "umask": "", "": "", "digestdigest": "",
	} {
		if got := spelling.Nearest(word, known); got != want {
			t.Errorf("%q: got %q, want %q", word, got, want)
		}
	}
}
