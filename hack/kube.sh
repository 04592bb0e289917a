#!/usr/bin/env bash
# Builds Kubernetes and etcd from test/kube as one program, under the names etcd, kube-apiserver,
# kube-controller-manager, kube-scheduler, kube-proxy, kubelet and kubectl, and prints the directory
# that they are in. The tests in test/ that need a real API server or a real kubelet run it.
#
# The build takes some minutes and 3 GiB of memory. It is kept, 150 MB, in
# ${XDG_CACHE_HOME:-~/.cache}/csi-puzzlefs/kube under a hash of what it was made of, and made once;
# builds of other versions beside it may be removed at any time.
#
# usage: hack/kube.sh
set -euo pipefail
cd "$(dirname "$0")/../test/kube"
source ../../hack/cached.sh

programs=(etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl)

build() {
	local new=$1 version major minor package program
	version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
	# What the API server says its version is: objects in our chart depend on it.
	IFS=. read -r major minor _ <<<"${version#v}"
	local flags=(-s -w)
	for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
		flags+=(-X "$package.gitVersion=$version" -X "$package.gitMajor=$major" -X "$package.gitMinor=$minor" -X "$package.gitTreeState=clean")
	done
	CGO_ENABLED=0 nice -n 10 go build -trimpath -ldflags "${flags[*]}" -o "$new/kube" .
	for program in "${programs[@]}"; do
		ln -s kube "$new/$program"
	done
}

hash=$({ go version && cat ../../hack/kube.sh go.mod go.sum main.go; } | sha256sum)
cached kube "$hash" build
echo "$dir"
