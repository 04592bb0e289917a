// Package wirev1 is generated from pkg/format/schema/inodes_v1.capnp by make generate: the
// layers of version 1, which differ from later ones in how a file holds its chunk list. The
// rootfs message that names them is wirev2.Rootfs.
package wirev1
