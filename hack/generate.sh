#!/usr/bin/env bash
# Regenerates the Go code of pkg/format/internal/wirev* from pkg/format/schema/*.capnp.
#
# The result is committed, so that building needs no Cap'n Proto compiler; CI runs this script
# and fails when it changes anything. The compiler is Debian's (package capnproto), the Go plug-in
# is the version that tools.mod pins, which must be the library's.
#
# usage: hack/generate.sh
set -euo pipefail
cd "$(dirname "$0")/.."

schema=pkg/format/schema
wire=pkg/format/internal

if ! command -v capnp >/dev/null; then
	echo "generate: no capnp program; run hack/install-deps.sh" >&2
	exit 1
fi

library=capnproto.org/go/capnp/v3
lib_version=$(go list -m -f '{{.Version}}' "$library")
tool_version=$(go list -modfile=tools.mod -m -f '{{.Version}}' "$library")
if [[ $lib_version != "$tool_version" ]]; then
	echo "generate: go.mod has $library $lib_version but tools.mod $tool_version; pin the same" >&2
	exit 1
fi

# go.capnp, which the schemas import for their Go annotations, comes with the library's source.
# Nothing else in this script needs the library, so download it when it is not there yet.
go mod download "$library"
std=$(go list -m -f '{{.Dir}}' "$library")/std
plugin=$(go tool -n -modfile=tools.mod capnpc-go)

# compile SCHEMA PACKAGE writes PACKAGE/SCHEMA.go
compile() {
	capnp compile --import-path="$std" --src-prefix="$schema" --output="$plugin:$wire/$2" "$schema/$1"
}

compile rootfs_v3.capnp wirev3
compile rootfs_v2.capnp wirev2
compile inodes_v1.capnp wirev1
