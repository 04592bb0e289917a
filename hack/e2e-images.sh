#!/usr/bin/env bash
# Makes the container images of the end-to-end suite, for this machine's architecture, without a
# container engine, and prints the directory that they are in: dist/e2e. It holds archives for
# "ctr -n k8s.io images import", "kind load image-archive" and "docker load":
#
#   driver.tar       registry.example.com/csi-puzzlefs:VERSION, the driver as the chart names it
#   driver-next.tar  the driver as another build of the next version, such as 0.1.1-next
#   tools.tar        busybox:1.37 and e2e.csi-puzzlefs.io/tools:1: a shell and /bin/checker
#   pause.tar        e2e.csi-puzzlefs.io/pause:1, what containerd starts pods with
#   registry.tar     e2e.csi-puzzlefs.io/registry:1, a registry on port 5000; any user may run it
#                    where /var/lib/registry is writable, and REGISTRY_* variables configure it
#
# An archive is made again when what it is made of has changed; all of them take about a minute the
# first time, and some more where hack/node.sh has not built the registry yet.
#
# The shell is Debian's busybox-static, unpacked and not installed, and kept in
# ${XDG_CACHE_HOME:-~/.cache}/csi-puzzlefs/busybox; BUSYBOX names a static busybox to use instead.
# E2E_TOOLS_NAMES adds names to the tools' image, by commas: other suites ask for a shell by names of
# their own.
#
# usage: hack/e2e-images.sh
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD
dir=$root/dist/e2e
programs=$dir/programs # what is built for the archives
mkdir -p "$programs"
exec 9>"$dir/.lock"
flock 9 # another run may be making them
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# busybox prints the path of a static busybox.
busybox() {
	if [[ -n ${BUSYBOX:-} ]]; then
		if ! "$BUSYBOX" true; then
			echo "e2e-images: BUSYBOX is $BUSYBOX, which does not run" >&2
			return 1
		fi
		echo "$BUSYBOX"
		return
	fi
	local cache=${XDG_CACHE_HOME:-$HOME/.cache}/csi-puzzlefs/busybox
	if ! "$cache/busybox" true 2>/dev/null; then
		if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
			echo "e2e-images: no apt-get to get busybox-static with; BUSYBOX can name a static busybox" >&2
			return 1
		fi
		echo "e2e-images: unpacking Debian's busybox-static in $cache (once)" >&2
		mkdir -p "$cache" "$work/deb"
		local apt=(apt-get -q -o Acquire::Retries=3)
		# The list of packages may be missing, or old.
		if ! (cd "$work/deb" && { "${apt[@]}" download busybox-static || { "${apt[@]}" update && "${apt[@]}" download busybox-static; }; }) >"$work/log" 2>&1; then
			cat "$work/log" >&2
			echo "e2e-images: apt-get could not download the package busybox-static; its output is above" >&2
			return 1
		fi
		dpkg-deb -x "$work"/deb/busybox-static_*.deb "$work/deb/root"
		# In /bin or /usr/bin, depending on the release.
		find "$work/deb/root" -path '*/bin/busybox' -type f -exec mv {} "$cache/busybox.new" \;
		mv "$cache/busybox.new" "$cache/busybox" # two checkouts may do this at a time
		if ! "$cache/busybox" true; then
			echo "e2e-images: the busybox in $cache does not run" >&2
			return 1
		fi
	fi
	echo "$cache/busybox"
}

# made NAME HASH says whether an archive is there, and made of what has this hash.
made() {
	[[ -f $dir/$1.tar && $(cat "$dir/.$1" 2>/dev/null) == "$2" ]]
}

# archive NAME HASH FLAG... makes an archive, unless it is there.
archive() {
	local name=$1 hash
	hash=$({ echo "$@" && sha256sum "$programs/image"; } | sha256sum)
	shift 2
	made "$name" "$hash" && return
	echo "e2e-images: making $name.tar" >&2
	SOURCE_DATE_EPOCH=0 "$programs/image" -o "$dir/$name.tar" "$@" >&2
	echo "$hash" >"$dir/.$name"
}

