package fuse

import (
	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/format"
	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/image"
)

const (
	// forever is how many seconds the kernel keeps what it is told. Ten years outlive any
	// mount, and do not overflow the kernel's clock, which counts up to a thousand ticks a
	// second, on 64-bit machines.
	forever = 10 * 365 * 24 * 60 * 60
	// blockSize is the unit in which statfs counts, in bytes, and stat's preferred one.
	blockSize = 4096
	// statUnit is the unit of st_blocks, in bytes, on all systems.
	statUnit = 512
	// maxName is the length of the longest name in bytes.
	maxName = 255
)

// fillEntry is the answer to a LOOKUP that found something.
func (f *filesystem) fillEntry(out *gofuse.EntryOut, a *image.Attr) {
	out.NodeId = a.Ino
	out.EntryValid = forever
	out.AttrValid = forever
	f.fillAttr(&out.Attr, a)
}

// fillAttr sets everything. Images store no times: all have the one of the mount.
func (f *filesystem) fillAttr(out *gofuse.Attr, a *image.Attr) {
	out.Atime, out.Mtime, out.Ctime = f.seconds, f.seconds, f.seconds
	out.Atimensec, out.Mtimensec, out.Ctimensec = f.nanos, f.nanos, f.nanos
	out.Ino = a.Ino
	out.Size = a.Size
	out.Blksize = blockSize
	out.Mode = fileType(a.Kind) | uint32(a.Perm)
	out.Nlink = a.Nlink
	out.Uid = a.UID
	out.Gid = a.GID
	switch a.Kind {
	case format.KindFile:
		// Not a.Size + statUnit - 1, which could overflow.
		out.Blocks = a.Size / statUnit
		if a.Size%statUnit != 0 {
			out.Blocks++
		}
	case format.KindChr, format.KindBlk:
		out.Rdev = encodeDevice(a.Major, a.Minor)
	default:
		// The others have neither content nor a device.
	}
}

// encodeDevice is how the protocol writes device numbers: 12 bits of major amid 20 bits of
// minor, all that Linux has. What does not fit is cut off, as mknod(2) does.
func encodeDevice(major, minor uint32) uint32 {
	return minor&0xff | major&0xfff<<8 | minor&0xfff00<<12
}

// fileType is the part of st_mode that says what an inode is.
func fileType(k format.Kind) uint32 {
	switch k {
	case format.KindDir:
		return unix.S_IFDIR
	case format.KindFile:
		return unix.S_IFREG
	case format.KindSymlink:
		return unix.S_IFLNK
	case format.KindFifo:
		return unix.S_IFIFO
	case format.KindSocket:
		return unix.S_IFSOCK
	case format.KindChr:
		return unix.S_IFCHR
	case format.KindBlk:
		return unix.S_IFBLK
	default:
		// Images are validated when they are opened. The kernel refuses an inode without type.
		return 0
	}
}
