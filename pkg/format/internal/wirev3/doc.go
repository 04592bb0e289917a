// Package wirev3 is generated from pkg/format/schema/rootfs_v3.capnp by make generate: the
// message of version 3, and the structs that all versions share. It decodes nothing by itself
// and validates nothing; pkg/format does both and lets none of these types out.
package wirev3
