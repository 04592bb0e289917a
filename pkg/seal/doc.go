// Package seal puts a whole image in a local layout under the kernel's fs-verity, and checks
// that it is.
//
// One digest stands for all of an image: the fs-verity digest of its manifest, which the
// PuzzleFS tools print and take. From there on a chain leads to every byte of content
// (docs/format.md, "fs-verity"):
//
//	DIGEST ── is that of ──▶ manifest ── names by annotation ──▶ rootfs blob
//	rootfs blob ── names in fsVerityData ──▶ every data blob that the merged tree reaches
//
// [Enable] seals the blobs of an image: from then on the kernel refuses writes to them, and
// checks every page that it reads from the disk. What it seals it has compared with the
// chain before, because a seal cannot be taken off again. [Check] proves the chain before an image
// is mounted: by the kernel's measurements where the file system of the layout has fs-verity,
// else by hashing in user space.
//
// # What is guaranteed
//
// After a successful Check the manifest that Config.Root names is the one whose fs-verity digest is
// Config.Digest, in every [Mode]: that is computed from the very bytes whose SHA-256 Config.Root
// is. With it the SHA-256 of every blob is fixed, and package store checks that at every load,
// whatever has become of a file since. So an image that is opened with the same root returns
// right bytes or an error, for as long as it is open.
//
// Measuring adds that the kernel checks what comes from the disk, too, and that nobody who may
// write to a file can change it. It does not keep whoever may write to the directory from putting
// another file in the place of one that was measured; such a file is only checked by SHA-256.
//
// Hashing in user space proves the manifest and the metadata at once. Of a data blob it proves that it is
// there and that the image has an fs-verity digest for it; its content is left to the
// SHA-256 that every read checks. That is what a measurement does, too: it reads the
// digest that was kept when the file was sealed, not the file, and damage on the disk shows when
// it is read. To hash all content once, and to compare it with fsVerityData, use
// [github.com/csi-puzzlefs/csi-puzzlefs/pkg/image.Image.Verify].
//
// Images of versions 1 and 2 have no manifest: DIGEST is that of the rootfs blob, and fsVerityData
// names the metadata blobs, too.
package seal
