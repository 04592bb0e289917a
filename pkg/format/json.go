package format

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// MarshalJSON encodes r as `capnp convert binary:json` prints a rootfs message of its
// version: 64-bit numbers as strings, data as arrays of numbers, null pointers left out.
func (r *Rootfs) MarshalJSON() ([]byte, error) {
	type verity struct {
		Digest jsonData `json:"digest"`
		Verity jsonData `json:"verity"`
	}
	out := struct {
		Metadatas       any      `json:"metadatas"`
		FsVerityData    []verity `json:"fsVerityData"`
		ManifestVersion uint64   `json:"manifestVersion,string"`
	}{FsVerityData: make([]verity, 0, len(r.Verity)), ManifestVersion: uint64(r.Version)}
	for i := range r.Verity {
		out.FsVerityData = append(out.FsVerityData, verity{r.Verity[i].Digest[:], r.Verity[i].Verity[:]})
	}
	if r.Version == Version3 {
		layers := make([]jsonVector, 0, len(r.Layers))
		for _, l := range r.Layers {
			layers = append(layers, jsonVector{l, r.Version})
		}
		out.Metadatas = layers
	} else {
		refs := make([]jsonBlobRef, 0, len(r.Metadatas))
		for _, m := range r.Metadatas {
			refs = append(refs, newJSONBlobRef(m))
		}
		out.Metadatas = refs
	}
	return json.Marshal(out)
}

// JSON encodes the layer as `capnp convert binary:json` prints an inode vector of version v.
func (v InodeVector) JSON(version Version) ([]byte, error) {
	return json.Marshal(jsonVector{v, version})
}

// jsonData is encoded as an array of numbers.
type jsonData []byte

// MarshalJSON implements json.Marshaler.
func (d jsonData) MarshalJSON() ([]byte, error) {
	b := make([]byte, 0, 4*len(d)+2)
	b = append(b, '[')
	for i, c := range d {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, uint64(c), 10)
	}
	return append(b, ']'), nil
}

type jsonBlobRef struct {
	Digest     jsonData `json:"digest"`
	Offset     uint64   `json:"offset,string"`
	Compressed bool     `json:"compressed"`
}

func newJSONBlobRef(r BlobRef) jsonBlobRef {
	return jsonBlobRef{r.Digest[:], r.Offset, r.Compressed}
}

type jsonDevice struct {
	Major uint64 `json:"major,string"`
	Minor uint64 `json:"minor,string"`
}

type jsonEntry struct {
	Ino  uint64   `json:"ino,string"`
	Name jsonData `json:"name"`
}

type jsonDir struct {
	Entries   []jsonEntry `json:"entries"`
	LookBelow bool        `json:"lookBelow"`
}

type jsonChunk struct {
	Blob jsonBlobRef `json:"blob"`
	Len  uint64      `json:"len,string"`
}

type jsonXattr struct {
	Key jsonData `json:"key"`
	Val jsonData `json:"val"`
}

type jsonAdditional struct {
	Xattrs        []jsonXattr `json:"xattrs"`
	SymlinkTarget *jsonData   `json:"symlinkTarget,omitempty"`
}

type jsonInode struct {
	Ino         uint64          `json:"ino,string"`
	Mode        map[string]any  `json:"mode"`
	UID         uint32          `json:"uid"`
	GID         uint32          `json:"gid"`
	Permissions uint16          `json:"permissions"`
	Additional  *jsonAdditional `json:"additional,omitempty"`
}

// jsonVector is a layer with the version that decides how its chunk lists look.
type jsonVector struct {
	inodes  InodeVector
	version Version
}

// MarshalJSON implements json.Marshaler.
func (v jsonVector) MarshalJSON() ([]byte, error) {
	out := struct {
		Inodes []jsonInode `json:"inodes"`
	}{make([]jsonInode, 0, len(v.inodes))}
	for i := range v.inodes {
		inode, err := v.inode(&v.inodes[i])
		if err != nil {
			return nil, err
		}
		out.Inodes = append(out.Inodes, inode)
	}
	return json.Marshal(out)
}

func (v jsonVector) inode(i *Inode) (jsonInode, error) {
	out := jsonInode{Ino: i.Ino, UID: i.UID, GID: i.GID, Permissions: i.Perm}
	device := jsonDevice{i.Major, i.Minor}
	switch i.Kind {
	case KindUnknown:
		out.Mode = map[string]any{"unknown": nil}
	case KindFifo:
		out.Mode = map[string]any{"fifo": nil}
	case KindSymlink:
		out.Mode = map[string]any{"lnk": nil}
	case KindSocket:
		out.Mode = map[string]any{"sock": nil}
	case KindWhiteout:
		out.Mode = map[string]any{"wht": nil}
	case KindChr:
		out.Mode = map[string]any{"chr": device}
	case KindBlk:
		out.Mode = map[string]any{"blk": device}
	case KindDir:
		dir := jsonDir{LookBelow: i.LookBelow, Entries: make([]jsonEntry, 0, len(i.Entries))}
		for _, e := range i.Entries {
			dir.Entries = append(dir.Entries, jsonEntry{e.Ino, e.Name})
		}
		out.Mode = map[string]any{"dir": dir}
	case KindFile:
		chunks := make([]jsonChunk, 0, len(i.Chunks))
		for _, c := range i.Chunks {
			chunks = append(chunks, jsonChunk{newJSONBlobRef(c.Blob), c.Len})
		}
		out.Mode = map[string]any{"file": chunks}
		if v.version == Version1 {
			out.Mode = map[string]any{"file": map[string]any{"chunks": chunks}}
		}
	default:
		return out, fmt.Errorf("encode inode %d as JSON: %s: %w", i.Ino, i.Kind, ErrCorrupt)
	}
	if len(i.Xattrs) > 0 || i.Symlink != nil {
		out.Additional = &jsonAdditional{Xattrs: make([]jsonXattr, 0, len(i.Xattrs))}
		for _, x := range i.Xattrs {
			out.Additional.Xattrs = append(out.Additional.Xattrs, jsonXattr{x.Key, x.Val})
		}
	}
	if i.Symlink != nil {
		target := jsonData(i.Symlink)
		out.Additional.SymlinkTarget = &target
	}
	return out, nil
}