# archive_tree NAME FLAG... makes the archive of the tree that lies in $work/NAME, unless it is there.
archive_tree() {
	local name=$1 hash
	shift
	hash=$(tar -C "$work/$name" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - . | sha256sum)
	(cd "$work" && archive "$name" "$hash" -tree "$name" "$@")
}

# users DIR writes the users that the images know, and a place for temporary files.
users() {
	mkdir -p "$1/etc" "$1/tmp"
	chmod 1777 "$1/tmp"
	cat >"$1/etc/passwd" <<-'END'
		root:x:0:0:root:/:/bin/sh
		nobody:x:65534:65534:nobody:/:/bin/sh
		nonroot:x:65532:65532:nonroot:/:/bin/sh
	END
	cat >"$1/etc/group" <<-'END'
		root:x:0:
		nobody:x:65534:
		nonroot:x:65532:
	END
}

tools() {
	local shell applet tree=$work/tools
	mkdir -p "$tree/bin" "$tree/usr"
	shell=$(busybox)
	install -m 755 "$shell" "$tree/bin/busybox"
	for applet in $("$shell" --list); do
		[[ $applet == busybox ]] || ln -s busybox "$tree/bin/$applet"
	done
	ln -s bin "$tree/sbin"
	ln -s ../bin "$tree/usr/bin"
	ln -s ../bin "$tree/usr/sbin"
	install -m 755 "$programs/checker" "$tree/bin/checker"
	users "$tree"
	archive_tree tools -name "busybox:1.37,e2e.csi-puzzlefs.io/tools:1${E2E_TOOLS_NAMES:+,$E2E_TOOLS_NAMES}" -cmd sh
}

pause() {
	mkdir "$work/pause"
	install -m 755 "$programs/pause" "$work/pause/pause"
	archive_tree pause -name e2e.csi-puzzlefs.io/pause:1 -entrypoint /pause -user 65534:65534
}

registry() {
	local node tree=$work/registry
	node=$(hack/node.sh)
	mkdir -p "$tree/etc/distribution" "$tree/var/lib/registry"
	chmod 777 "$tree/var/lib/registry" # for whatever user it runs as
	install -m 755 "$node/registry" "$tree/registry"
	cat >"$tree/etc/distribution/config.yml" <<-'END'
		version: 0.1
		storage:
		  filesystem:
		    rootdirectory: /var/lib/registry
		  delete:
		    enabled: true
		http:
		  addr: :5000
		  draintimeout: 5s
	END
	users "$tree"
	# It would send traces to a collector that is not there.
	archive_tree registry -name e2e.csi-puzzlefs.io/registry:1 -entrypoint /registry -cmd serve,/etc/distribution/config.yml \
		-user 65532:65532 -env OTEL_TRACES_EXPORTER=none
}

# driver NAME VERSION
driver() {
	local hash
	hash=$({
		go version
		find cmd internal pkg go.mod go.sum LICENSE -type f ! -name '*_test.go' -print0 | sort -z | xargs -0 sha256sum
	} | sha256sum)
	archive "$1" "$hash" -source . -platform "linux/$(go env GOARCH)" -version "$2" -revision "sources-${hash:0:12}"
	rm -f "$dir"/csi-puzzlefs-sbom-*.json # not what is tested here
}

build() {
	CGO_ENABLED=0 go build -C "$1" -trimpath -buildvcs=false -ldflags '-s -w' -o "$programs/" "${@:2}"
}

umask 022
build hack/image .
build test/e2e ./checker ./pause

version=$(<cmd/csi-puzzlefs/VERSION)
IFS=.-+ read -r major minor patch _ <<<"$version"
pause
tools
registry
driver driver "$version"
driver driver-next "$major.$minor.$((patch + 1))-next"
echo "$dir"
