package seal_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/builder"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/seal"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open opens a layout for the length of the test.
func open(t *testing.T, dir string, create bool) *store.Store {
	t.Helper()
	s, err := store.Open(store.Config{Dir: dir, Create: create})
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// golden returns a copy of a layout that the reference made.
func golden(t *testing.T, name string) *store.Store {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	must(t, os.CopyFS(dir, os.DirFS(filepath.Join("..", "..", "testdata", "images", name))))
	return open(t, dir, false)
}

// config says what to check of a tag, and that the right digest is given.
func config(t *testing.T, s *store.Store, tag string, mode seal.Mode) seal.Config {
	t.Helper()
	root, err := s.Resolve(tag)
	must(t, err)
	b, err := s.Get(t.Context(), root.Digest, 1<<20)
	must(t, err)
	return seal.Config{Store: s, Root: root, Digest: verity.Sum(b), Mode: mode}
}

// build builds an image of files with that content and returns its store, with the tag "v1".
func build(t *testing.T, contents ...string) *store.Store {
	t.Helper()
	tree := t.TempDir()
	for i, content := range contents {
		must(t, os.WriteFile(filepath.Join(tree, string(rune('a'+i))), []byte(content), 0o644))
	}
	s := open(t, t.TempDir(), true)
	_, err := builder.Build(t.Context(), builder.Config{Dir: tree, Store: s, Tag: "v1"})
	must(t, err)
	return s
}

func parts(t *testing.T, cfg seal.Config) *image.Parts {
	t.Helper()
	p, err := image.ReadParts(t.Context(), image.Config{Source: cfg.Store, Root: cfg.Root})
	must(t, err)
	return p
}

func blobPath(s *store.Store, d format.Digest) string {
	return filepath.Join(s.Dir(), "blobs", "sha256", d.Hex())
}

// damage flips a bit in the middle of a blob.
func damage(t *testing.T, s *store.Store, d format.Digest) {
	t.Helper()
	b, err := os.ReadFile(blobPath(s, d))
	must(t, err)
	b[len(b)/2] ^= 1
	must(t, os.WriteFile(blobPath(s, d), b, 0o644))
}

// hasVerity reports whether the file system of temporary files has fs-verity. In a machine that is
// started for it (make test-vm) it must.
func hasVerity(t *testing.T) bool {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "probe"))
	must(t, err)
	defer f.Close()
	_, err = verity.Measure(f)
	has := errors.Is(err, verity.ErrNotEnabled)
	if !has && !errors.Is(err, verity.ErrNotSupported) {
		t.Fatal(err)
	}
	if !has && os.Getenv("REQUIRE_FSVERITY") == "1" {
		t.Fatalf("REQUIRE_FSVERITY is 1: %v", err)
	}
	return has
}

var tags = []string{"small", "changed", "small-zstd", "segments"}

// TestHashGolden: images of the reference, of all versions, pass in user space with the digest that it
// printed.
func TestHashGolden(t *testing.T) {
	printed := map[string]string{
		"v1-git/small":    "8ca8e0cba572635eac0d55f35770e05a1c05061bab7772468ef052fc82c0e418",
		"v2-0.1.0/small":  "4c5f5f0e65371e46d0fe0844ca9b60952310cf6d34f67041e1c3b99503d40994",
		"v3-0.2.0/small":  "c538c09bd36d5b265077e224a31708ca5943c0c19e96e620581d624604b08b30",
		"v3-master/small": "c538c09bd36d5b265077e224a31708ca5943c0c19e96e620581d624604b08b30",
	}
	for _, layout := range []string{"v1-git", "v2-0.1.0", "v3-0.2.0", "v3-master"} {
		for _, tag := range tags {
			t.Run(layout+"/"+tag, func(t *testing.T) {
				cfg := config(t, golden(t, layout), tag, seal.Hash)
				if want := printed[layout+"/"+tag]; want != "" && cfg.Digest.String() != want {
					t.Fatalf("the manifest has the digest %s, the reference printed %s", cfg.Digest, want)
				}
				p := parts(t, cfg)
				got, err := seal.Check(t.Context(), cfg)
				must(t, err)
				if got.Hashed != 1+len(p.Metadata) || got.Deferred != len(p.Data) || got.Kernel != 0 {
					t.Errorf("report %+v, want %d hashed and %d deferred", got, 1+len(p.Metadata), len(p.Data))
				}
				if len(p.Metadata) == 0 || len(p.Data) == 0 {
					t.Errorf("%d metadata blobs and %d data blobs, want some of both", len(p.Metadata), len(p.Data))
				}
			})
		}
	}
}

