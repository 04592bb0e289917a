# The rootfs message of versions 1 and 2 (docs/format.md, "Versions 1 and 2").
#
# It does not hold the layers but names their blobs. In version 2 such a blob's root is the
# InodeVector of version 3; in version 1 it is that of inodes_v1.capnp. The id of this file is
# the reference's.
@0xe0b6d460b1f22bb5;

using Go = import "/go.capnp";
using V3 = import "rootfs_v3.capnp";
$Go.package("wirev2");
$Go.import("github.com/csi-puzzlefs/csi-puzzlefs/pkg/format/internal/wirev2");

struct Rootfs {
  # The root of the message.
  metadatas @0 :List(V3.BlobRef);
  # The blobs of the layers, topmost first.
  fsVerityData @1 :List(V3.VerityData);
  # One entry a distinct data or metadata blob, sorted by digest.
  manifestVersion @2 :UInt64;
  # 1 or 2.
}
