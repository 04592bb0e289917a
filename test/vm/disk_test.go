package vm_test

import (
	"os"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-puzzlefs/csi-puzzlefs/pkg/verity"
	"github.com/csi-puzzlefs/csi-puzzlefs/test/vm/internal/job"
)

// fibmap is FIBMAP (linux/fs.h): on which block of the disk does a block of a file lie?
const fibmap = 1

// blockSize is that of the file system, in bytes; command run makes it so.
const blockSize = 4096

// damageOnDisk flips a bit of a file where it lies on the disk, below the file system, and lets the kernel
// forget what it has read.
func damageOnDisk(t *testing.T, path string, offset int64) {
	t.Helper()
	disk, err := os.OpenFile(os.Getenv(job.EnvDisk), os.O_RDWR, 0)
	must(t, err)
	defer disk.Close()
	at := blockOf(t, path, offset/blockSize)*blockSize + offset%blockSize
	b := make([]byte, 1)
	_, err = disk.ReadAt(b, at)
	must(t, err)
	b[0] ^= 1
	_, err = disk.WriteAt(b, at)
	must(t, err)
	must(t, disk.Sync())
	must(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
}

// blockOf returns the number of the block of the disk that block n of a file is on.
func blockOf(t *testing.T, path string, n int64) int64 {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	unix.Sync() // it may have no place yet
	block := int32(n)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fibmap, uintptr(unsafe.Pointer(&block))); errno != 0 {
		t.Fatalf("find block %d of %s: %v", n, path, errno)
	}
	if block == 0 {
		t.Fatalf("block %d of %s is not on the disk", n, path)
	}
	return int64(block)
}

// sealAs seals a file as somebody else might, with another hash algorithm or with a salt.
func sealAs(t *testing.T, path string, algorithm uint32, salt []byte) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	arg := unix.FsverityEnableArg{Version: 1, Hash_algorithm: algorithm, Block_size: verity.BlockSize, Salt_size: uint32(len(salt))}
	if len(salt) > 0 {
		var pinned runtime.Pinner
		pinned.Pin(&salt[0])
		defer pinned.Unpin()
		arg.Salt_ptr = uint64(uintptr(unsafe.Pointer(&salt[0])))
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_ENABLE_VERITY, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		t.Fatalf("seal %s: %v", path, errno)
	}
}
