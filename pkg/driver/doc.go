// Package driver is the CSI node driver csi.puzzlefs.io: it answers kubelet's calls on a
// unix socket and turns a reference to a PuzzleFS image into a read-only directory of a pod.
//
// A publish goes through these steps, each in a file of its own:
//
//	NodePublishVolume
//	  attributes.go   what does the pod ask for?           refuse what is unknown or unsafe
//	  target.go       where, and is nobody else at it?     one operation per target at a time
//	  images.go       is the image whole on this node,
//	                  and may this pod see it?
//	  pulls.go        if not: one detached pull            Aborted with progress while it runs
//	  space.go        is there room for it?                evict images that nobody uses
//	  lease.go        fetch no more than was found room for
//	  mounts.go       one FUSE mount per image and options shared by all their volumes
//	  bind_linux.go   bind it to the target, read-only
//	  volumes.go      record it                            STATE/volumes, survives us
//
// NodeUnpublishVolume goes the same way back. Both are idempotent, and whatever fails leaves
// nothing behind. reconcile.go puts a node right after the driver was stopped or killed at
// any step: what was published is mounted again from the local store, what was half done is
// undone. Stopping the driver never unmounts anything, because a pod that sees "transport
// endpoint is not connected" is loud, and one that sees an empty directory has wrong data.
//
// Around each call is server.go: it gives the call an id that is on all log lines of its work
// (calls.go), its answer a code (status.go), and the pod an event with a reason (reasons.go, events.go)
// if its volume cannot be published. pullwatch.go tells those who wait for a pull how far it is.
// http.go serves metrics (metrics.go) and probes. All of that watches: none of it may hold up a call, or
// take the lock of a volume or a mount.
//
// An image on the node is in one of these states. Each arrow is a change on disk, so that the
// next driver, and the store commands in another process, see the same:
//
//	        pull begins           pull ends              first volume
//	absent -------------> held --------------> cached ----------------> mounted
//	  ^     hold in pins          tag, record    | ^     pin in pins      |
//	  |                                          | |                      |
//	  +------------------------------------------+ +----------------------+
//	     evicted: record, tag, blobs go             last server ended: unpinned
//
// Only what is cached is evicted, least recently used first: when the store is above its quota or
// the disk below its reserve, before a pull that needs the room, and by the store commands. Who
// looks whether an image is whole holds it first, and until the mount has its pin.
//
// The package owns the state directory and the mounts under it:
//
//	STATE/lock                       held (flock) while a driver runs
//	STATE/store/                     OCI image layout: what was pulled
//	STATE/images/<manifest hex>.json images that are whole, and who may see them
//	STATE/pins/                      images that must stay, see store.Pins
//	STATE/mounts/<manifest hex>/     one FUSE mount per image and options; its source
//	                                 is the digest, and a hash of the options is behind it
//	STATE/volumes/<id>-<hash>.json   one record per published volume
//	STATE/volumes/….pending          a volume half published or half unpublished: to be undone
//
// It must never look into its own mounts (stat, statfs, readdir), because a hung server
// would hang kubelet with it: what is mounted is read from /proc/self/mountinfo, sizes come
// from the image's index. It must never remove anything but an empty directory or a file at
// a target path. It knows gRPC, CSI and Kubernetes' events; it does not know FUSE, which is behind
// [Mounter].
package driver