// TestWrongDigest: in whatever mode, and before anything is sealed.
func TestWrongDigest(t *testing.T) {
	given := verity.Sum([]byte("another manifest"))
	for _, mode := range []seal.Mode{seal.Auto, seal.Require, seal.Hash} {
		cfg := config(t, build(t, "content"), "v1", mode)
		right := cfg.Digest
		cfg.Digest = given
		for name, call := range map[string]func(context.Context, seal.Config) (seal.Report, error){"Check": seal.Check, "Enable": seal.Enable} {
			_, err := call(t.Context(), cfg)
			if !errors.Is(err, seal.ErrMismatch) {
				t.Errorf("%s, %v: %v, want ErrMismatch", name, mode, err)
				continue
			}
			for _, want := range []string{right.String(), given.String(), cfg.Root.Digest.String()} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%s, %v: %q does not say %s", name, mode, err, want)
				}
			}
		}
		expectUnsealed(t, cfg)
	}
}

// expectUnsealed fails if any blob of the layout is sealed.
func expectUnsealed(t *testing.T, cfg seal.Config) {
	t.Helper()
	for d, err := range cfg.Store.Blobs() {
		must(t, err)
		f, err := cfg.Store.OpenBlob(d)
		must(t, err)
		if v, err := verity.Measure(f); err == nil {
			t.Errorf("blob %s is sealed with %s", d, v)
		}
		_ = f.Close()
	}
}

// TestModes: what is demanded of a file system that has fs-verity, and of one that has not.
func TestModes(t *testing.T) {
	has := hasVerity(t)
	s := build(t, "one", "two")
	cfg := config(t, s, "v1", seal.Auto)
	check := func(mode seal.Mode, want error) {
		t.Helper()
		cfg.Mode = mode
		got, err := seal.Check(t.Context(), cfg)
		if !errors.Is(err, want) {
			t.Errorf("Check, %v: %v, want %v", mode, err, want)
		}
		if err == nil && (got.Hashed != 2 || got.Deferred != 1 || got.Kernel != 0) {
			t.Errorf("Check, %v: %+v, want 2 hashed and 1 deferred", mode, got)
		}
	}
	check(seal.Hash, nil)
	if !has {
		check(seal.Auto, nil)
		check(seal.Require, verity.ErrNotSupported)
		_, err := seal.Enable(t.Context(), cfg)
		if !errors.Is(err, verity.ErrNotSupported) || !strings.Contains(err.Error(), "tune2fs") || !strings.Contains(err.Error(), s.Dir()) {
			t.Errorf("Enable: %v, want ErrNotSupported and what to do", err)
		}
		return
	}
	check(seal.Auto, verity.ErrNotEnabled)
	check(seal.Require, verity.ErrNotEnabled)
	_, err := seal.Check(t.Context(), cfg)
	if command := "csi-puzzlefs enable-fs-verity " + s.Dir() + ":v1 " + cfg.Digest.String(); err == nil || !strings.Contains(err.Error(), command) {
		t.Errorf("Check: %v, want the command %q", err, command)
	}
	for i, sealed := range []int{4, 0} {
		got, err := seal.Enable(t.Context(), cfg)
		must(t, err)
		if got.Kernel != 4 || got.Sealed != sealed || got.Missing != 0 || len(got.Warnings) != 0 {
			t.Errorf("Enable, run %d: %+v, want 4 by the kernel, %d of them new", i+1, got, sealed)
		}
	}
	for _, mode := range []seal.Mode{seal.Auto, seal.Require} {
		cfg.Mode = mode
		got, err := seal.Check(t.Context(), cfg)
		must(t, err)
		if got.Kernel != 3 || got.Hashed != 0 || got.Deferred != 0 {
			t.Errorf("Check, %v: %+v, want 3 by the kernel", mode, got)
		}
	}
	check(seal.Hash, nil)
}

