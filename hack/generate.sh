#!/usr/bin/env bash
# Regenerates what is made from something else in this repository:
#
#   pkg/format/internal/wirev*   Go code, from pkg/format/schema/*.capnp
#   deploy/kubernetes/*.yaml     the kustomize base, from charts/csi-puzzlefs
#   docs/helm-values.md          the table of the chart's values, from its values.yaml
#
# The results are committed, so that building needs no Cap'n Proto compiler; CI runs this script
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

# The kustomize base and the table of the chart's values, from the chart.
cd test/deploy
go run ./manifests ../../charts/csi-puzzlefs ../../deploy/kubernetes
go tool helm-docs --chart-search-root ../../charts --template-files helm-values.md.gotmpl \
	--output-file ../../docs/helm-values.md --sort-values-order file --log-level warn
