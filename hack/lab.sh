#!/usr/bin/env bash
# Runs a program in a Kubernetes cluster that is made for it and goes with it: two nodes in namespaces of this
# machine, with the driver's image and those of the end-to-end suite. KUBECONFIG is set, and kubectl, helm
# and ctr are in the PATH. Takes root.
#
# usage: hack/lab.sh PROGRAM [ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ $# -eq 0 ]]; then
	echo "usage: hack/lab.sh PROGRAM [ARGUMENT...]" >&2
	exit 2
fi
if [[ $(id -u) -ne 0 ]]; then
	echo "lab: run as root: a cluster takes namespaces, mounts and cgroups" >&2
	exit 1
fi

hack/install-deps.sh e2e
kube=$(hack/kube.sh)
node=$(hack/node.sh)
images=$(hack/e2e-images.sh)
mkdir -p bin
go build -C test/e2e -o "$PWD/bin/lab" ./lab
exec bin/lab -kube "$kube" -node "$node" -images "$images" -- "$@"
