#!/usr/bin/env bash
# Records the quick start, docs/quickstart.session, on a cluster that it starts on this machine for that (as
# root, on Linux with FUSE), and writes docs/quickstart.cast and docs/quickstart.svg. An unchanged project
# gives unchanged files; the end-to-end suite fails when they are not what the session gives.
#
# The first time it builds Kubernetes and what else a node is made of, for half an hour, as hack/e2e.sh does.
#
# usage: hack/docs.sh
set -euo pipefail
cd "$(dirname "$0")/.."

CGO_ENABLED=0 go build -trimpath -o bin/csi-puzzlefs ./cmd/csi-puzzlefs
hack/install-deps.sh e2e
kube=$(hack/kube.sh)
node=$(hack/node.sh)
images=$(hack/e2e-images.sh)

programs=$(mktemp -d)
trap 'rm -rf "$programs"' EXIT
(cd test/e2e && go build -o "$programs/" ./lab ./record/quickstart)
"$programs/lab" -nodes 2 -kube "$kube" -node "$node" -images "$images" -- "$programs/quickstart" -source "$PWD"
