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

mapfile -t sources < <(find upstream -name '*.go' ! -name '*_test.go' | LC_ALL=C sort)
hash=$({ go version && cat ../../hack/upstream.sh go.mod go.sum "${sources[@]}"; } | sha256sum)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/csi-puzzlefs/upstream
dir=$cache/${hash:0:16}

if [[ ! -d $dir ]]; then
	mkdir -p "$cache"
	exec 9>"$cache/lock"
	flock 9 # another run may be building it
fi
if [[ ! -d $dir ]]; then
	version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
	echo "upstream: building the storage suites of Kubernetes $version in $dir (once; some minutes)" >&2
	new=$(mktemp -d "$cache/new.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	CGO_ENABLED=0 nice -n 10 go build -trimpath -ldflags '-s -w' -o "$new/upstream" ./upstream
	chmod 755 "$new"
	mv -T "$new" "$dir"
fi
echo "$dir/upstream"
