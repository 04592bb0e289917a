#!/usr/bin/env bash
# Runs the end-to-end suite, test/e2e: on a cluster of its own, which it starts on this machine (as root,
# on Linux with FUSE; no container engine and no registry are needed), or on that of KUBECONFIG.
#
# For a cluster of its own this builds Kubernetes, containerd and what else a node is made of, and the
# images: the first time for half an hour, from then on within seconds. Another cluster must have the images
# that hack/e2e-images.sh makes, or pull what E2E_DRIVER_IMAGE, E2E_DRIVER_NEXT_IMAGE, E2E_TOOLS_IMAGE and
# E2E_REGISTRY_IMAGE name (each REPOSITORY[:TAG]); the suite installs the driver there, and removes it.
#
# Without arguments, a cluster of its own is two: each runs half of the suite's parts.
#
# E2E_MACHINES=kind lets the suite restart the nodes of a kind cluster; E2E_REQUIRE_ALL=1 makes what cannot
# be run a failure rather than a skip.
#
# usage: [KUBECONFIG=FILE] hack/e2e.sh [flags of go test or of the suite]
#        hack/e2e.sh -run 'TestSuite/volumes$' -e2e.keep
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z ${KUBECONFIG:-} && $(id -u) -ne 0 ]]; then
	echo "e2e: run as root: a cluster takes namespaces, mounts and cgroups; or give it one: make e2e KUBECONFIG=FILE" >&2
	exit 1
fi

CGO_ENABLED=0 go build -trimpath -o bin/csi-puzzlefs ./cmd/csi-puzzlefs
export CSI_PUZZLEFS=$PWD/bin/csi-puzzlefs
E2E_UPSTREAM=$(hack/upstream.sh)
export E2E_UPSTREAM

if [[ -z ${KUBECONFIG:-} ]]; then
	unset KUBECONFIG
	hack/install-deps.sh e2e
	E2E_KUBE=$(hack/kube.sh)
	E2E_NODE=$(hack/node.sh)
	E2E_IMAGES=$(hack/e2e-images.sh)
	export E2E_KUBE E2E_NODE E2E_IMAGES
else
	# The suite runs in another directory.
	KUBECONFIG=$(realpath -- "$KUBECONFIG")
	export KUBECONFIG
fi

cd test/e2e
# What the suite stands on, which the suite's flags are not for.
go test ./checker/... ./internal/...
if [[ -n ${E2E_KUBE:-} ]]; then
	go test -count=1 -timeout 20m ./cluster/...
fi
if [[ -n ${KUBECONFIG:-} || $# -gt 0 ]]; then
	exec go test -count=1 -v -timeout 40m . "$@"
fi

# Most of the suite waits for kubelet, so clusters side by side take less time than one.
shards=2
dir=$(mktemp -d)
others=()
# An end in the middle ends all, which remove what they have made.
trap '[[ ${#others[@]} -eq 0 ]] || kill "${others[@]}" 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
# Background processes do not hear Ctrl-C, so that this script has to tell them.
trap 'exit 130' INT TERM
go test -c -o "$dir/e2e.test" .
suite=("$dir/e2e.test" -test.v -test.timeout 40m)
for ((i = 2; i <= shards; i++)); do
	"${suite[@]}" -e2e.shard "$i/$shards" >"$dir/$i" 2>&1 &
	others+=("$!")
done
status=0
"${suite[@]}" -e2e.shard "1/$shards" || status=$?
for i in "${!others[@]}"; do
	wait "${others[i]}" || status=$?
	printf '\n==== shard %d of the suite\n' $((i + 2))
	cat "$dir/$((i + 2))"
done
others=()
exit "$status"
