package extract_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/extract"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/store/storetest"
)

// memory is a Source of images that are made by hand.
type memory struct {
	blobs map[format.Digest][]byte
	hook  func(ctx context.Context, d format.Digest)
}

func (m *memory) put(b []byte) format.Digest {
	d := format.DigestOf(b)
	m.blobs[d] = b
	return d
}

func (m *memory) Size(d format.Digest) (int64, error) { return int64(len(m.blobs[d])), nil }

func (m *memory) Get(ctx context.Context, d format.Digest, _ int64) ([]byte, error) {
	if m.hook != nil {
		m.hook(ctx, d)
	}
	b, ok := m.blobs[d]
	if !ok {
		return nil, store.ErrNotFound
	}
	return b, nil
}

func (m *memory) ReadWhole(ctx context.Context, reads []store.WholeRead) error {
	return storetest.ReadWhole(ctx, reads, m.Get)
}

func (m *memory) ReadBlobAt(ctx context.Context, d format.Digest, p []byte, off int64) (int, error) {
	b, err := m.Get(ctx, d, 0)
	if err != nil {
		return 0, err
	}
	return bytes.NewReader(b).ReadAt(p, off)
}

// open opens an image of the inodes.
func (m *memory) open(t *testing.T, inodes format.InodeVector) *image.Image {
	t.Helper()
	b, err := format.EncodeRootfs(&format.Rootfs{Layers: []format.InodeVector{inodes}})
	if err != nil {
		t.Fatal(err)
	}
	im, err := image.Open(t.Context(), image.Config{Source: m, Root: format.Descriptor{MediaType: format.MediaTypeRootfs, Digest: m.put(b)}})
	if err != nil {
		t.Fatal(err)
	}
	return im
}

func dir(ino uint64, list ...format.DirEntry) format.Inode {
	return format.Inode{Ino: ino, Kind: format.KindDir, Perm: 0o755, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Entries: list}
}

func entry(name string, ino uint64) format.DirEntry {
	return format.DirEntry{Ino: ino, Name: []byte(name)}
}

func file(ino uint64, content format.Digest) format.Inode {
	return format.Inode{Ino: ino, Kind: format.KindFile, Perm: 0o644, Chunks: []format.FileChunk{{Blob: format.BlobRef{Digest: content}, Len: 1}}}
}

// The first failure ends the extraction, not the last name.
func TestFailsAtOnce(t *testing.T) {
	const n = 2000
	m := &memory{blobs: make(map[format.Digest][]byte)}
	slow, missing := m.put([]byte("s")), format.DigestOf([]byte("missing"))
	target := filepath.Join(t.TempDir(), "out")
	made := -1
	started := make(chan struct{})
	m.hook = func(ctx context.Context, d format.Digest) {
		switch d {
		case missing:
			<-started
			return
		case slow:
			close(started)
		default:
			return
		}
		<-ctx.Done()
		names, err := os.ReadDir(target)
		if err != nil {
			t.Error(err)
		}
		made = len(names)
	}
	top := dir(1, entry("a", 2), entry("b", 3))
	layer := format.InodeVector{{}, file(2, missing), file(3, slow)}
	for i := range uint64(n) {
		top.Entries = append(top.Entries, entry(fmt.Sprintf("c%d", i), i+4))
		layer = append(layer, format.Inode{Ino: i + 4, Kind: format.KindFile})
	}
	layer[0] = top
	im := m.open(t, layer)
	_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: target, Workers: 2})
	if !errors.Is(err, store.ErrNotFound) {
		t.Errorf("%v, want ErrNotFound", err)
	}
	if made < 0 || made >= n {
		t.Errorf("%d of %d names were made before the failure was noticed", made, n)
	}
}

