// Package fuse serves one opened image as a file system to the kernel.
//
// It translates between the kernel's requests and [image.Image], and owns the mount point
// and the connection to the kernel. It knows nothing of stores, registries and pods, never
// writes, and keeps no state:
//
//	node id      = inode number; the root is 1 in both worlds
//	generation   = 0
//	file handle  = none: OPEN and OPENDIR are answered ENOSYS, once
//	cookie       = index in the directory's sorted list, "." and ".." before it
//	FORGET       = nothing to do
//
// Every answer follows from the image alone, so that another process could go on with the
// same connection. And every answer holds for ever, so the kernel is told to keep names
// (those that do not exist, too), attributes, lists, symlinks and content for as long as
// it has memory: what was read once costs no request again.
//
//	request                answer
//	LOOKUP                 entry; a name that is not there is a negative entry, kept
//	GETATTR                attributes; no times are stored: all are 1970
//	READDIRPLUS, READDIR   list; with attributes, so that no LOOKUP follows
//	READ                   verified bytes; EIO if that fails, EINTR if the reader gave up; where
//	                       somebody reads one small file after the other, those that were loaded
//	                       together with this one are put into the kernel's cache beside it
//	READLINK, STATFS
//	GETXATTR, LISTXATTR    ENOSYS, once, for an image without any
//	all that changes       EROFS
//	OPEN, OPENDIR, FLUSH,  ENOSYS, once: the kernel then does without them
//	ACCESS, FSYNC, LSEEK,
//	POLL, STATX, locks
//
// An inode that the image does not have is ESTALE. What goes wrong with content is EIO for
// the reader and one line in the log, so many a minute at most.
//
// Mounts are read-only, nosuid and nodev. The kernel checks permissions by owner and mode
// (default_permissions), and by ACL if the image has any.
//
// The FUSE library keeps one name for itself: ".go-fuse-epoll-hack" in the root can be
// looked up though the image does not have it. It is not listed and cannot be read.
package fuse
