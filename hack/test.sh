#!/usr/bin/env bash
# Runs everything that can be tested without a cluster: installs what that needs, builds or finds
# the reference implementation, Kubernetes' API server and etcd, then tests all modules. Most tests
# of mounts and devices take root and are skipped, with a message, without it.
#
# REQUIRE_REFERENCE=1 makes a missing reference implementation a failure, REQUIRE_CONTAINERD=1 a
# missing containerd.
#
# usage: hack/test.sh [flags of go test]
set -euo pipefail
cd "$(dirname "$0")/.."

hack/install-deps.sh
reference=$(hack/reference.sh)
if [[ -n $reference ]]; then
	export PUZZLEFS_REFERENCE=$reference
fi

containerd=$(hack/containerd.sh)
if [[ -n $containerd ]]; then
	export CONTAINERD=$containerd
fi

race=(-race)
if ! command -v gcc >/dev/null || [[ $(go env CGO_ENABLED) != 1 ]]; then
	echo "test: no C compiler for the race detector: running without" >&2
	race=()
fi

go test -timeout 20m "${race[@]}" "$@" ./pkg/... ./internal/...
# The tests of the commands start the program some hundred times, for which the race detector takes a second
# each; what runs side by side in it is in the packages.
go test -timeout 20m "$@" ./cmd/... ./bench/...
cd test
go test -timeout 20m "$@" ./...
# With modules of their own, for what they bring along. test/deploy would build Kubernetes itself,
# within its time.
../hack/kube.sh >/dev/null
for module in signature deploy; do
	(cd "$module" && go test -timeout 20m "$@" ./...)
done
# Of the end-to-end suite what runs without a cluster: the programs in its images, and whether the recorded
# quick start is what the documentation says.
(cd e2e && go test -timeout 20m "$@" ./checker ./pause ./internal/... ./record/...)
# The rest of test/kube is Kubernetes, which has tests of its own.
(cd kube && go test "$@" ./upstream/cases)
# Compiles the program for two platforms: minutes, the first time.
cd ../hack/image
go test -timeout 30m "$@" ./...