// A device number that the kernel would cut short would be that of another device.
func TestDeviceNumbers(t *testing.T) {
	m := &memory{blobs: make(map[format.Digest][]byte)}
	for _, device := range []format.Inode{
		{Ino: 2, Kind: format.KindChr, Major: 1 << 12, Minor: 3},
		{Ino: 2, Kind: format.KindBlk, Major: 8, Minor: 1 << 20},
	} {
		im := m.open(t, format.InodeVector{dir(1, entry("x", 2)), device})
		if _, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: filepath.Join(t.TempDir(), "out")}); !errors.Is(err, extract.ErrDevice) {
			t.Errorf("%d:%d: %v, want ErrDevice", device.Major, device.Minor, err)
		}
	}
}

// What belongs to others while the extraction goes on leads nowhere else.
func TestLinkFollowsNoSymlink(t *testing.T) {
	target := filepath.Join(t.TempDir(), "out")
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "f"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := &memory{blobs: make(map[format.Digest][]byte)}
	content, other := m.put([]byte("x")), m.put([]byte("y"))
	m.hook = func(_ context.Context, d format.Digest) {
		if d != other {
			return
		}
		err := errors.Join(os.Rename(filepath.Join(target, "d"), filepath.Join(target, "moved")), os.Symlink(outside, filepath.Join(target, "d")))
		if err != nil {
			t.Error(err)
		}
	}
	// More files than are on their way at once stand between the first name and the second.
	top := dir(1, entry("d", 2))
	layer := format.InodeVector{{}, dir(2, entry("f", 3)), file(3, content)}
	for i := range uint64(500) {
		top.Entries = append(top.Entries, entry(fmt.Sprintf("e%d", i), i+4))
		layer = append(layer, file(i+4, other))
	}
	top.Entries = append(top.Entries, entry("z", 3))
	layer[0] = top
	_, err := extract.Extract(t.Context(), extract.Config{Image: m.open(t, layer), Dir: target, Workers: 1})
	if !errors.Is(err, unix.ELOOP) {
		t.Errorf("%v, want ELOOP", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(outside, "f"), &st); err != nil || st.Nlink != 1 {
		t.Errorf("the file outside has %d names (%v), want 1", st.Nlink, err)
	}
}

// All paths of a deep tree together are large; none of them is needed.
func TestDeepTreeTakesLittleMemory(t *testing.T) {
	const n = 1500
	name := string(bytes.Repeat([]byte{'d'}, format.MaxNameLen))
	var layer format.InodeVector
	for i := range uint64(n) {
		layer = append(layer, dir(i+1, entry(name, i+2)))
	}
	m := &memory{blobs: make(map[format.Digest][]byte)}
	im := m.open(t, append(layer, dir(n+1)))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: filepath.Join(t.TempDir(), "out")}); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if got := (after.TotalAlloc - before.TotalAlloc) >> 20; got > 50 {
		t.Errorf("%d MiB were allocated", got)
	}
}

// asNobody runs the test once more as a user who is not root, in a directory that this user
// may write to.
func asNobody(t *testing.T, base string, env ...string) {
	t.Helper()
	if err := os.Chmod(filepath.Dir(base), 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(base, "test")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-test.run", "^"+t.Name()+"$")
	cmd.Dir = base
	cmd.Env = append(os.Environ(), env...)
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

const nobody = 65534

// Who is not root gets a failed extraction removed too, read-only directories and all.
func TestFailureLeavesNothingOfOtherUsers(t *testing.T) {
	const variable = "EXTRACT_TEST_TARGET"
	if target := os.Getenv(variable); target != "" {
		m := &memory{blobs: make(map[format.Digest][]byte)}
		readOnly := dir(2, entry("sub", 3))
		readOnly.Perm = 0o555
		sub := readOnly
		sub.Ino, sub.Entries = 3, []format.DirEntry{entry("f", 4)}
		im := m.open(t, format.InodeVector{dir(1, entry("a", 2), entry("b", 5)), readOnly, sub, file(4, m.put([]byte("x"))), file(5, format.DigestOf([]byte("missing")))})
		if _, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: target, Workers: 1}); !errors.Is(err, store.ErrNotFound) || errors.Is(err, os.ErrPermission) {
			t.Errorf("%v, want ErrNotFound only", err)
		}
		return
	}
	base := t.TempDir()
	for _, exists := range []bool{false, true} {
		parent := filepath.Join(base, fmt.Sprintf("exists=%v", exists))
		target := filepath.Join(parent, "out")
		if err := os.Mkdir(parent, 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(parent, 0o777); err != nil {
			t.Fatal(err)
		}
		if exists {
			if err := os.Mkdir(target, 0o755); err != nil {
				t.Fatal(err)
			}
			if os.Geteuid() == 0 {
				if err := os.Chown(target, nobody, nobody); err != nil {
					t.Fatal(err)
				}
			}
		}
		asNobody(t, base, variable+"="+target, "TMPDIR="+parent)
		names, err := os.ReadDir(target)
		if exists && (err != nil || len(names) != 0) || !exists && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("exists=%v: left behind: %v, %v", exists, names, err)
		}
	}
}

