#!/usr/bin/env bash
# Builds the programs that a Kubernetes node and its cluster consist of beside Kubernetes itself,
# which is hack/kube.sh's, and prints the directory that they are in:
#
#   containerd containerd-shim-runc-v2 ctr runc     what runs containers
#   cni/bridge cni/host-local cni/loopback cni/portmap
#                                                   what connects them
#   coredns                                         what resolves the names of services
#   registry                                        a registry in the cluster
#   helm                                            what installs our chart
#
# All are static, so that they also run in an image that holds nothing else. test/node/go.mod pins
# their versions, and their --version tells them. runc is linked with Debian's libseccomp:
# hack/install-deps.sh e2e installs it.
#
# The build takes some minutes. It is kept, 230 MB, in
# ${XDG_CACHE_HOME:-~/.cache}/csi-puzzlefs/node under a hash of what it was made of, and made once;
# builds of other versions beside it may be removed at any time.
#
# usage: hack/node.sh
set -euo pipefail
cd "$(dirname "$0")/../test/node"
source ../../hack/cached.sh

# version MODULE prints the version of MODULE that go.mod requires.
version() {
	go list -m -f '{{.Version}}' "$1"
}

# compile TAGS OUTPUT PACKAGE... builds the programs into the directory OUTPUT, with the caller's flags.
compile() {
	local tags=$1 output=$2
	shift 2
	nice -n 10 go build -trimpath -tags "$tags" -ldflags "${flags[*]}" -o "$output/" "$@"
}

build() {
	if [[ -z $seccomp ]]; then
		echo "node: no libseccomp to link runc with; run hack/install-deps.sh e2e" >&2
		return 1
	fi
	local new=$1 minor package
	local containerd=github.com/containerd/containerd/v2
	local runc=github.com/opencontainers/runc
	local cni=github.com/containernetworking/plugins
	local helm=helm.sh/helm/v3

	# The Kubernetes that helm takes for granted where it asks no cluster: client-go's, v0.37.1 being 1.37.
	IFS=. read -r _ minor _ <<<"$(version k8s.io/client-go)"
	local flags=(-s -w
		-X "$containerd/version.Version=$(version "$containerd")"
		-X "$cni/pkg/utils/buildversion.BuildVersion=$(version "$cni")"
		-X "github.com/distribution/distribution/v3/version.version=$(version github.com/distribution/distribution/v3)"
		-X "$helm/internal/version.version=$(version "$helm")"
		-X "$helm/internal/version.gitTreeState=clean")
	for package in chartutil lint/rules; do
		flags+=(-X "$helm/pkg/$package.k8sVersionMajor=1" -X "$helm/pkg/$package.k8sVersionMinor=$minor")
	done

	mkdir "$new/cni"
	export CGO_ENABLED=0
	# Snapshotters for which a node would need file systems and devices that no test has are left out.
	compile "urfave_cli_no_docs grpcnotrace no_btrfs no_devmapper no_zfs" "$new" \
		"$containerd/cmd/containerd" "$containerd/cmd/ctr" "$helm/cmd/helm" ./coredns ./registry
	# One of these runs for each pod: without gRPC, as containerd's own makefile builds it, it is smaller.
	compile "urfave_cli_no_docs no_grpc" "$new" "$containerd/cmd/containerd-shim-runc-v2"
	compile "" "$new/cni" "$cni/plugins/main/"{bridge,loopback} "$cni/plugins/ipam/host-local" "$cni/plugins/meta/portmap"
	# Its first steps in a new container are in C.
	export CGO_ENABLED=1
	flags+=(-extldflags -static)
	compile "urfave_cli_no_docs seccomp netgo osusergo" "$new" "$runc"
}

# What runc is linked with is a part of what it was made of.
seccomp=$(pkg-config --modversion libseccomp 2>/dev/null || true)
hash=$({ go version && echo "libseccomp $seccomp" && cat ../../hack/node.sh go.mod go.sum */*.go; } | sha256sum)
cached node "$hash" build
echo "$dir"
