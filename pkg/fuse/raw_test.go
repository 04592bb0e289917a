package fuse_test

import (
	"context"
	"log/slog"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/fuse"
)

// raw answers requests without a kernel, which would not send all of these.
func raw(t testing.TB) gofuse.RawFileSystem {
	return fuse.NewFilesystem(awkward(t), slog.New(slog.DiscardHandler))
}

// estale is what an inode that does not exist gives.
const estale = gofuse.Status(unix.ESTALE)

func TestUnknownNode(t *testing.T) {
	f := raw(t)
	in := gofuse.InHeader{NodeId: 99}
	_, link := f.Readlink(nil, &in)
	_, read := f.Read(nil, &gofuse.ReadIn{InHeader: in}, make([]byte, 10))
	list := gofuse.NewDirEntryList(make([]byte, 4096), 0)
	for name, got := range map[string]gofuse.Status{
		"lookup":      f.Lookup(nil, &in, "a", &gofuse.EntryOut{}),
		"getattr":     f.GetAttr(nil, &gofuse.GetAttrIn{InHeader: in}, &gofuse.AttrOut{}),
		"readlink":    link,
		"read":        read,
		"readdir":     f.ReadDir(nil, &gofuse.ReadIn{InHeader: in}, list),
		"readdirplus": f.ReadDirPlus(nil, &gofuse.ReadIn{InHeader: in}, list),
	} {
		if got != estale {
			t.Errorf("%s: %v, want ESTALE", name, got)
		}
	}
}

func TestWrongKind(t *testing.T) {
	f := raw(t)
	file, dir, blk := gofuse.InHeader{NodeId: 2}, gofuse.InHeader{NodeId: 1}, gofuse.InHeader{NodeId: 4}
	_, link := f.Readlink(nil, &file)
	_, readDir := f.Read(nil, &gofuse.ReadIn{InHeader: dir, Size: 10}, make([]byte, 10))
	_, readBlk := f.Read(nil, &gofuse.ReadIn{InHeader: blk, Size: 10}, make([]byte, 10))
	_, readFar := f.Read(nil, &gofuse.ReadIn{InHeader: file, Offset: math.MaxInt64 + 1, Size: 10}, make([]byte, 10))
	list := gofuse.NewDirEntryList(make([]byte, 4096), 0)
	for name, test := range map[string]struct{ got, want gofuse.Status }{
		"look up in a file":       {f.Lookup(nil, &file, "a", &gofuse.EntryOut{}), gofuse.ENOTDIR},
		"list a file":             {f.ReadDir(nil, &gofuse.ReadIn{InHeader: file}, list), gofuse.ENOTDIR},
		"list a file with more":   {f.ReadDirPlus(nil, &gofuse.ReadIn{InHeader: file}, list), gofuse.ENOTDIR},
		"read link of a file":     {link, gofuse.EINVAL},
		"read a directory":        {readDir, gofuse.EISDIR},
		"read a device":           {readBlk, gofuse.EINVAL},
		"read where nobody reads": {readFar, gofuse.EINVAL},
	} {
		if test.got != test.want {
			t.Errorf("%s: %v, want %v", name, test.got, test.want)
		}
	}
}