// Who is not root completes and corrects a tree of their own, whatever its permissions are, and
// nothing of others.
func TestForceOfOtherUsers(t *testing.T) {
	const variable = "EXTRACT_TEST_TARGET"
	if parent := os.Getenv(variable); parent != "" {
		m := &memory{blobs: make(map[format.Digest][]byte)}
		readOnly := dir(2, entry("f", 3), entry("g", 4))
		readOnly.Perm = 0o555
		im := m.open(t, format.InodeVector{dir(1, entry("a", 2), entry("z", 4)), readOnly, file(3, m.put([]byte("x"))), file(4, m.put([]byte("y")))})
		plain, forced := filepath.Join(parent, "plain"), filepath.Join(parent, "forced")
		_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: plain})
		must(t, err)
		_, err = extract.Extract(t.Context(), extract.Config{Image: im, Dir: forced})
		must(t, err)
		must(t, os.Chmod(filepath.Join(forced, "a", "f"), 0))
		must(t, os.Chmod(filepath.Join(forced, "a"), 0))
		must(t, os.WriteFile(filepath.Join(forced, "z"), []byte("-"), 0o644)) // and a/g with it
		must(t, os.Chmod(forced, 0o500))
		report, err := force(t, im, forced)
		must(t, err)
		sameTree(t, plain, forced)
		// What could not be looked at beforehand has names of which nobody knows: a/g and z are
		// written anew, which they have to be anyway.
		if want := (extract.Report{Files: 2, Bytes: 2, ReusedFiles: 1, ReusedBytes: 1}); report != want {
			t.Errorf("report %+v, want %+v", report, want)
		}
		if os.Getenv("EXTRACT_TEST_FOREIGN") == "" {
			return
		}
		foreign := filepath.Join(parent, "foreign")
		if _, err := force(t, im, foreign); !errors.Is(err, extract.ErrOwner) {
			t.Errorf("into a directory of root: error %v, want ErrOwner", err)
		}
		return
	}
	base := t.TempDir()
	parent := filepath.Join(base, "parent")
	must(t, os.Mkdir(parent, 0o777))
	must(t, os.Chmod(parent, 0o777))
	env := []string{variable + "=" + parent, "TMPDIR=" + parent}
	if os.Geteuid() == 0 {
		must(t, os.MkdirAll(filepath.Join(parent, "foreign", "a"), 0o755))
		must(t, os.Chmod(filepath.Join(parent, "foreign"), 0o777))
		env = append(env, "EXTRACT_TEST_FOREIGN=1")
	}
	asNobody(t, base, env...)
}

