package fuse

import gofuse "github.com/hanwen/go-fuse/v2/fuse"

// The kernel knows that the mount is read-only and refuses these by itself. They are
// answered all the same, should it be mounted otherwise one day.

// SetAttr is refused: the file system is read-only.
func (f *filesystem) SetAttr(<-chan struct{}, *gofuse.SetAttrIn, *gofuse.AttrOut) gofuse.Status {
	return gofuse.EROFS
}

// Mknod is refused.
func (f *filesystem) Mknod(<-chan struct{}, *gofuse.MknodIn, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.EROFS
}

// Mkdir is refused.
func (f *filesystem) Mkdir(<-chan struct{}, *gofuse.MkdirIn, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.EROFS
}

// Unlink is refused.
func (f *filesystem) Unlink(<-chan struct{}, *gofuse.InHeader, string) gofuse.Status {
	return gofuse.EROFS
}

// Rmdir is refused.
func (f *filesystem) Rmdir(<-chan struct{}, *gofuse.InHeader, string) gofuse.Status {
	return gofuse.EROFS
}

// Rename is refused.
func (f *filesystem) Rename(<-chan struct{}, *gofuse.RenameIn, string, string) gofuse.Status {
	return gofuse.EROFS
}

// Link is refused.
func (f *filesystem) Link(<-chan struct{}, *gofuse.LinkIn, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.EROFS
}

// Symlink is refused.
func (f *filesystem) Symlink(<-chan struct{}, *gofuse.InHeader, string, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.EROFS
}

// Create is refused.
func (f *filesystem) Create(<-chan struct{}, *gofuse.CreateIn, string, *gofuse.CreateOut) gofuse.Status {
	return gofuse.EROFS
}

// Tmpfile is refused.
func (f *filesystem) Tmpfile(<-chan struct{}, *gofuse.CreateIn, *gofuse.CreateOut) gofuse.Status {
	return gofuse.EROFS
}

// Write is refused.
func (f *filesystem) Write(<-chan struct{}, *gofuse.WriteIn, []byte) (uint32, gofuse.Status) {
	return 0, gofuse.EROFS
}

// Writev is refused.
func (f *filesystem) Writev(<-chan struct{}, *gofuse.WriteIn, [][]byte) (uint32, gofuse.Status) {
	return 0, gofuse.EROFS
}

// CopyFileRange is refused: its destination would be in this file system.
func (f *filesystem) CopyFileRange(<-chan struct{}, *gofuse.CopyFileRangeIn) (uint32, gofuse.Status) {
	return 0, gofuse.EROFS
}

// Fallocate is refused.
func (f *filesystem) Fallocate(<-chan struct{}, *gofuse.FallocateIn) gofuse.Status {
	return gofuse.EROFS
}

// SetXAttr is refused.
func (f *filesystem) SetXAttr(<-chan struct{}, *gofuse.SetXAttrIn, string, []byte) gofuse.Status {
	return gofuse.EROFS
}

// RemoveXAttr is refused.
func (f *filesystem) RemoveXAttr(<-chan struct{}, *gofuse.InHeader, string) gofuse.Status {
	return gofuse.EROFS
}

// What the kernel does without once it was told that there is none.

// Open has no handle to give: the kernel then opens files by itself, and keeps their
// content cached.
func (f *filesystem) Open(<-chan struct{}, *gofuse.OpenIn, *gofuse.OpenOut) gofuse.Status {
	return gofuse.ENOSYS
}

// OpenDir is Open for directories: the kernel keeps their lists cached.
func (f *filesystem) OpenDir(<-chan struct{}, *gofuse.OpenIn, *gofuse.OpenOut) gofuse.Status {
	return gofuse.ENOSYS
}

// Flush has nothing to flush.
func (f *filesystem) Flush(<-chan struct{}, *gofuse.FlushIn) gofuse.Status {
	return gofuse.ENOSYS
}

// Access is the kernel's business, by default_permissions.
func (f *filesystem) Access(<-chan struct{}, *gofuse.AccessIn) gofuse.Status {
	return gofuse.ENOSYS
}
