#!/usr/bin/env bash
# Gets containerd, into which the tests of the image import it, and prints the directory with its
# programs. It is Debian's package, unpacked and not installed, and kept in
# ${XDG_CACHE_HOME:-~/.cache}/csi-puzzlefs/containerd.
#
# CONTAINERD names a directory with containerd and ctr to use instead. Where there is no apt-get,
# nothing is printed to stdout, a message says that the test will be skipped, and the exit code is 0;
# with REQUIRE_CONTAINERD=1 it is 1.
#
# usage: hack/containerd.sh
set -euo pipefail

if [[ -n ${CONTAINERD:-} ]]; then
	if [[ ! -x $CONTAINERD/containerd || ! -x $CONTAINERD/ctr ]]; then
		echo "containerd: CONTAINERD is $CONTAINERD, which does not hold containerd and ctr" >&2
		exit 1
	fi
	echo "$CONTAINERD"
	exit 0
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/csi-puzzlefs/containerd
programs=$cache/root/usr/bin

# is_there says whether the programs are there and run.
is_there() {
	"$programs/containerd" --version >/dev/null 2>&1 && "$programs/ctr" --version >/dev/null 2>&1
}

if is_there; then
	echo "$programs"
	exit 0
fi

if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
	if [[ ${REQUIRE_CONTAINERD:-} == 1 ]]; then
		echo "containerd: REQUIRE_CONTAINERD is 1 but there is no apt-get to get it with" >&2
		exit 1
	fi
	echo "containerd: no apt-get, so no containerd: the test that imports the image will be skipped" >&2
	exit 0
fi

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # another run may be getting it
if ! is_there; then
	echo "containerd: unpacking Debian's package in $cache (once)" >&2
	rm -rf "$cache/root" "$cache/deb"
	mkdir "$cache/deb"
	if ! (cd "$cache/deb" && apt-get -q -o Acquire::Retries=3 download containerd 2>&1) >"$cache/log"; then
		cat "$cache/log" >&2
		echo "containerd: apt-get could not download the package containerd; its output is above" >&2
		exit 1
	fi
	dpkg-deb -x "$cache"/deb/containerd_*.deb "$cache/root"
	rm -rf "$cache/deb"
	if ! is_there; then
		echo "containerd: the programs in $programs do not run" >&2
		exit 1
	fi
fi
echo "$programs"