// The first name of a hard link may be in a directory that its own owner cannot search any more.
func TestLinkFromClosedDirectory(t *testing.T) {
	const variable = "EXTRACT_TEST_TARGET"
	if parent := os.Getenv(variable); parent != "" {
		m := &memory{blobs: make(map[format.Digest][]byte)}
		closed := dir(3, entry("f", 5))
		closed.Perm = 0
		im := m.open(t, format.InodeVector{dir(1, entry("a", 2), entry("b", 4), entry("z", 5)), dir(2, entry("closed", 3)), closed, dir(4), file(5, m.put([]byte("x")))})
		target := filepath.Join(parent, "out")
		// The second name comes when the directory of the first is complete.
		made, finished := 0, make(chan struct{})
		once := sync.OnceFunc(func() { close(finished) })
		_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: target, Fault: func(step extract.Step) error {
			switch step {
			case extract.StepDirFinished:
				once()
			case extract.StepDirMade:
				if made++; made == 3 {
					<-finished
				}
			default:
			}
			return nil
		}})
		must(t, err)
		var st unix.Stat_t
		must(t, unix.Stat(filepath.Join(target, "z"), &st))
		if st.Nlink != 2 {
			t.Errorf("the file has %d names, want 2", st.Nlink)
		}
		must(t, unix.Stat(filepath.Join(target, "a", "closed"), &st))
		if st.Mode&0o7777 != 0 {
			t.Errorf("the directory has mode %o, want none", st.Mode&0o7777)
		}
		must(t, os.Chmod(filepath.Join(target, "a", "closed"), 0o700)) // for who cleans up
		return
	}
	base := t.TempDir()
	parent := filepath.Join(base, "parent")
	must(t, os.Mkdir(parent, 0o777))
	must(t, os.Chmod(parent, 0o777))
	asNobody(t, base, variable+"="+parent, "TMPDIR="+parent)
}

// Who has a file open goes on writing to that, and not to what is extracted.
func TestForceLeavesNoWriters(t *testing.T) {
	needRoot(t)
	src := oddTree(t)
	im := build(t, src)
	dir := filepath.Join(t.TempDir(), "dir")
	_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: dir})
	must(t, err)
	large, suid := filepath.Join(dir, "large"), filepath.Join(dir, "suid")
	must(t, os.Chown(large, 1000, 1000))
	must(t, os.Chmod(suid, 0o755))
	for _, name := range []string{large, suid} {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		must(t, err)
		defer f.Close()
		defer func() {
			_, err := f.WriteAt([]byte("evil"), 0)
			must(t, err)
			sameTree(t, src, dir)
		}()
	}
	_, err = force(t, im, dir)
	must(t, err)
}

// A hard link is made to what was extracted, not to what somebody put in its place.
func TestLinkOfTheRightInode(t *testing.T) {
	m := &memory{blobs: make(map[format.Digest][]byte)}
	im := m.open(t, format.InodeVector{dir(1, entry("d", 2), entry("e", 4), entry("z", 3)), dir(2, entry("f", 3)), file(3, m.put([]byte("x"))), dir(4)})
	for _, forced := range []bool{false, true} {
		for _, remove := range []bool{false, true} {
			target := filepath.Join(t.TempDir(), "out")
			other := filepath.Join(t.TempDir(), "other")
			must(t, os.WriteFile(other, []byte("evil"), 0o600))
			// When d is complete, and before there is a second name.
			finished := make(chan struct{})
			once := sync.OnceFunc(func() { close(finished) })
			made := 0
			_, err := extract.Extract(t.Context(), extract.Config{Image: im, Dir: target, Force: forced, Fault: func(step extract.Step) error {
				switch step {
				case extract.StepDirFinished:
					once()
				case extract.StepDirMade:
					if made++; made < 2 {
						break
					}
					<-finished
					if remove {
						return os.Remove(filepath.Join(target, "d", "f"))
					}
					return os.Rename(other, filepath.Join(target, "d", "f"))
				default:
				}
				return nil
			}})
			if !errors.Is(err, extract.ErrChanged) {
				t.Errorf("force=%v, remove=%v: error %v, want ErrChanged", forced, remove, err)
			}
		}
	}
}
