# Keeps what takes minutes to build; sourced by the scripts that build it.
# shellcheck shell=bash

# cached NAME HASH BUILD sets dir to a directory that `BUILD dir` has filled, once for each HASH of what
# that is made of: in ${XDG_CACHE_HOME:-~/.cache}/csi-puzzlefs/NAME. Another run that builds the same is
# waited for. What a build that fails has left is removed.
cached() {
	local name=$1 hash=$2 build=$3
	local cache=${XDG_CACHE_HOME:-$HOME/.cache}/csi-puzzlefs/$name
	dir=$cache/${hash:0:16}
	[[ ! -d $dir ]] || return 0
	mkdir -p "$cache"
	exec 9>"$cache/lock"
	flock 9
	[[ ! -d $dir ]] || return 0
	new=$(mktemp -d "$cache/new.XXXXXX")
	trap 'rm -rf "$new"' EXIT
	echo "$name: building in $dir (once; some minutes)" >&2
	"$build" "$new"
	chmod 755 "$new"
	mv -T "$new" "$dir"
}
