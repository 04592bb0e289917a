#!/usr/bin/env bash
# Builds Kubernetes' own tests of storage drivers, as test/kube/upstream runs them against ours, and
# prints the path of the program. It is for a cluster that has the driver, and a PuzzleFS image:
#
#   $(hack/upstream.sh) -kubeconfig FILE -image REGISTRY/NAME:TAG -digest sha256:... -report FILE
#
# The build takes some minutes. It is kept, 80 MB, in
# ${XDG_CACHE_HOME:-~/.cache}/csi-puzzlefs/upstream under a hash of what it was made of, and made
# once; builds of other versions beside it may be removed at any time.
#
# usage: hack/upstream.sh
set -euo pipefail
cd "$(dirname "$0")/../test/kube"
source ../../hack/cached.sh

build() { CGO_ENABLED=0 nice -n 10 go build -trimpath -ldflags '-s -w' -o "$1/upstream" ./upstream; }

mapfile -t sources < <(find upstream -name '*.go' ! -name '*_test.go' | LC_ALL=C sort)
hash=$({ go version && cat ../../hack/upstream.sh go.mod go.sum "${sources[@]}"; } | sha256sum)
cached upstream "$hash" build
echo "$dir/upstream"