// checks returns what looks at the blobs of an unsealed image.
func checks(t *testing.T) map[string]func(context.Context, seal.Config) error {
	calls := map[string]func(context.Context, seal.Config) error{
		"Check": func(ctx context.Context, cfg seal.Config) error {
			cfg.Mode = seal.Hash
			_, err := seal.Check(ctx, cfg)
			return err
		},
	}
	if hasVerity(t) {
		calls["Enable"] = func(ctx context.Context, cfg seal.Config) error {
			_, err := seal.Enable(ctx, cfg)
			return err
		}
	}
	return calls
}

// TestBroken: a chain that does not hold is refused, says which blob it is, and is not sealed.
func TestBroken(t *testing.T) {
	type broken struct {
		err  error
		says []string
	}
	for name, make := range map[string]func(t *testing.T, s *store.Store) broken{
		"no data blob": func(t *testing.T, s *store.Store) broken {
			d := parts(t, config(t, s, "v1", 0)).Data[0].Digest
			must(t, s.Remove(d))
			return broken{store.ErrNotFound, []string{d.String()}}
		},
		"no rootfs blob": func(t *testing.T, s *store.Store) broken {
			d := parts(t, config(t, s, "v1", 0)).Metadata[0].Digest
			must(t, s.Remove(d))
			return broken{store.ErrNotFound, []string{d.String()}}
		},
		"damaged rootfs blob": func(t *testing.T, s *store.Store) broken {
			d := parts(t, config(t, s, "v1", 0)).Metadata[0].Digest
			damage(t, s, d)
			return broken{store.ErrDigestMismatch, []string{d.String()}}
		},
		"no entry for a data blob": func(t *testing.T, s *store.Store) broken {
			d := forge(t, s, func(r *format.Rootfs) { r.Verity = nil }, nil)
			return broken{seal.ErrMismatch, []string{"no fs-verity digest", d.String(), "/a"}}
		},
		"wrong annotation": func(t *testing.T, s *store.Store) broken {
			forge(t, s, func(*format.Rootfs) {}, func(m *format.Manifest) {
				m.Layers[0].Annotations[format.AnnotationVerity] = strings.Repeat("12", 32)
			})
			return broken{seal.ErrMismatch, []string{"rootfs blob", strings.Repeat("12", 32)}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			for call, check := range checks(t) {
				s := build(t, "one")
				want := make(t, s)
				cfg := config(t, s, "v1", 0)
				err := check(t.Context(), cfg)
				if !errors.Is(err, want.err) {
					t.Errorf("%s: %v, want %v", call, err, want.err)
					continue
				}
				for _, text := range want.says {
					if !strings.Contains(err.Error(), text) {
						t.Errorf("%s: %q does not say %q", call, err, text)
					}
				}
				expectUnsealed(t, cfg)
			}
		})
	}
}

// forge gives the tag "v1" to an image with other metadata and returns the first data blob.
func forge(t *testing.T, s *store.Store, rootfs func(*format.Rootfs), manifest func(*format.Manifest)) format.Digest {
	t.Helper()
	cfg := config(t, s, "v1", 0)
	p := parts(t, cfg)
	b, err := s.Get(t.Context(), p.Metadata[0].Digest, 1<<20)
	must(t, err)
	r, err := format.DecodeRootfs(b)
	must(t, err)
	rootfs(r)
	b, err = format.EncodeRootfs(r)
	must(t, err)
	must(t, s.Put(b, format.Digest{}))
	old, err := s.Get(t.Context(), cfg.Root.Digest, 1<<20)
	must(t, err)
	m, err := format.ParseManifest(old)
	must(t, err)
	m = format.NewManifest(format.Descriptor{Digest: format.DigestOf(b), Size: int64(len(b))}, verity.Sum(b), m.Layers[1:])
	if manifest != nil {
		manifest(m)
	}
	b, err = m.Encode()
	must(t, err)
	must(t, s.Put(b, format.Digest{}))
	must(t, s.Tag("v1", format.Descriptor{Digest: format.DigestOf(b), Size: int64(len(b)), MediaType: format.MediaTypeManifest}))
	return p.Data[0].Digest
}

