// Package builder makes PuzzleFS images: a directory, a tar archive or a container image goes
// in, blobs and a tag in an OCI image layout come out.
//
// The same tree gives the same image, whatever it comes from: names are taken in byte order, times are not
// stored, and without compression the result has the same digests as the reference
// implementation's, for an image of its own as for a delta on a base image. docs/format.md,
// "Deltas", lists the three cases in which the reference's deltas are wrong and ours differ.
//
// Work flows through a pipeline whose memory is bounded, apart from the inodes themselves:
//
//	walker ──opened files──▶ cutter ──chunks──▶ workers ──▶ collector
//	numbers, xattrs          one stream,        SHA-256,    chunk lists,
//	                         cut points         fs-verity,  in order
//	                                            zstd, put
//
// The walker sees a tree through an interface. Archives and the layers of container images are
// read first, as a whole, into a [Tree]: names and attributes in memory, the content of files
// in a temporary file without a name. Nothing is unpacked to a file system, so it takes no
// root, owners survive, and no name in an archive can lead anywhere.
//
// The upper directory of an overlay over an image makes a delta without a walk over the tree: its
// names and attributes are read first, then it is decided in memory, on the base's metadata,
// which numbers they get, and last the files with content in it go through the pipeline.
//
// A build writes blobs as it goes and the tag last, so that a build that fails leaves
// blobs that the next one finds, and nothing else.
package builder
