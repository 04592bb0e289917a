# The metadata of a PuzzleFS image, version 3 (docs/format.md, "Rootfs message").
#
# One message describes the whole tree: layers of inodes, topmost first. The numbers after
# "@" fix where a field lies in the bytes, so they must never change; names are ours. The
# id of this file is the reference's.
@0x84ae5e6e88b7cbb7;

using Go = import "/go.capnp";
$Go.package("wirev3");
$Go.import("github.com/csi-puzzlefs/csi-puzzlefs/pkg/format/internal/wirev3");

struct Rootfs {
  # The root of the message.
  metadatas @0 :List(InodeVector);
  # The layers, topmost first.
  fsVerityData @1 :List(VerityData);
  # One entry a distinct data blob, sorted by digest.
  manifestVersion @2 :UInt64;
  # 3.
}

struct VerityData {
  digest @0 :Data;
  # SHA-256 of a blob's stored bytes, 32 bytes.
  verity @1 :Data;
  # fs-verity digest of the same bytes, 32 bytes.
}

struct InodeVector {
  # A layer.
  inodes @0 :List(Inode);
  # Sorted by ino.
}

struct Inode {
  ino @0 :UInt64;
  mode :union {
    unknown @1 :Void;
    fifo @2 :Void;
    chr @3 :Chr;
    dir @4 :Dir;
    blk @5 :Blk;
    file @6 :List(FileChunk);
    lnk @7 :Void;
    sock @8 :Void;
    wht @9 :Void;
    # "Deleted here": hides the inode of that number in the layers below.
  }
  uid @10 :UInt32;
  gid @11 :UInt32;
  permissions @12 :UInt16;
  # st_mode & 07777.
  additional @13 :InodeAdditional;
  # Null where there are neither xattrs nor a symlink target.
}

struct Chr {
  major @0 :UInt64;
  minor @1 :UInt64;
}

struct Blk {
  major @0 :UInt64;
  minor @1 :UInt64;
}

struct Dir {
  entries @0 :List(DirEntry);
  # Complete; names of deleted entries stay listed and point at a wht inode.
  lookBelow @1 :Bool;
  # Always false in what the reference writes.
}

struct DirEntry {
  ino @0 :UInt64;
  name @1 :Data;
  # Any bytes but "/" and NUL.
}

struct FileChunk {
  blob @0 :BlobRef;
  len @1 :UInt64;
  # In bytes of uncompressed content.
}

struct BlobRef {
  digest @0 :Data;
  # SHA-256 of the blob's stored bytes, 32 bytes.
  offset @1 :UInt64;
  # In bytes of uncompressed content.
  compressed @2 :Bool;
}

struct InodeAdditional {
  xattrs @0 :List(Xattr);
  symlinkTarget @1 :Data;
  # Null where the inode is not a symlink.
}

struct Xattr {
  key @0 :Data;
  # With its namespace: "user.comment".
  val @1 :Data;
}
