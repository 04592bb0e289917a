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

programs=(etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl)

hash=$({ go version && cat ../../hack/kube.sh go.mod go.sum main.go; } | sha256sum)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/csi-puzzlefs/kube
dir=$cache/${hash:0:16}

if [[ ! -d $dir ]]; then
	mkdir -p "$cache"
	exec 9>"$cache/lock"
	flock 9 # another run may be building it
fi
if [[ ! -d $dir ]]; then
	version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
	echo "kube: building Kubernetes $version in $dir (once; some minutes)" >&2
	# What the API server says its version is: objects in our chart depend on it.
	IFS=. read -r major minor _ <<<"${version#v}"
	flags=(-s -w)
	for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
		flags+=(-X "$package.gitVersion=$version" -X "$package.gitMajor=$major" -X "$package.gitMinor=$minor" -X "$package.gitTreeState=clean")
	done
	new=$(mktemp -d "$cache/new.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	CGO_ENABLED=0 nice -n 10 go build -trimpath -ldflags "${flags[*]}" -o "$new/kube" .
	for program in "${programs[@]}"; do
		ln -s kube "$new/$program"
	done
	chmod 755 "$new"
	mv -T "$new" "$dir"
fi
echo "$dir"
