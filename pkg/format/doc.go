// Package format is the PuzzleFS wire format: it turns bytes into plain Go values and back.
//
// A PuzzleFS image is an OCI image manifest ([Manifest]) whose first layer is the
// rootfs blob, a Cap'n Proto message ([Rootfs]) that describes the whole tree; the
// other layers are the chunks that files are made of. Three versions of the rootfs
// message exist. [DecodeRootfs] reads all of them, [Encoder] writes version 3 with
// the same bytes as the reference implementation, so that equal trees have equal digests.
//
// The package does no I/O, never logs, and is the only one that knows Cap'n Proto.
// Everything it returns has been validated: counts, offsets, names and sums are within
// the bounds documented on each type, whatever the input was. docs/format.md has the
// field tables that the comments here refer to.
package format
