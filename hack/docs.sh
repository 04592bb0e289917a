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
go build -C test/e2e -o "$PWD/bin/quickstart" ./record/quickstart
exec hack/lab.sh bin/quickstart -source "$PWD"