// TestShadowed: blobs that only deleted files need may be missing.
func TestShadowed(t *testing.T) {
	cfg := config(t, golden(t, "v3-master"), "changed", seal.Hash)
	p := parts(t, cfg)
	if len(p.Shadowed) == 0 {
		t.Fatal("the delta shadows no blob")
	}
	for _, gone := range p.Shadowed {
		must(t, cfg.Store.Remove(gone.Digest))
	}
	_, err := seal.Check(t.Context(), cfg)
	must(t, err)
	if !hasVerity(t) {
		return
	}
	got, err := seal.Enable(t.Context(), cfg)
	must(t, err)
	if got.Missing != len(p.Shadowed) {
		t.Errorf("Enable: %+v, want %d missing", got, len(p.Shadowed))
	}
	cfg.Mode = seal.Require
	_, err = seal.Check(t.Context(), cfg)
	must(t, err)
}

func TestConfig(t *testing.T) {
	cfg := config(t, build(t, "x"), "v1", seal.Hash)
	for name, spoil := range map[string]func(*seal.Config){
		"no store":     func(c *seal.Config) { c.Store = nil },
		"no digest":    func(c *seal.Config) { c.Digest = verity.Digest{} },
		"unknown mode": func(c *seal.Config) { c.Mode = 7 },
	} {
		bad := cfg
		spoil(&bad)
		if _, err := seal.Check(t.Context(), bad); !errors.Is(err, seal.ErrConfig) {
			t.Errorf("%s: %v, want ErrConfig", name, err)
		}
		if _, err := seal.Enable(t.Context(), bad); !errors.Is(err, seal.ErrConfig) {
			t.Errorf("%s: Enable: %v, want ErrConfig", name, err)
		}
	}
}

func TestParseMode(t *testing.T) {
	for _, m := range []seal.Mode{seal.Auto, seal.Require, seal.Hash} {
		if got, err := seal.ParseMode(m.String()); err != nil || got != m {
			t.Errorf("ParseMode(%s) = %v, %v", m, got, err)
		}
	}
	for _, s := range []string{"", "AUTO", "kernel", "mode 1"} {
		if _, err := seal.ParseMode(s); !errors.Is(err, seal.ErrConfig) {
			t.Errorf("ParseMode(%q): %v, want ErrConfig", s, err)
		}
	}
}

func TestCancelled(t *testing.T) {
	cfg := config(t, build(t, "x"), "v1", seal.Hash)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, call := range map[string]func(context.Context, seal.Config) (seal.Report, error){"Check": seal.Check, "Enable": seal.Enable} {
		if _, err := call(ctx, cfg); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, want context.Canceled", name, err)
		}
	}
	expectUnsealed(t, cfg)
}

// TestPartsAreAll: no blob of a layout with one image is forgotten.
func TestPartsAreAll(t *testing.T) {
	s := build(t, strings.Repeat("0123456789abcdef", 100_000), "two", "{}")
	cfg := config(t, s, "v1", seal.Hash)
	p := parts(t, cfg)
	all := []format.Digest{p.Root.Digest, p.Config}
	for _, list := range [][]image.Part{p.Metadata, p.Data, p.Shadowed} {
		for _, part := range list {
			all = append(all, part.Digest)
		}
	}
	for d, err := range s.Blobs() {
		must(t, err)
		i := slices.Index(all, d)
		if i < 0 {
			t.Errorf("blob %s is in no list", d)
			continue
		}
		all = slices.Delete(all, i, i+1)
	}
	if len(all) > 0 {
		t.Errorf("no blobs, or listed twice: %v", all)
	}
}
