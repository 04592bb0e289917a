package format

import "errors"

// Errors of this package. All are wrapped with what was being read; use errors.Is.
var (
	// ErrCorrupt says that bytes are not a valid encoding of what they claim to be.
	ErrCorrupt = errors.New("corrupt PuzzleFS data")
	// ErrUnsupportedVersion says that a rootfs has a manifestVersion other than 1, 2 or 3.
	ErrUnsupportedVersion = errors.New("unsupported PuzzleFS version")
	// ErrNotPuzzleFS says that a manifest is a valid OCI document that is not a PuzzleFS image.
	ErrNotPuzzleFS = errors.New("not a PuzzleFS image")
	// ErrTooLarge says that a value does not fit into the wire format or exceeds a limit of this package.
	ErrTooLarge = errors.New("too large")
	// ErrTooManyInodes says that metadata has more inodes than the caller's Limits.
	ErrTooManyInodes = errors.New("too many inodes")
	// ErrTooMuchMemory says that decoded metadata would take more memory than the caller's Limits.
	ErrTooMuchMemory = errors.New("too much memory")
)
