package verity

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Errors of the kernel's half. They are wrapped with the file's name.
var (
	// ErrNotSupported says that the kernel or the file system has no fs-verity.
	ErrNotSupported = errors.New("no fs-verity here: it needs a kernel with CONFIG_FS_VERITY and a file system with the feature, such as ext4 with -O verity, btrfs or f2fs")
	// ErrNotEnabled says that a file is not sealed.
	ErrNotEnabled = errors.New("fs-verity is not enabled on the file")
)

// enableArg is struct fsverity_enable_arg (include/uapi/linux/fsverity.h).
type enableArg struct {
	version       uint32
	hashAlgorithm uint32
	blockSize     uint32
	saltSize      uint32
	saltPtr       uint64
	sigSize       uint32
	_             uint32
	sigPtr        uint64
	_             [11]uint64
}

// digestArg is struct fsverity_digest with room for one SHA-256.
type digestArg struct {
	algorithm uint16
	size      uint16
	digest    Digest
}

// Enable seals f: from now on the kernel refuses writes to it and checks every page it
// reads. f must be open for reading only and no one may have it open for writing. A file
// that is sealed already stays so and is no error.
func Enable(f *os.File) error {
	arg := enableArg{version: 1, hashAlgorithm: 1, blockSize: BlockSize}
	err := ioctl(f, unix.FS_IOC_ENABLE_VERITY, unsafe.Pointer(&arg))
	if err == nil || errors.Is(err, unix.EEXIST) {
		return nil
	}
	return fmt.Errorf("enable fs-verity on %s: %w", f.Name(), explain(err))
}

// Measure returns the digest of a sealed file as the kernel keeps it.
func Measure(f *os.File) (Digest, error) {
	arg := digestArg{size: uint16(len(Digest{}))}
	err := ioctl(f, unix.FS_IOC_MEASURE_VERITY, unsafe.Pointer(&arg))
	if errors.Is(err, unix.EOVERFLOW) {
		return Digest{}, fmt.Errorf("measure fs-verity digest of %s: sealed with a hash algorithm whose digests are longer than SHA-256's: %w", f.Name(), ErrInvalidDigest)
	}
	if err != nil {
		return Digest{}, fmt.Errorf("measure fs-verity digest of %s: %w", f.Name(), explain(err))
	}
	if arg.algorithm != 1 || int(arg.size) != len(Digest{}) {
		return Digest{}, fmt.Errorf("measure fs-verity digest of %s: sealed with hash algorithm %d, want SHA-256: %w", f.Name(), arg.algorithm, ErrInvalidDigest)
	}
	return arg.digest, nil
}

// explain maps the errors that say "not here" to the package's sentinels.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w (%w)", ErrNotSupported, err)
	case errors.Is(err, unix.ENODATA):
		return ErrNotEnabled
	case errors.Is(err, unix.ETXTBSY):
		return fmt.Errorf("the file is open for writing; close it first: %w", err)
	}
	return err
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg))
	runtime.KeepAlive(f)
	if errno != 0 {
		return errno
	}
	return nil
}
