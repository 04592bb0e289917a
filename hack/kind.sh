#!/usr/bin/env bash
# Makes a kind cluster with two workers that have the driver's image and those of the end-to-end suite, or
# removes it. It takes a container engine, and a registry from which to pull kind's own image.
#
# The cluster is called csi-puzzlefs (KIND_CLUSTER names another). Its kubeconfig goes to dist/kind.kubeconfig and
# nowhere else: yours is left alone. The engine is docker or podman, whichever answers first;
# KIND_EXPERIMENTAL_PROVIDER names one.
#
# usage: hack/kind.sh up|down
set -euo pipefail
cd "$(dirname "$0")/.."

# The release that the suite is written for; it decides which Kubernetes the nodes run.
kind=(go run sigs.k8s.io/kind@v0.33.0)
name=${KIND_CLUSTER:-csi-puzzlefs}
kubeconfig=$PWD/dist/kind.kubeconfig

if [[ $# -ne 1 || ! $1 =~ ^(up|down)$ ]]; then
	echo "usage: hack/kind.sh up|down" >&2
	exit 2
fi

# kind itself would take docker where there is the program, whether anything answers it or not.
engine=""
for candidate in ${KIND_EXPERIMENTAL_PROVIDER:-docker podman}; do
	if "$candidate" info >/dev/null 2>&1; then
		engine=$candidate
		break
	fi
done
if [[ -z $engine ]]; then
	echo "kind: no container engine answers (tried: ${KIND_EXPERIMENTAL_PROVIDER:-docker podman}): start one, or run the suite without any by make e2e" >&2
	exit 1
fi
export KIND_EXPERIMENTAL_PROVIDER=$engine

case $1 in
up)
	images=$(hack/e2e-images.sh)
	mkdir -p dist
	if ! "${kind[@]}" get clusters 2>/dev/null | grep -qxF -- "$name"; then
		"${kind[@]}" create cluster --name "$name" --kubeconfig "$kubeconfig" --wait 5m --config - <<-'YAML'
			kind: Cluster
			apiVersion: kind.x-k8s.io/v1alpha4
			nodes:
			  - role: control-plane
			  - role: worker
			  - role: worker
		YAML
	fi
	"${kind[@]}" export kubeconfig --name "$name" --kubeconfig "$kubeconfig"
	for image in "$images"/*.tar; do
		"${kind[@]}" load image-archive "$image" --name "$name"
	done
	echo "kind: export KUBECONFIG=$kubeconfig" >&2
	;;
down)
	"${kind[@]}" delete cluster --name "$name" --kubeconfig "$kubeconfig"
	rm -f "$kubeconfig"
	;;
esac
