package vm_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mount mounts the sample's image with those flags. The directory is that of the mount; the error is
// the exit of a command that did not mount, with what it said.
func mount(t *testing.T, s *sample, flags ...string) (dir, stderr string, err error) {
	t.Helper()
	dir, err = os.MkdirTemp(os.Getenv("VM_PLAIN"), "mount")
	must(t, err)
	var log bytes.Buffer
	cmd := exec.Command(program, append([]string{"mount", "-f", s.ref, dir}, flags...)...)
	cmd.Stderr = &log
	must(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case err := <-ended:
			return dir, log.String(), err
		case <-time.After(10 * time.Millisecond):
		}
		mounts, err := os.ReadFile("/proc/self/mounts")
		must(t, err)
		if strings.Contains(string(mounts), " "+dir+" ") {
			break
		}
	}
	t.Cleanup(func() {
		run(t, "umount", dir)
		if err := <-ended; err != nil {
			t.Errorf("mount: %v\n%s", err, log.String())
		}
	})
	return dir, "", nil
}

// mounted is mount where it is to succeed.
func mounted(t *testing.T, s *sample, flags ...string) string {
	t.Helper()
	dir, stderr, err := mount(t, s, flags...)
	if err != nil {
		t.Fatalf("mount %v: %v\n%s", flags, err, stderr)
	}
	return dir
}

// notMounted is mount where it is to be refused with all of texts.
func notMounted(t *testing.T, s *sample, flags []string, texts ...string) {
	t.Helper()
	_, stderr, err := mount(t, s, flags...)
	expectRefused(t, "mount "+strings.Join(flags, " "), stderr, err, texts...)
}

func TestMountSealed(t *testing.T) {
	t.Parallel()
	s := build(t, t.TempDir())
	s.enable(t)
	d := s.digest.String()
	for _, flags := range [][]string{{"-d", d}, {"--digest", d, "--verity=require"}, {"-d", d, "--verity=hash"}} {
		s.expectTree(t, mounted(t, s, flags...))
	}
	compressed := build(t, t.TempDir(), "--compression")
	compressed.enable(t)
	compressed.expectTree(t, mounted(t, compressed, "-d", compressed.digest.String()))
}

// TestMountInBackground: the command comes back when the image can be read.
func TestMountInBackground(t *testing.T) {
	t.Parallel()
	s := build(t, t.TempDir())
	s.enable(t)
	dir := t.TempDir()
	run(t, "mount", "-d", s.digest.String(), s.layout, "v1", dir)
	s.expectTree(t, dir)
	run(t, "umount", dir)
}

// TestMountRefuses: an image that is not the one of the digest, or of which a blob is not sealed.
func TestMountRefuses(t *testing.T) {
	t.Parallel()
	wrong := strings.Repeat("12", 32)
	t.Run("wrong digest", func(t *testing.T) {
		s := build(t, t.TempDir())
		s.enable(t)
		for _, mode := range []string{"auto", "require", "hash"} {
			notMounted(t, s, []string{"-d", wrong, "--verity=" + mode}, wrong, s.digest.String())
		}
	})
	t.Run("not sealed", func(t *testing.T) {
		s := build(t, t.TempDir())
		command := "csi-puzzlefs enable-fs-verity " + s.ref + " " + s.digest.String()
		for _, mode := range []string{"auto", "require"} {
			notMounted(t, s, []string{"-d", s.digest.String(), "--verity=" + mode}, "not sealed", command)
		}
		s.expectTree(t, mounted(t, s, "-d", s.digest.String(), "--verity=hash"))
	})
	t.Run("one blob not sealed", func(t *testing.T) {
		s := build(t, t.TempDir())
		s.enable(t)
		path := s.blobOf(t, "large")
		content, err := os.ReadFile(path)
		must(t, err)
		must(t, os.Remove(path))
		must(t, os.WriteFile(path, content, 0o644))
		for _, mode := range []string{"auto", "require"} {
			notMounted(t, s, []string{"-d", s.digest.String(), "--verity=" + mode}, filepath.Base(path), "/large", "not sealed")
		}
	})
	t.Run("another file sealed under the name of a blob", func(t *testing.T) {
		s := build(t, t.TempDir())
		s.enable(t)
		path := s.blobOf(t, "large")
		must(t, os.Remove(path))
		must(t, os.WriteFile(path, []byte("something else"), 0o644))
		sealAs(t, path, unix.FS_VERITY_HASH_ALG_SHA256, nil)
		notMounted(t, s, []string{"-d", s.digest.String()}, filepath.Base(path), "/large", "is damaged")
	})
}

