// Package overlay makes a read-only tree writable: it mounts overlayfs on it, which keeps what
// changes in a directory of its own.
//
// A writable mount on DIR consists of
//
//	DIR         the overlay, which hides the directories below
//	DIR/ro      the lower directory: where the caller mounts the tree, before the overlay
//	DIR/upper   the upper directory: what was changed. It may be anywhere else
//	DIR/work    overlayfs' own, always on the file system of the upper directory
//
// The package owns the directories and the overlay, not what is mounted on DIR/ro. It is told
// apart from other overlays by its source in the table of mounts, [Source], and its lower
// directory, so that nobody else's overlay is ever unmounted.
//
// Directories of the tree can be renamed (redirect_dir=on). The same upper directory serves
// again after the tree was unmounted and mounted anew (index=off). Overlayfs asks that it be the
// same tree; [Overlay].PreviousTree tells.
//
// Only root can mount overlays.
package overlay
