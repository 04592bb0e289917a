// Package wirev2 is generated from pkg/format/schema/rootfs_v2.capnp by make generate: the
// rootfs message of versions 1 and 2. The layers that it names are wirev3.InodeVector messages
// in version 2 and wirev1.InodeVector messages in version 1.
package wirev2