// TestRefused sends what a read-only mount never sends.
func TestRefused(t *testing.T) {
	f := raw(t)
	in, entry := &gofuse.InHeader{NodeId: 1}, &gofuse.EntryOut{}
	_, write := f.Write(nil, &gofuse.WriteIn{}, nil)
	_, writev := f.Writev(nil, &gofuse.WriteIn{}, nil)
	_, copied := f.CopyFileRange(nil, &gofuse.CopyFileRangeIn{})
	for name, got := range map[string]gofuse.Status{
		"setattr":         f.SetAttr(nil, &gofuse.SetAttrIn{}, &gofuse.AttrOut{}),
		"mknod":           f.Mknod(nil, &gofuse.MknodIn{}, "x", entry),
		"mkdir":           f.Mkdir(nil, &gofuse.MkdirIn{}, "x", entry),
		"unlink":          f.Unlink(nil, in, "a"),
		"rmdir":           f.Rmdir(nil, in, "sub"),
		"rename":          f.Rename(nil, &gofuse.RenameIn{}, "a", "x"),
		"link":            f.Link(nil, &gofuse.LinkIn{}, "x", entry),
		"symlink":         f.Symlink(nil, in, "x", "y", entry),
		"create":          f.Create(nil, &gofuse.CreateIn{}, "x", &gofuse.CreateOut{}),
		"tmpfile":         f.Tmpfile(nil, &gofuse.CreateIn{}, &gofuse.CreateOut{}),
		"write":           write,
		"writev":          writev,
		"copy_file_range": copied,
		"fallocate":       f.Fallocate(nil, &gofuse.FallocateIn{}),
		"setxattr":        f.SetXAttr(nil, &gofuse.SetXAttrIn{}, "user.x", nil),
		"removexattr":     f.RemoveXAttr(nil, in, "user.x"),
	} {
		if got != gofuse.EROFS {
			t.Errorf("%s: %v, want EROFS", name, got)
		}
	}
}

// TestDone sends what is answered ENOSYS, so that the kernel never asks again.
func TestDone(t *testing.T) {
	f := raw(t)
	in := &gofuse.InHeader{NodeId: 2}
	_, get := f.GetXAttr(nil, in, "user.x", nil)
	_, list := f.ListXAttr(nil, in, nil)
	for name, got := range map[string]gofuse.Status{
		"open":      f.Open(nil, &gofuse.OpenIn{}, &gofuse.OpenOut{}),
		"opendir":   f.OpenDir(nil, &gofuse.OpenIn{}, &gofuse.OpenOut{}),
		"flush":     f.Flush(nil, &gofuse.FlushIn{}),
		"fsync":     f.Fsync(nil, &gofuse.FsyncIn{}),
		"fsyncdir":  f.FsyncDir(nil, &gofuse.FsyncIn{}),
		"access":    f.Access(nil, &gofuse.AccessIn{}),
		"lseek":     f.Lseek(nil, &gofuse.LseekIn{}, &gofuse.LseekOut{}),
		"statx":     f.Statx(nil, &gofuse.StatxIn{}, &gofuse.StatxOut{}),
		"getlk":     f.GetLk(nil, &gofuse.LkIn{}, &gofuse.LkOut{}),
		"getxattr":  get,
		"listxattr": list,
	} {
		if got != gofuse.ENOSYS {
			t.Errorf("%s: %v, want ENOSYS", name, got)
		}
	}
}

func TestLookup(t *testing.T) {
	f := raw(t)
	in := &gofuse.InHeader{NodeId: 1}
	var found, missing gofuse.EntryOut
	if s := f.Lookup(nil, in, "a", &found); s != gofuse.OK || found.NodeId != 2 || found.Ino != 2 || found.EntryValid != fuse.Forever || found.AttrValid != fuse.Forever {
		t.Errorf("found: %v, %+v", s, found)
	}
	if s := f.Lookup(nil, in, "none", &missing); s != gofuse.OK {
		t.Errorf("missing: %v", s)
	}
	if d := cmp.Diff(gofuse.EntryOut{EntryValid: fuse.Forever}, missing); d != "" {
		t.Errorf("missing (-want +got):\n%s", d)
	}
}

