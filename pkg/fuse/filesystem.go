package fuse

import (
	"context"
	"errors"
	"io"
	"math"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

// Statuses that the library does not name.
const (
	enodata = gofuse.Status(unix.ENODATA)
	estale  = gofuse.Status(unix.ESTALE)
)

// filesystem answers the kernel's requests. Its methods are called from many goroutines.
// Requests that it has no method for, here or in readonly.go, are answered ENOSYS by the
// embedded one.
type filesystem struct {
	gofuse.RawFileSystem
	img       *image.Image
	hasXattrs bool
	log       *failureLog
	beside    beside
	// seconds and nanos since 1970 are the time of every file.
	seconds uint64
	nanos   uint32
}

var _ gofuse.RawFileSystem = (*filesystem)(nil)

func newFilesystem(img *image.Image, modTime time.Time, log *failureLog) *filesystem {
	f := &filesystem{
		RawFileSystem: gofuse.NewDefaultRawFileSystem(),
		img:           img,
		hasXattrs:     img.HasXattrs(),
		log:           log,
		beside:        beside{img: img, store: func(uint64, []byte) bool { return false }}, // until there is a connection
	}
	if !modTime.IsZero() {
		f.seconds, f.nanos = uint64(modTime.Unix()), uint32(modTime.Nanosecond())
	}
	return f
}

// String names the file system in the library's messages.
func (f *filesystem) String() string { return Subtype }

// Forget has nothing to forget.
func (f *filesystem) Forget(_, _ uint64) {}

// Lookup answers a name that does not exist with node 0, which the kernel keeps; ENOENT
// it would forget.
func (f *filesystem) Lookup(_ <-chan struct{}, in *gofuse.InHeader, name string, out *gofuse.EntryOut) gofuse.Status {
	a, err := f.img.Lookup(in.NodeId, name)
	if err == nil {
		f.fillEntry(out, &a)
		return gofuse.OK
	}
	if errors.Is(err, image.ErrNotExist) {
		if _, err := f.img.Attr(in.NodeId); err == nil {
			out.EntryValid = forever
			return gofuse.OK
		}
	}
	return f.status(err)
}

// GetAttr is asked once for each inode at most: all other answers bring the attributes.
func (f *filesystem) GetAttr(_ <-chan struct{}, in *gofuse.GetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	a, err := f.img.Attr(in.NodeId)
	if err != nil {
		return f.status(err)
	}
	out.AttrValid = forever
	f.fillAttr(&out.Attr, &a)
	return gofuse.OK
}

// Readlink returns a symlink's target.
func (f *filesystem) Readlink(_ <-chan struct{}, in *gofuse.InHeader) ([]byte, gofuse.Status) {
	target, err := f.img.Readlink(in.NodeId)
	if err != nil {
		return nil, f.status(err)
	}
	return []byte(target), gofuse.OK
}

// Read fills buf, or fails: a short answer means the end of the file to the kernel, which
// would then show zeros for the rest.
func (f *filesystem) Read(cancel <-chan struct{}, in *gofuse.ReadIn, buf []byte) (gofuse.ReadResult, gofuse.Status) {
	if in.Offset > math.MaxInt64 {
		return nil, gofuse.EINVAL
	}
	buf = buf[:min(len(buf), int(in.Size))]
	n, err := f.img.ReadAt(interrupt(cancel), in.NodeId, buf, int64(in.Offset))
	switch {
	case err == nil, err == io.EOF: //nolint:errorlint // as io.ReaderAt says, never wrapped
		if in.Offset == 0 {
			f.beside.wasRead(in.NodeId, n)
		}
		return gofuse.ReadResultData(buf[:n]), gofuse.OK
	case interrupt(cancel).Err() != nil:
		return nil, gofuse.EINTR
	}
	status := f.status(err)
	if status == gofuse.EIO {
		f.log.readFailed(in.NodeId, in.Offset, len(buf), err)
	}
	return nil, status
}

// Cookies of a directory's list. A cookie names the place behind an entry: the kernel gives
// back that of the last entry it has room for.
const (
	cookieDot     = 1
	cookieDotDot  = 2
	cookieEntries = 3 // of entry 0
)

// ReadDir lists names only. The kernel asks for it when it knows nothing of READDIRPLUS.
func (f *filesystem) ReadDir(_ <-chan struct{}, in *gofuse.ReadIn, out *gofuse.DirEntryList) gofuse.Status {
	dir, err := f.img.OpenDir(in.NodeId)
	if err != nil {
		return f.status(err)
	}
	cookie := in.Offset
	for ; cookie < cookieDotDot; cookie++ {
		if !out.AddDirEntry(dotEntry(in.NodeId, dir.Parent(), cookie)) {
			return gofuse.OK
		}
	}
	for n := uint64(dir.Len()); cookie-cookieDotDot < n; cookie++ {
		name, a := dir.Entry(int(cookie - cookieDotDot))
		if !out.AddDirEntry(gofuse.DirEntry{Name: name, Ino: a.Ino, Mode: fileType(a.Kind), Off: cookie + 1}) {
			return gofuse.OK
		}
	}
	return gofuse.OK
}

// ReadDirPlus lists names with what LOOKUP would say of each.
func (f *filesystem) ReadDirPlus(_ <-chan struct{}, in *gofuse.ReadIn, out *gofuse.DirEntryList) gofuse.Status {
	dir, err := f.img.OpenDir(in.NodeId)
	if err != nil {
		return f.status(err)
	}
	cookie := in.Offset
	for ; cookie < cookieDotDot; cookie++ {
		// Without attributes, which the kernel would not look at.
		if out.AddDirLookupEntry(dotEntry(in.NodeId, dir.Parent(), cookie)) == nil {
			return gofuse.OK
		}
	}
	for n := uint64(dir.Len()); cookie-cookieDotDot < n; cookie++ {
		name, a := dir.Entry(int(cookie - cookieDotDot))
		entry := out.AddDirLookupEntry(gofuse.DirEntry{Name: name, Ino: a.Ino, Mode: fileType(a.Kind), Off: cookie + 1})
		if entry == nil {
			return gofuse.OK
		}
		f.fillEntry(entry, &a)
	}
	return gofuse.OK
}

// dotEntry returns the entry behind cookie 0 or 1: "." or "..".
func dotEntry(self, parent, cookie uint64) gofuse.DirEntry {
	if cookie < cookieDot {
		return gofuse.DirEntry{Name: ".", Ino: self, Mode: unix.S_IFDIR, Off: cookieDot}
	}
	return gofuse.DirEntry{Name: "..", Ino: parent, Mode: unix.S_IFDIR, Off: cookieDotDot}
}

// GetXAttr copies the value to dest, or says how large dest must be.
func (f *filesystem) GetXAttr(_ <-chan struct{}, in *gofuse.InHeader, name string, dest []byte) (uint32, gofuse.Status) {
	if !f.hasXattrs {
		return 0, gofuse.ENOSYS
	}
	value, err := f.img.Xattr(in.NodeId, name)
	if err != nil {
		return 0, f.status(err)
	}
	if len(value) > len(dest) {
		return uint32(len(value)), gofuse.ERANGE
	}
	return uint32(copy(dest, value)), gofuse.OK
}

// ListXAttr copies the names, each with a NUL behind it, to dest, or says how large dest
// must be.
func (f *filesystem) ListXAttr(_ <-chan struct{}, in *gofuse.InHeader, dest []byte) (uint32, gofuse.Status) {
	if !f.hasXattrs {
		return 0, gofuse.ENOSYS
	}
	attrs, err := f.img.Xattrs(in.NodeId)
	if err != nil {
		return 0, f.status(err)
	}
	size := 0
	for i := range attrs {
		size += len(attrs[i].Key) + 1
	}
	if size > len(dest) {
		return uint32(size), gofuse.ERANGE
	}
	list := dest[:0]
	for i := range attrs {
		list = append(append(list, attrs[i].Key...), 0)
	}
	return uint32(size), gofuse.OK
}

// StatFs counts what the image holds. Nothing is free.
func (f *filesystem) StatFs(_ <-chan struct{}, _ *gofuse.InHeader, out *gofuse.StatfsOut) gofuse.Status {
	stats := f.img.Stats()
	out.Bsize = blockSize
	out.Frsize = blockSize
	out.Blocks = (stats.Bytes + blockSize - 1) / blockSize // an image has less than 2^63 bytes
	out.Files = stats.Inodes
	out.NameLen = maxName
	return gofuse.OK
}

// status maps an error of the image to what the caller gets: the one place where that is
// decided. It does not log.
func (f *filesystem) status(err error) gofuse.Status {
	switch {
	case errors.Is(err, image.ErrNotExist):
		return estale
	case errors.Is(err, image.ErrNotDir):
		return gofuse.ENOTDIR
	case errors.Is(err, image.ErrIsDir):
		return gofuse.EISDIR
	case errors.Is(err, image.ErrNotFile), errors.Is(err, image.ErrNotSymlink):
		return gofuse.EINVAL
	case errors.Is(err, image.ErrNoXattr):
		return enodata
	default:
		return gofuse.EIO
	}
}

// aclPrefix begins the names of the two xattrs that hold ACLs.
const aclPrefix = "system.posix_acl_"

// interrupt makes a context of the channel that the library closes when the caller was
// interrupted, or the file system is gone. It costs no memory. It means something until
// the request is answered, no longer: the library uses the channel for the next one.
type interrupt <-chan struct{}

var _ context.Context = interrupt(nil)

func (c interrupt) Deadline() (time.Time, bool) { return time.Time{}, false }
func (c interrupt) Done() <-chan struct{}       { return c }
func (c interrupt) Value(any) any               { return nil }

func (c interrupt) Err() error {
	select {
	case <-c:
		return context.Canceled
	default:
		return nil
	}
}
