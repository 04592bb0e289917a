#!/usr/bin/env bash
# Fetches what a virtual machine with fs-verity takes, from the package archive that apt-get is configured
# for, without installing anything, and prints the directory that it is in:
#
#   vmlinuz      Debian's cloud kernel of the series 6.12
#   modules/     those of its modules that test/vm needs
#   tools/       qemu-system-x86_64, mkfs.ext4 and their libraries, where this machine has them not
#   packages     which packages it came from, with versions and SHA-256
#
# The versions below are taken for as long as the archive has them, and checked against their SHA-256.
# Debian removes a version when it publishes a fixed one; then that one is taken, and it is said. What the
# archive sends apt-get checks against the signed index in either case.
#
# It is kept, 200 MB, in ${XDG_CACHE_HOME:-~/.cache}/csi-puzzlefs/vm, and fetched once, in half a minute.
# Needs Debian on amd64, and root or sudo only where apt-get has no current list of packages.
#
# usage: hack/vm.sh
set -euo pipefail
cd "$(dirname "$0")"
source ./cached.sh

kernel=linux-image-6.12.117+deb12-cloud-amd64
kernel_version=6.12.117-1~deb12u1
kernel_sha256=5195b288dec79e2981d6b84457f38b7ce7310a2d702930ec7d07209c7f78ce37
qemu=qemu-system-x86
qemu_version=1:7.2+dfsg-7+deb12u18+b3
qemu_sha256=faf17e2cc7323acbb36bbd6329b61080e7ead0ebb92d33155f41b17d8db6fe15

fail() {
	echo "vm: $*" >&2
	exit 1
}

apt() { apt-get -q -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 -o APT::Sandbox::User=root "$@"; }

# update gets the current list of packages.
update() {
	local as_root=() log
	if [[ $(id -u) -ne 0 ]]; then
		command -v sudo >/dev/null || fail "the list of packages is missing or old: run apt-get update as root"
		as_root=(sudo)
	fi
	log=$("${as_root[@]}" apt-get -q -o Acquire::Retries=3 update 2>&1) || fail "apt-get update: $log"
}

# has PACKAGE [VERSION] says whether apt-get can fetch it.
has() {
	[[ -n $(apt-cache madison "$1" | awk -F ' *[|] *' -v version="${2:-}" 'version == "" || $2 == version') ]]
}

# choose_kernel sets kernel to the package to fetch.
choose_kernel() {
	local series
	has "$kernel" "$kernel_version" && return
	for series in linux-image-6.12-cloud-amd64 linux-image-cloud-amd64; do
		has "$series" || continue
		echo "vm: the archive has no $kernel $kernel_version any more, taking what $series is now" >&2
		kernel=$(apt-cache depends "$series" | awk '$1 == "Depends:" { print $2; exit }')
		kernel_version=""
		return
	done
	return 1
}

# emulator prints PACKAGE=VERSION for each package of the emulator and of mkfs.ext4 that this machine has not.
emulator() {
	local want=()
	if ! command -v qemu-system-x86_64 >/dev/null; then
		if has "$qemu" "$qemu_version"; then
			want+=("$qemu=$qemu_version")
		else
			echo "vm: the archive has no $qemu $qemu_version any more, taking what it has" >&2
			want+=("$qemu")
		fi
	fi
	PATH=$PATH:/sbin:/usr/sbin command -v mkfs.ext4 >/dev/null || want+=(e2fsprogs)
	[[ ${#want[@]} -gt 0 ]] || return 0
	apt install -s --no-install-recommends "${want[@]}" | awk '$1 == "Inst" { print $2 "=" substr($0, index($0, "(") + 1) }' | cut -d ' ' -f 1
}

# check FILE SHA256 compares a package with what it is to be.
check() {
	echo "$2  $1" | sha256sum --quiet --check || fail "$1 is not what this script names; correct its version and SHA-256"
}

# fetch DIR downloads all packages into DIR.
fetch() {
	local list packages
	choose_kernel || return 1
	list=$(emulator) || return 1
	mapfile -t packages <<<"$list"
	(cd "$1" && apt download "$kernel${kernel_version:+=$kernel_version}" ${list:+"${packages[@]}"} >/dev/null)
}

build() {
	local new=$1 tool option module release
	for tool in apt-get apt-cache dpkg-deb; do
		command -v "$tool" >/dev/null || fail "there is no $tool here: the machine is made of Debian's packages"
	done
	[[ $(dpkg --print-architecture) == amd64 ]] || fail "the machine is an amd64, this is $(dpkg --print-architecture)"
	mkdir "$new/debs" "$new/kernel" "$new/modules" "$new/tools"
	if ! fetch "$new/debs"; then
		update
		fetch "$new/debs" || fail "the archive that apt-get knows has no kernel of the series 6.12, or no emulator (above); on Debian 12 the kernel is in bookworm-security"
	fi
	[[ -z $kernel_version ]] || check "$new/debs/${kernel}"_*.deb "$kernel_sha256"
	for package in "$new"/debs/"${qemu}"_*"${qemu_version#*:}"_*.deb; do
		[[ ! -e $package ]] || check "$package" "$qemu_sha256"
	done
	(cd "$new/debs" && sha256sum -- *.deb) >"$new/packages"

	dpkg-deb -x "$new/debs/${kernel}"_*.deb "$new/kernel"
	rm "$new/debs/${kernel}"_*.deb
	for option in FS_VERITY=y EXT4_FS=y FUSE_FS=y VIRTIO_PCI=y VIRTIO_CONSOLE=y MODULE_DECOMPRESS=y BLK_DEV_WRITE_MOUNTED=y; do
		grep -qx "CONFIG_$option" "$new"/kernel/boot/config-* || fail "$kernel has no CONFIG_$option"
	done
	mv "$new"/kernel/boot/vmlinuz-* "$new/vmlinuz"
	release=$(echo "$new"/kernel/lib/modules/* "$new"/kernel/usr/lib/modules/* | tr ' ' '\n' | grep -v '\*' | head -n 1)
	for module in virtio_blk overlay; do
		find "$release" -name "$module.ko*" -exec cp -t "$new/modules" {} +
	done
	for package in "$new"/debs/*.deb; do
		[[ ! -e $package ]] || dpkg-deb -x "$package" "$new/tools"
	done
	rm -rf "$new/debs" "$new/kernel" "$new"/tools/usr/share/{doc,man,locale}
}

hash=$(sha256sum vm.sh | cut -d ' ' -f 1)
cached vm "$hash" build
echo "$dir"
