// Package store keeps blobs by their SHA-256 in a directory that is an ordinary OCI image
// layout, so that other tools can read what we keep:
//
//	DIR/oci-layout            {"imageLayoutVersion":"1.0.0"}; index updates lock this file
//	DIR/index.json            the tags
//	DIR/blobs/sha256/<hex>    the blobs
//	DIR/.puzzlefs-tmp-*       a file being made; gone when the operation ends
//
// The package owns these names and no others. Except through [Store.OpenBlob] it never hands
// out a byte that it did not check against the digest it was asked for; it never rewrites a
// good blob, and never shows a half-written blob or index under its final name: a blob is written to a file without a
// name and linked in, an index is written beside the old one and renamed over it.
//
// Blobs are not made durable one by one. [Store.Sync] makes everything written so far
// durable with one call, and [Store.Tag] does so before it changes the index: a tag never
// names content that a power failure could take away. A blob that was torn before that is
// noticed by the next read and replaced by the next write.
//
// What is in use is told by [Pins], files in a directory of their own that every process sees;
// what is not, [Store.Collect] removes, whole images by least recent use:
//
//	tagged or known to the caller    an image: goes as a whole, unless it is pinned
//	pinned                           its manifest and all that it names stay
//	held                             pinned for as long as a process lives
//	in no image                      an orphan: goes first
//
// Nothing but a pin protects a blob from a collection. A program that relies on blobs that it
// found, such as a pull, holds the image first; a build into a layout that somebody collects in
// the meantime may have to be repeated. An index entry of another kind than ours keeps nothing.
//
// The layout of PuzzleFS before its version 0.2.0 ([LayoutPrivate]) is read, never written.
//
// All methods of [Store] are safe for concurrent use by many goroutines, and one directory
// may be used by many processes at the same time.
package store
