# The layers of version 1 (docs/format.md, "Versions 1 and 2").
#
# They differ from those of versions 2 and 3 in one place: a file's chunk list is wrapped in a
# struct. Everything else is shared with rootfs_v3.capnp. The id of this file is our own; ids do
# not travel in the bytes.
@0xd6b8fa34c3487c31;

using Go = import "/go.capnp";
using V3 = import "rootfs_v3.capnp";
$Go.package("wirev1");
$Go.import("github.com/csi-puzzlefs/csi-puzzlefs/pkg/format/internal/wirev1");

struct InodeVector {
  # The root of the message: a layer.
  inodes @0 :List(Inode);
  # Sorted by ino.
}

struct Inode {
  ino @0 :UInt64;
  mode :union {
    unknown @1 :Void;
    fifo @2 :Void;
    chr @3 :V3.Chr;
    dir @4 :V3.Dir;
    blk @5 :V3.Blk;
    file @6 :File;
    lnk @7 :Void;
    sock @8 :Void;
    wht @9 :Void;
  }
  uid @10 :UInt32;
  gid @11 :UInt32;
  permissions @12 :UInt16;
  additional @13 :V3.InodeAdditional;
}

struct File {
  # What versions 2 and 3 left out.
  chunks @0 :List(V3.FileChunk);
}
