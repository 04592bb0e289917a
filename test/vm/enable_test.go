package vm_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/internal/testtree"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

// TestKernelAgrees: the digest that pkg/verity computes is the kernel's, around the sizes at which a
// level of the tree begins.
func TestKernelAgrees(t *testing.T) {
	t.Parallel()
	const level1 = 128 * verity.BlockSize
	for _, size := range []int{0, 1, verity.BlockSize - 1, verity.BlockSize, verity.BlockSize + 1, level1 - 1, level1, level1 + 1, 5*level1 + 77} {
		path := filepath.Join(t.TempDir(), "file")
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(i * 7 / 5)
		}
		must(t, os.WriteFile(path, data, 0o644))
		f, err := os.Open(path)
		must(t, err)
		must(t, verity.Enable(f))
		got, err := verity.Measure(f)
		must(t, err)
		must(t, f.Close())
		if want := verity.Sum(data); got != want {
			t.Errorf("%d bytes: the kernel measures %s, Sum says %s", size, got, want)
		}
	}
}

// TestOtherAlgorithm: a file that somebody sealed with SHA-512 is no file that is not sealed.
func TestOtherAlgorithm(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(path, []byte("content"), 0o644))
	sealAs(t, path, unix.FS_VERITY_HASH_ALG_SHA512, nil)
	if d, err := measure(t, path); !errors.Is(err, verity.ErrInvalidDigest) {
		t.Errorf("Measure = %s, %v, want ErrInvalidDigest", d, err)
	}
}

// TestEnable: what is built can be sealed, the kernel measures what build printed, and to seal it
// again changes nothing.
func TestEnable(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string][]string{"plain": nil, "compressed": {"--compression"}} {
		t.Run(name, func(t *testing.T) {
			s := build(t, t.TempDir(), flags...)
			manifest := filepath.Join(s.layout, "blobs", "sha256", s.oci)
			if d, err := measure(t, manifest); !errors.Is(err, verity.ErrNotEnabled) {
				t.Fatalf("build seals: %s, %v", d, err)
			}
			n := len(s.blobs(t))
			for i, want := range []int{n, 0} {
				var result struct{ Blobs, NewlySealed, Missing int }
				must(t, json.Unmarshal([]byte(run(t, "enable-fs-verity", s.ref, s.digest.String(), "--json")), &result))
				if result.Blobs != n || result.NewlySealed != want || result.Missing != 0 {
					t.Errorf("run %d: %+v, want %d blobs, %d of them now", i+1, result, n, want)
				}
			}
			got, err := measure(t, manifest)
			must(t, err)
			if got != s.digest {
				t.Errorf("the kernel measures %s, build printed %s", got, s.digest)
			}
			for _, path := range s.blobs(t) {
				b, err := os.ReadFile(path)
				must(t, err)
				if got, err := measure(t, path); err != nil || got != verity.Sum(b) {
					t.Errorf("the kernel measures %s, %v for %s, want %s", got, err, path, verity.Sum(b))
				}
				if f, err := os.OpenFile(path, os.O_WRONLY, 0); !errors.Is(err, unix.EPERM) {
					_ = f.Close()
					t.Errorf("%s can be opened for writing: %v", path, err)
				}
			}
			run(t, "verify", s.ref)
		})
	}
}

// TestEnableTwoArguments: both forms, and the digest as --json prints it.
func TestEnableTwoArguments(t *testing.T) {
	t.Parallel()
	s := build(t, t.TempDir())
	out := run(t, "enable-fs-verity", s.layout, "v1", "verity:"+s.digest.String())
	if !strings.HasPrefix(out, "sealed "+s.ref+": ") {
		t.Errorf("it prints %q", out)
	}
	run(t, "enable-fs-verity", s.ref, strings.ToUpper(s.digest.String()))
}

