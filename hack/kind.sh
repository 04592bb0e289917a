#!/usr/bin/env bash
# Makes a kind cluster with two workers that have the driver's image and those of the end-to-end suite, or
# removes it. It takes a container engine, and a registry from which to pull kind's own image.
#
# The cluster is called csi-puzzlefs (KIND_CLUSTER names another). Its kubeconfig goes to dist/kind.kubeconfig and
# nowhere else: yours is left alone.
#
# usage: hack/kind.sh up|down
set -euo pipefail
cd "$(dirname "$0")/.."

# The release that the suite is written for; it decides which Kubernetes the nodes run.
kind=(go run sigs.k8s.io/kind@v0.33.0)
name=${KIND_CLUSTER:-csi-puzzlefs}
kubeconfig=$PWD/dist/kind.kubeconfig

if ! docker info >/dev/null 2>&1 && ! podman info >/dev/null 2>&1; then
	echo "kind: neither docker nor podman answers: start one, or run the suite without any by make e2e" >&2
	exit 1
fi

case ${1:-} in
up)
	images=$(hack/e2e-images.sh)
	mkdir -p dist
	if ! "${kind[@]}" get clusters 2>/dev/null | grep -qx "$name"; then
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
*)
	echo "usage: hack/kind.sh up|down" >&2
	exit 2
	;;
esac
