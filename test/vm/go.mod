module github.com/csi-puzzlefs/csi-puzzlefs/test/vm

go 1.26.0

require (
	github.com/csi-puzzlefs/csi-puzzlefs v0.0.0-00010101000000-000000000000
	golang.org/x/sys v0.48.0
)

require (
	capnproto.org/go/capnp/v3 v3.1.0-alpha.2 // indirect
	github.com/SaveTheRbtz/zstd-seekable-format-go/pkg v0.10.0 // indirect
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	github.com/colega/zeropool v0.0.0-20230505084239-6fb4a4f75381 // indirect
	github.com/klauspost/compress v1.20.3 // indirect
	golang.org/x/sync v0.24.0 // indirect
)

replace github.com/csi-puzzlefs/csi-puzzlefs => ../..