// TestEnableAtOnce: several processes that seal one image do not disturb each other.
func TestEnableAtOnce(t *testing.T) {
	t.Parallel()
	s := build(t, t.TempDir())
	var running []*exec.Cmd
	for range 3 {
		cmd := exec.CommandContext(t.Context(), program, "enable-fs-verity", s.ref, s.digest.String())
		cmd.Stderr = os.Stderr
		must(t, cmd.Start())
		running = append(running, cmd)
	}
	for _, cmd := range running {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	for _, path := range s.blobs(t) {
		if _, err := measure(t, path); err != nil {
			t.Error(err)
		}
	}
}

// TestEnableWaits: for a program that is about to close a blob, and not for ever.
func TestEnableWaits(t *testing.T) {
	t.Parallel()
	s := build(t, t.TempDir())
	f, err := os.OpenFile(s.blobOf(t, "large"), os.O_WRONLY, 0)
	must(t, err)
	refused(t, []string{"enable-fs-verity", s.ref, s.digest.String()}, f.Name(), "open for writing; close it first")
	closed := make(chan error)
	go func() {
		time.Sleep(500 * time.Millisecond)
		closed <- f.Close()
	}()
	s.enable(t)
	must(t, <-closed)
}

// TestEnableRefuses: nothing is sealed of an image that is not as the digest says.
func TestEnableRefuses(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(t *testing.T, s *sample) []string{
		"wrong digest": func(_ *testing.T, s *sample) []string {
			right := s.digest.String()
			s.digest = verity.Sum([]byte("another"))
			return []string{right, s.digest.String(), "correct the digest or the tag"}
		},
		"damaged blob": func(t *testing.T, s *sample) []string {
			path := s.blobOf(t, "large")
			must(t, os.WriteFile(path, []byte("something else"), 0o644))
			return []string{filepath.Base(path), "/large", "is damaged", path}
		},
		"missing blob": func(t *testing.T, s *sample) []string {
			path := s.blobOf(t, "large")
			must(t, os.Remove(path))
			return []string{filepath.Base(path), "not found"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := build(t, t.TempDir())
			says := spoil(t, s)
			refused(t, []string{"enable-fs-verity", s.ref, s.digest.String()}, says...)
			for _, path := range s.blobs(t) {
				if d, err := measure(t, path); !errors.Is(err, verity.ErrNotEnabled) {
					t.Errorf("%s is sealed: %s, %v", path, d, err)
				}
			}
		})
	}
}

// TestEnableWithoutVerity: what to do about a file system that has no fs-verity.
func TestEnableWithoutVerity(t *testing.T) {
	t.Parallel()
	s := build(t, plainDir(t))
	refused(t, []string{"enable-fs-verity", s.ref, s.digest.String()}, s.layout, "no fs-verity here", "tune2fs -O verity", "--verity=hash")
}

// TestBadSeal: a blob that somebody sealed with a salt is as good as any, but has another digest for ever.
func TestBadSeal(t *testing.T) {
	t.Parallel()
	s := build(t, t.TempDir())
	path := s.blobOf(t, "large")
	sealAs(t, path, unix.FS_VERITY_HASH_ALG_SHA256, []byte("12345678"))
	refused(t, []string{"enable-fs-verity", s.ref, s.digest.String()}, "is good, but sealed with", "remove "+path)
	must(t, os.Remove(path))
	s.rebuild(t)
	s.enable(t)
}

// TestReferenceImages: what the reference made can be sealed, in all versions, but for compressed images: it
// gives the chunks that it stores raw the digest of other bytes.
func TestReferenceImages(t *testing.T) {
	t.Parallel()
	digests := map[string]string{
		"v1-git:small":         "8ca8e0cba572635eac0d55f35770e05a1c05061bab7772468ef052fc82c0e418",
		"v1-git:changed":       "32b8c7ac651af7f3c69bb5098396ead727bb461b621d3780815cfb6627e6cfc2",
		"v2-0.1.0:changed":     "f5cc6d5417986d0120dda642cc87c701c92dfddd176994b524306254c82d6198",
		"v3-0.2.0:changed":     "0d2ea38671ae1c43b86dbb271c7a6285645a017cbf0f0587d284bb8ed6dd3877",
		"v3-master:small":      "c538c09bd36d5b265077e224a31708ca5943c0c19e96e620581d624604b08b30",
		"v3-master:segments":   "b1d4235b953628423b7f0a3679caa9fb1870fded697a4c43d688b1c6be94e21f",
		"v3-0.2.0:small-zstd":  "db6aa994b28685c4ba783e6cbea698081fafa96dac65083191e9660f41348f4a",
		"v3-master:small-zstd": "2729715fea78649efbbe633361892b6561875161a8010ecc8bd0436b6b117d8a",
	}
	for image, digest := range digests {
		t.Run(image, func(t *testing.T) {
			name, tag, _ := strings.Cut(image, ":")
			dir := filepath.Join(t.TempDir(), name)
			must(t, os.CopyFS(dir, os.DirFS(testtree.Golden(t, "images/"+name))))
			args := []string{"enable-fs-verity", dir + ":" + tag, digest}
			if tag == "small-zstd" {
				refused(t, args, "is good and has the fs-verity digest", "stores raw because they do not compress", "build it again")
				return
			}
			run(t, args...)
			run(t, args...)
		})
	}
}