// TestMountWithoutVerity: where the file system has no fs-verity, the image is checked by hashing, unless
// the kernel is insisted on.
func TestMountWithoutVerity(t *testing.T) {
	t.Parallel()
	s := build(t, plainDir(t))
	s.expectTree(t, mounted(t, s, "-d", s.digest.String()))
	notMounted(t, s, []string{"-d", s.digest.String(), "--verity=require"}, s.layout, "no fs-verity here", "--verity=auto")
	notMounted(t, s, []string{"-d", strings.Repeat("12", 32)}, s.digest.String())

	// What is damaged is noticed when it is read.
	path := s.blobOf(t, "large")
	content, err := os.ReadFile(path)
	must(t, err)
	content[5000] ^= 1
	must(t, os.WriteFile(path, content, 0o644))
	dir := mounted(t, s, "-d", s.digest.String())
	expectEIO(t, dir)
}

// TestMountOnOverlay: overlayfs does not tell of the seals of the files below it, as in a container. The
// image is checked by hashing then.
func TestMountOnOverlay(t *testing.T) {
	t.Parallel()
	lower, upper, merged := t.TempDir(), plainDir(t), t.TempDir()
	s := build(t, lower)
	s.enable(t)
	for _, dir := range []string{"upper", "work"} {
		must(t, os.Mkdir(filepath.Join(upper, dir), 0o755))
	}
	must(t, unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+lower+",upperdir="+upper+"/upper,workdir="+upper+"/work"))
	t.Cleanup(func() { must(t, unix.Unmount(merged, 0)) })
	s.layout = filepath.Join(merged, "layout")
	s.ref = s.layout + ":v1"
	s.expectTree(t, mounted(t, s, "-d", s.digest.String()))
	notMounted(t, s, []string{"-d", s.digest.String(), "--verity=require"}, s.layout, "no fs-verity here")
}

// expectEIO fails unless the file "large" cannot be read, and the others can.
func expectEIO(t *testing.T, dir string) {
	t.Helper()
	if _, err := os.ReadFile(filepath.Join(dir, "large")); !errors.Is(err, unix.EIO) {
		t.Errorf("read a file with a damaged blob: %v, want EIO", err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "greeting")); err != nil || string(b) != "hello\n" {
		t.Errorf("read another file: %q, %v", b, err)
	}
}

// TestDamageOnDisk: one bit below a sealed blob, and whoever reads the file gets EIO, from the kernel
// as from the mount; before the image is mounted and while it is.
func TestDamageOnDisk(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"before", "after"} {
		t.Run(when+" the mount", func(t *testing.T) {
			s := build(t, t.TempDir())
			s.enable(t)
			path := s.blobOf(t, "large")
			var dir string
			if when == "after" {
				dir = mounted(t, s, "-d", s.digest.String(), "--verity=require")
			}
			damageOnDisk(t, path, 9000)
			if when == "before" {
				// The seal is what is measured, not the content.
				dir = mounted(t, s, "-d", s.digest.String(), "--verity=require")
			}
			if b, err := os.ReadFile(path); !errors.Is(err, unix.EIO) {
				t.Errorf("read the blob: %d bytes, %v, want EIO", len(b), err)
			}
			expectEIO(t, dir)
			// For as long as it is damaged.
			expectEIO(t, dir)
		})
	}
}

// TestReplacedBlob: a seal keeps nobody from putting another file in the place of a blob, but its content
// is checked, too.
func TestReplacedBlob(t *testing.T) {
	t.Parallel()
	s := build(t, t.TempDir())
	s.enable(t)
	path := s.blobOf(t, "large")
	dir := mounted(t, s, "-d", s.digest.String(), "--verity=require")
	content, err := os.ReadFile(path)
	must(t, err)
	content[0] ^= 1
	must(t, os.WriteFile(path+".new", content, 0o644))
	must(t, os.Rename(path+".new", path))
	expectEIO(t, dir)
}
