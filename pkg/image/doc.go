// Package image presents a PuzzleFS image as a read-only file system: lookup, directory
// listing, symlinks, extended attributes and reads at an offset, by inode number or by path.
//
// It knows nothing of FUSE and of where blobs come from: a [Source] hands them over,
// verified. Opening an image decodes its metadata once into an index of flat arrays, so
// that nothing on the way of a lookup or a read is linear: an inode is found by its
// number, a name by binary search in its directory, a chunk by binary search in its file.
//
//	nodes    one per reachable inode, sorted by number      32 bytes
//	numbers  one per run of consecutive inode numbers       16 bytes
//	entries  one per name, directory by directory, sorted    8 bytes
//	names    all names, one after another
//	targets  the targets of all symlinks
//	chunks   one per byte range of a file                   24 bytes
//	blobs    one per distinct blob                          48 bytes
//	sealed   one per blob with an fs-verity digest          64 bytes
//	shared   one per owner and set of extended attributes   32 bytes
//
// Layers are merged while the index is made: the topmost inode of a number counts, names
// that point at a whiteout are hidden, inodes that no name leads to are left out. An image of one
// layer, which most are, is indexed straight from the message.
//
// An [Image] is immutable and safe for concurrent use. The only thing that changes is a
// cache of decoded chunks, bounded in bytes, which loads a chunk once however many readers
// wait for it.
package image