// TestCookies lists a directory with room for little at a time, from every cookie.
func TestCookies(t *testing.T) {
	f := raw(t)
	want := []string{".", "..", "a", "b", "blk", "hard", "sub"}
	numbers := []uint64{1, 1, 2, 3, 4, 2, 5}
	for name, list := range map[string]func(uint64, []byte) ([]gofuse.DirEntry, error){
		"plain": func(off uint64, buf []byte) ([]gofuse.DirEntry, error) {
			l := gofuse.NewDirEntryList(buf, off)
			if s := f.ReadDir(nil, &gofuse.ReadIn{InHeader: gofuse.InHeader{NodeId: 1}, Offset: off}, l); s != gofuse.OK {
				return nil, unix.Errno(s)
			}
			return gofuse.ParseDirEntries(l.Bytes())
		},
		"plus": func(off uint64, buf []byte) ([]gofuse.DirEntry, error) {
			l := gofuse.NewDirEntryList(buf, off)
			if s := f.ReadDirPlus(nil, &gofuse.ReadIn{InHeader: gofuse.InHeader{NodeId: 1}, Offset: off}, l); s != gofuse.OK {
				return nil, unix.Errno(s)
			}
			list, _, err := gofuse.ParseDirLookupEntries(l.Bytes())
			return list, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			for start := range len(want) + 1 {
				var names []string
				off := uint64(start)
				for {
					list, err := list(off, make([]byte, 400))
					if err != nil {
						t.Fatal(err)
					}
					if len(list) == 0 {
						break
					}
					for _, e := range list {
						if e.Ino != numbers[e.Off-1] || e.Off != off+1 {
							t.Errorf("entry %+v at %d", e, off)
						}
						names = append(names, e.Name)
						off = e.Off
					}
				}
				if !slices.Equal(names, want[start:]) {
					t.Errorf("from %d: %q, want %q", start, names, want[start:])
				}
			}
			if list, err := list(math.MaxUint64, make([]byte, 400)); len(list) != 0 || err != nil {
				t.Errorf("from a cookie that was never given: %v, %v", list, err)
			}
		})
	}
}

// TestReadGivenUp reads with a request that was interrupted before it began.
func TestReadGivenUp(t *testing.T) {
	m := &memory{}
	img := m.image(t, format.InodeVector{
		{Ino: 1, Kind: format.KindDir, Perm: 0o755, Entries: entries(2, "file")},
		{Ino: 2, Kind: format.KindFile, Perm: 0o644, Chunks: m.add([]byte("content"))},
	})
	m.get = func(ctx context.Context, _ format.Digest) error { return ctx.Err() }
	r := &records{}
	f := fuse.NewFilesystem(img, r.logger())
	cancel := make(chan struct{})
	close(cancel)
	if _, s := f.Read(cancel, &gofuse.ReadIn{InHeader: gofuse.InHeader{NodeId: 2}, Size: 7}, make([]byte, 7)); s != gofuse.EINTR {
		t.Errorf("%v, want EINTR", s)
	}
	if lines := r.all(); len(lines) != 0 {
		t.Errorf("logged: %q", lines)
	}
}

func TestEncodeDevice(t *testing.T) {
	for _, test := range []struct{ major, minor, want uint32 }{
		{0, 0, 0},
		{1, 3, 0x103},
		{7, 5, 0x705},
		{259, 0, 0x10300},
		{8, 256, 0x100800},
		{4095, 1<<20 - 1, math.MaxUint32},
		{4096, 1 << 20, 0},
	} {
		if got := fuse.EncodeDevice(test.major, test.minor); got != test.want {
			t.Errorf("%d:%d is %#x, want %#x", test.major, test.minor, got, test.want)
		}
	}
}

func TestLimiter(t *testing.T) {
	var l fuse.Limiter
	now := time.Unix(1_000_000, 0)
	passed := func(n int) (count, dropped int) {
		for range n {
			if d, ok := l.Allow(now); ok {
				count++
				dropped += d
			}
		}
		return count, dropped
	}
	step := func(what string, n, wantPassed, wantDropped int) {
		t.Helper()
		if p, d := passed(n); p != wantPassed || d != wantDropped {
			t.Errorf("%s: %d passed, %d dropped before, want %d and %d", what, p, d, wantPassed, wantDropped)
		}
	}
	step("the first", fuse.LogBurst+30, fuse.LogBurst, 0)
	step("the same moment", 5, 0, 0)
	now = now.Add(fuse.LogInterval)
	step("one interval later", 5, 1, 35)
	now = now.Add(3 * fuse.LogInterval)
	step("three more", 5, 3, 4)
	now = now.Add(time.Hour)
	step("much later", 2*fuse.LogBurst, fuse.LogBurst, 2)
}
