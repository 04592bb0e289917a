#!/usr/bin/env bash
# Installs the Debian packages that building, testing and the demo need beyond Go, make, bash and
# ca-certificates:
#
#   attr                   setfattr, which a test gives files extended attributes with
#   bash-completion        what most shells have, for the test of ours
#   capnproto              the schema compiler (make generate) and a second reader of our images
#   fuse3                  fusermount3, with which a user who is not root mounts
#   gcc, libc6-dev         the race detector
#   mandoc                 reads the manual pages as their checker
#   libssl-dev, pkg-config building the reference implementation, only where there is a cargo
#
# and with the argument e2e also those of a Kubernetes that runs on this machine:
#
#   libseccomp-dev, pkg-config building runc
#   mount, util-linux      mount, which kubelet calls, and nsenter, with which tests enter nodes
#   nftables               nft, with which kube-proxy and the CNI plugins program the kernel
#
# and with the argument bench also what the benchmarks measure beside us:
#
#   casync, erofs-utils, squashfs-tools, squashfuse
#
# Says nothing and changes nothing when everything is there. Otherwise it runs apt-get, through
# sudo when it is not root, and says what it installs.
#
# usage: hack/install-deps.sh [e2e|bench]
set -euo pipefail

if [[ $# -gt 1 || ! ${1:-e2e} =~ ^(e2e|bench)$ ]]; then
	echo "usage: hack/install-deps.sh [e2e|bench]" >&2
	exit 2
fi

missing=()

# need PACKAGE COMMAND... notes PACKAGE when COMMAND fails.
need() {
	local package=$1
	shift
	"$@" >/dev/null 2>&1 || missing+=("$package")
}

need attr command -v setfattr
need bash-completion test -e /usr/share/bash-completion/bash_completion
need capnproto command -v capnp
need fuse3 command -v fusermount3
need gcc command -v gcc
need libc6-dev test -e /usr/include/stdlib.h
need mandoc command -v mandoc
if command -v cargo >/dev/null || [[ -x $HOME/.cargo/bin/cargo ]]; then
	need pkg-config command -v pkg-config
	need libssl-dev test -e /usr/include/openssl/ssl.h
fi
if [[ ${1:-} == e2e ]]; then
	need libseccomp-dev test -e /usr/include/seccomp.h
	need mount command -v mount
	need nftables command -v nft
	need pkg-config command -v pkg-config
	need util-linux command -v nsenter
fi
if [[ ${1:-} == bench ]]; then
	need casync command -v casync
	need erofs-utils command -v mkfs.erofs
	need squashfs-tools command -v mksquashfs
	need squashfuse command -v squashfuse_ll
fi

if [[ ${#missing[@]} -eq 0 ]]; then
	exit 0
fi

if ! command -v apt-get >/dev/null; then
	echo "install-deps: these are missing and there is no apt-get to install them; Debian's names are: ${missing[*]}" >&2
	exit 1
fi
as_root=()
if [[ $(id -u) -ne 0 ]]; then
	if ! command -v sudo >/dev/null; then
		echo "install-deps: missing: ${missing[*]}; as root run: apt-get install ${missing[*]}" >&2
		exit 1
	fi
	as_root=(sudo)
fi

echo "install-deps: installing ${missing[*]} with apt-get" >&2
apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
	cat "$log" >&2
	echo "install-deps: apt-get could not install ${missing[*]}; its output is above" >&2
	exit 1
fi
