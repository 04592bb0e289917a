package format_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
)

const images = "../../testdata/images"

func readBlob(t testing.TB, layout string, d format.Digest) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(images, layout, "blobs", "sha256", d.Hex()))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// entries returns tag and digest of each entry of a layout's index, old or new.
func entries(t testing.TB, layout string) map[string]format.Digest {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(images, layout, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var index struct{ Manifests []format.Descriptor }
	if err := json.Unmarshal(b, &index); err != nil {
		t.Fatal(err)
	}
	tags := make(map[string]format.Digest)
	for _, d := range index.Manifests {
		tags[d.Annotations[format.AnnotationRefName]] = d.Digest
	}
	if len(tags) != 4 {
		t.Fatalf("%s has the tags %v, want 4", layout, tags)
	}
	return tags
}

// Every rootfs of version 3 that the reference wrote is encoded again byte for byte.
func TestEncodeIsIdenticalToTheReference(t *testing.T) {
	for _, layout := range []string{"v3-0.2.0", "v3-master"} {
		for tag, digest := range entries(t, layout) {
			t.Run(layout+" "+tag, func(t *testing.T) {
				manifestBytes := readBlob(t, layout, digest)
				m, err := format.ParseManifest(manifestBytes)
				if err != nil {
					t.Fatal(err)
				}
				again, err := m.Encode()
				if err != nil || !bytes.Equal(again, manifestBytes) {
					t.Errorf("manifest: %v\n%s", err, cmp.Diff(string(manifestBytes), string(again)))
				}
				d, err := m.Rootfs()
				if err != nil {
					t.Fatal(err)
				}
				want := readBlob(t, layout, d.Digest)
				r, err := format.DecodeRootfs(want)
				if err != nil {
					t.Fatal(err)
				}
				got, err := format.EncodeRootfs(r)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("rootfs of %d bytes is encoded as %d other bytes; first difference at %d", len(want), len(got), firstDifference(got, want))
				}
			})
		}
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// Versions 1 and 2 hold the same trees; decoded they must equal version 3's but for the
// fs-verity data, which names the metadata blobs too.
func TestOldVersionsDecodeToTheSameInodes(t *testing.T) {
	for layout, version := range map[string]format.Version{"v1-git": format.Version1, "v2-0.1.0": format.Version2} {
		newTags := entries(t, "v3-master")
		for tag, digest := range entries(t, layout) {
			if tag == "small-zstd" {
				continue // compressed blobs differ between the versions
			}
			t.Run(layout+" "+tag, func(t *testing.T) {
				r, err := format.DecodeRootfs(readBlob(t, layout, digest))
				if err != nil {
					t.Fatal(err)
				}
				if r.Version != version {
					t.Fatalf("version %d, want %d", r.Version, version)
				}
				m, err := format.ParseManifest(readBlob(t, "v3-master", newTags[tag]))
				if err != nil {
					t.Fatal(err)
				}
				d, err := m.Rootfs()
				if err != nil {
					t.Fatal(err)
				}
				want, err := format.DecodeRootfs(readBlob(t, "v3-master", d.Digest))
				if err != nil {
					t.Fatal(err)
				}
				if len(r.Metadatas) != len(want.Layers) {
					t.Fatalf("%d layers, want %d", len(r.Metadatas), len(want.Layers))
				}
				for i, ref := range r.Metadatas {
					inodes, err := format.DecodeInodeVector(readBlob(t, layout, ref.Digest), version)
					if err != nil {
						t.Fatal(err)
					}
					if diff := cmp.Diff(want.Layers[i], inodes); diff != "" {
						t.Errorf("layer %d (-version 3 +version %d):\n%s", i, version, diff)
					}
				}
				verity := make(map[format.Digest][32]byte)
				for _, v := range r.Verity {
					verity[v.Digest] = v.Verity
				}
				for _, v := range want.Verity {
					if verity[v.Digest] != v.Verity {
						t.Errorf("no fs-verity data for %s", v.Digest)
					}
				}
			})
		}
	}
}

// The worked example of the reference's 0.1.0 README, as the README prints it.
func TestReadmeExample(t *testing.T) {
	rootfs, err := os.ReadFile("../../testdata/readme-example/rootfs.bin")
	if err != nil {
		t.Fatal(err)
	}
	metadata, err := os.ReadFile("../../testdata/readme-example/metadata.bin")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := format.DigestOf(rootfs).Hex(), "0efa2a4b490abb02a5b9b5f2d43c8262643dba48c67f14b236df0a6f1ea745d8"; got != want {
		t.Errorf("rootfs digest %s, want %s", got, want)
	}
	r, err := format.DecodeRootfs(rootfs)
	if err != nil {
		t.Fatal(err)
	}
	if r.Version != format.Version1 || len(r.Metadatas) != 1 || r.Metadatas[0].Digest != format.DigestOf(metadata) {
		t.Errorf("rootfs %+v does not name the metadata blob %s", r, format.DigestOf(metadata))
	}
	inodes, err := format.DecodeInodeVector(metadata, r.Version)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, i := range inodes {
		line := fmt.Sprintf("%d %s", i.Ino, i.Kind)
		for _, e := range i.Entries {
			line += fmt.Sprintf(" %s=%d", e.Name, e.Ino)
		}
		for _, c := range i.Chunks {
			line += fmt.Sprintf(" %s+%d:%d", c.Blob.Digest.Hex()[:8], c.Blob.Offset, c.Len)
		}
		lines = append(lines, line)
	}
	want := []string{
		"1 directory algorithms=2 lorem_ipsum.txt=3",
		"2 directory binary-search.txt=4",
		"3 file ef204427+0:865",
		"4 file ef204427+865:278",
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Errorf("inodes (-want +got):\n%s", diff)
	}
}

// sample has every kind of inode and every optional field.
func sample() *format.Rootfs {
	digest := format.DigestOf([]byte("chunk"))
	return &format.Rootfs{
		Version: format.Version3,
		Layers: []format.InodeVector{{
			{Ino: 1, Kind: format.KindDir, Perm: 0o755, Entries: []format.DirEntry{{Ino: 2, Name: []byte("a")}, {Ino: 3, Name: []byte("\xff\n")}}},
			{
				Ino: 2, Kind: format.KindFile, Perm: 0o4755, UID: 1, GID: 1<<32 - 1, Chunks: []format.FileChunk{{Blob: format.BlobRef{Digest: digest, Offset: 3, Compressed: true}, Len: 9}},
				Xattrs: []format.Xattr{{Key: []byte("user.empty"), Val: []byte{}}, {Key: []byte("user.k"), Val: []byte("v")}},
			},
			{Ino: 3, Kind: format.KindSymlink, Perm: 0o777, Symlink: []byte("/else/where")},
			{Ino: 4, Kind: format.KindChr, Perm: 0o600, Major: 5, Minor: 1},
			{Ino: 5, Kind: format.KindBlk, Major: 7, Minor: 1 << 19},
			{Ino: 6, Kind: format.KindFifo},
			{Ino: 7, Kind: format.KindSocket},
			{Ino: 8, Kind: format.KindWhiteout, Perm: 0o644},
			{Ino: 9, Kind: format.KindUnknown},
			{Ino: 10, Kind: format.KindDir, LookBelow: true, Entries: []format.DirEntry{}},
			{Ino: 11, Kind: format.KindFile, Chunks: []format.FileChunk{}},
		}},
		Verity: []format.VerityData{{Digest: digest, Verity: [32]byte{1}}},
	}
}

func TestRoundTrip(t *testing.T) {
	want := sample()
	b, err := format.EncodeRootfs(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := format.DecodeRootfs(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-encoded +decoded):\n%s", diff)
	}
}

func TestEncodeRefusesWhatCannotBeRead(t *testing.T) {
	for name, change := range map[string]func(*format.InodeVector){
		"name with slash":      func(v *format.InodeVector) { (*v)[0].Entries[0].Name = []byte("../x") },
		"name dotdot":          func(v *format.InodeVector) { (*v)[0].Entries[0].Name = []byte("..") },
		"empty name":           func(v *format.InodeVector) { (*v)[0].Entries[0].Name = nil },
		"long name":            func(v *format.InodeVector) { (*v)[0].Entries[0].Name = bytes.Repeat([]byte("x"), 256) },
		"entry without inode":  func(v *format.InodeVector) { (*v)[0].Entries[0].Ino = 0 },
		"inode zero":           func(v *format.InodeVector) { (*v)[0].Ino = 0 },
		"permissions":          func(v *format.InodeVector) { (*v)[0].Perm = 0o10000 },
		"chunk overflow":       func(v *format.InodeVector) { (*v)[1].Chunks[0].Blob.Offset = 1<<63 - 1 },
		"symlink lacks target": func(v *format.InodeVector) { (*v)[2].Symlink = nil },
		"target with NUL":      func(v *format.InodeVector) { (*v)[2].Symlink = []byte("a\x00b") },
		"xattr without name":   func(v *format.InodeVector) { (*v)[1].Xattrs[0].Key = nil },
		"huge xattr":           func(v *format.InodeVector) { (*v)[1].Xattrs[0].Val = make([]byte, 65537) },
		"device number":        func(v *format.InodeVector) { (*v)[3].Major = 1 << 32 },
		"kind":                 func(v *format.InodeVector) { (*v)[5].Kind = 77 },
	} {
		r := sample()
		change(&r.Layers[0])
		if _, err := format.EncodeRootfs(r); !errors.Is(err, format.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", name, err)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	good, err := format.EncodeRootfs(sample())
	if err != nil {
		t.Fatal(err)
	}
	version := bytes.Clone(good)
	at := bytes.Index(version, []byte{3, 0, 0, 0, 0, 0, 0, 0})
	version[at] = 9
	// The one segment of good, and 1000 empty ones.
	segments := append([]byte{0xe8, 3, 0, 0}, good[4:8]...)
	segments = append(append(segments, make([]byte, 4000)...), good[8:]...)
	unsorted := sample()
	unsorted.Layers[0][1], unsorted.Layers[0][2] = unsorted.Layers[0][2], unsorted.Layers[0][1]
	bad, err := format.EncodeRootfs(unsorted)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		b    []byte
		want error
	}{
		{"nothing", nil, format.ErrCorrupt},
		{"truncated", good[:len(good)-8], format.ErrCorrupt},
		{"odd length", good[:len(good)-3], format.ErrCorrupt},
		{"trailing bytes", append(bytes.Clone(good), make([]byte, 8)...), format.ErrCorrupt},
		{"zeros", make([]byte, 64), format.ErrCorrupt},
		{"a billion segments", append([]byte{0xff, 0xff, 0xff, 0x3f}, make([]byte, 60)...), format.ErrCorrupt},
		{"a thousand empty segments", segments, format.ErrCorrupt},
		{"version 9", version, format.ErrUnsupportedVersion},
		{"unsorted inodes", bad, format.ErrCorrupt},
	}
	for _, tt := range tests {
		if _, err := format.DecodeRootfs(tt.b); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	// Every prefix and every flipped bit ends in an error or a value, never in a panic.
	for i := range good {
		_, _ = format.DecodeRootfs(good[:i])
		flipped := bytes.Clone(good)
		flipped[i] ^= 1 << (i % 8)
		_, _ = format.DecodeRootfs(flipped)
	}
}

// A composite list of empty structs takes no space however long it says it is.
func TestDecodeBoundsAllocation(t *testing.T) {
	words := []uint64{
		0 | 6<<32,            // one segment of 6 words
		0<<2 | 1<<32 | 2<<48, // root: struct with one data word, two pointers
		3,                    // version 3
		1<<2 | 1 | 7<<32,     // metadatas: composite list, no words, tag follows the next pointer
		0,                    // no verity data
		(1 << 29) << 2,       // tag: 2^29 structs of size 0
		0,                    //
	}
	var b []byte
	for _, w := range words {
		for k := range 8 {
			b = append(b, byte(w>>(8*k)))
		}
	}
	if _, err := format.DecodeRootfs(b); !errors.Is(err, format.ErrCorrupt) {
		t.Errorf("%v, want ErrCorrupt", err)
	}
}

func TestParseManifestRefuses(t *testing.T) {
	const empty = `"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2`
	const config = `"config":{` + empty + `}`
	const rootfs = `{"mediaType":"` + format.MediaTypeRootfs + `",` + empty + `}`
	if _, err := format.ParseManifest([]byte(`{"schemaVersion":2,` + config + `,"layers":[` + rootfs + `]}`)); err != nil {
		t.Fatalf("the manifest that the others spoil: %v", err)
	}
	tests := []struct {
		name, json string
		want       error
	}{
		{"nothing", "", format.ErrCorrupt},
		{"html", "<html>", format.ErrCorrupt},
		{"array", "[]", format.ErrCorrupt},
		{"index", `{"schemaVersion":2,"manifests":[]}`, format.ErrNotPuzzleFS},
		{"docker manifest", `{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","layers":[{"mediaType":"x"}]}`, format.ErrNotPuzzleFS},
		{"container image", `{"schemaVersion":2,"config":{"digest":"sha512:00"},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"x","size":1}]}`, format.ErrNotPuzzleFS},
		{"no layers", `{"schemaVersion":2,"layers":[]}`, format.ErrNotPuzzleFS},
		{"schema 1", `{"schemaVersion":1}`, format.ErrCorrupt},
		{"bad digest", `{"schemaVersion":2,"layers":[{"mediaType":"` + format.MediaTypeRootfs + `","digest":"sha256:xyz","size":1}]}`, format.ErrCorrupt},
		{"negative size", `{"schemaVersion":2,"config":{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},"layers":[{"mediaType":"` + format.MediaTypeRootfs + `","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":-1}]}`, format.ErrCorrupt},
		{"trailing", `{"schemaVersion":2} {}`, format.ErrCorrupt},
		{"layers are no list", `{"schemaVersion":2,"layers":{}}`, format.ErrCorrupt},
		{"layers are null", `{"schemaVersion":2,"layers":null}`, format.ErrNotPuzzleFS},
		{"layer without a digest", `{"schemaVersion":2,` + config + `,"layers":[` + rootfs + `,{}]}`, format.ErrCorrupt},
		{"layer with the digest null", `{"schemaVersion":2,` + config + `,"layers":[` + rootfs + `,{"digest":null}]}`, format.ErrCorrupt},
		{"no config", `{"schemaVersion":2,"layers":[` + rootfs + `]}`, format.ErrCorrupt},
		{"two rootfs", `{"schemaVersion":2,` + config + `,"layers":[` + rootfs + `,` + rootfs + `]}`, format.ErrCorrupt},
	}
	for _, tt := range tests {
		if _, err := format.ParseManifest([]byte(tt.json)); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
}

func TestParseDigest(t *testing.T) {
	d := format.DigestOf([]byte("x"))
	if got, err := format.ParseDigest(d.String()); err != nil || got != d {
		t.Errorf("ParseDigest(%s) = %s, %v", d, got, err)
	}
	for _, s := range []string{"", "sha256:", d.Hex(), "sha512:" + d.Hex(), d.String() + "0", "sha256:../../../../etc/passwd", "sha256:" + "A" + d.Hex()[1:], "sha256:" + strings.Repeat("0", 64)} {
		if _, err := format.ParseDigest(s); !errors.Is(err, format.ErrCorrupt) {
			t.Errorf("ParseDigest(%q): %v, want ErrCorrupt", s, err)
		}
	}
}

// TestLimits: metadata is refused before it takes more than the caller allows, in one message
// or in several.
func TestLimits(t *testing.T) {
	inode := func(n uint64, chunks int) format.Inode {
		i := format.Inode{Ino: n, Kind: format.KindFile, Perm: 0o644}
		for range chunks {
			i.Chunks = append(i.Chunks, format.FileChunk{Blob: format.BlobRef{Digest: format.DigestOf(nil)}, Len: 1})
		}
		return i
	}
	encode := func(layers ...format.InodeVector) []byte {
		t.Helper()
		b, err := format.EncodeRootfs(&format.Rootfs{Version: format.Version3, Layers: layers})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	three := encode(format.InodeVector{inode(1, 0), inode(2, 0)}, format.InodeVector{inode(1, 0)})
	large := encode(format.InodeVector{inode(1, 10_000)})
	for _, tt := range []struct {
		name    string
		limits  format.Limits
		message []byte
		times   int
		want    error
	}{
		{"no limits", format.Limits{}, large, 3, nil},
		{"as many inodes as there may be", format.Limits{Inodes: 3}, three, 1, nil},
		{"one more", format.Limits{Inodes: 2}, three, 1, format.ErrTooManyInodes},
		{"one more in all messages", format.Limits{Inodes: 5}, three, 2, format.ErrTooManyInodes},
		{"enough memory", format.Limits{Memory: 1 << 20}, large, 1, nil},
		{"not for two", format.Limits{Memory: 1 << 20}, large, 2, format.ErrTooMuchMemory},
		{"too little", format.Limits{Memory: 100 << 10}, large, 1, format.ErrTooMuchMemory},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var err error
			for range tt.times {
				_, err = tt.limits.DecodeRootfs(tt.message)
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}
