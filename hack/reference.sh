#!/usr/bin/env bash
# Builds the reference implementation of PuzzleFS (the Rust crate puzzlefs), which the interop
# tests run and the benchmarks measure against, and prints the path of its program.
#
# The build takes some minutes and is kept in ${XDG_CACHE_HOME:-~/.cache}/csi-puzzlefs/reference,
# where the tests find it (internal/reftest). PUZZLEFS_REFERENCE names a program to use instead.
# Where there is no cargo, nothing is printed to stdout, a message says that the interop tests
# will be skipped, and the exit code is 0; with REQUIRE_REFERENCE=1 it is 1.
#
# usage: hack/reference.sh
set -euo pipefail

version=0.2.0 # internal/reftest has it too

if [[ -n ${PUZZLEFS_REFERENCE:-} ]]; then
	if [[ ! -x $PUZZLEFS_REFERENCE ]]; then
		echo "reference: PUZZLEFS_REFERENCE is $PUZZLEFS_REFERENCE, which is not a program" >&2
		exit 1
	fi
	echo "$PUZZLEFS_REFERENCE"
	exit 0
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/csi-puzzlefs/reference
program=$cache/bin/puzzlefs

# is_current says whether the program is there, runs, and is of the right version.
is_current() {
	[[ -x $program && $("$program" --version 2>/dev/null) == "puzzlefs $version" ]]
}

if is_current; then
	echo "$program"
	exit 0
fi

if [[ -x $HOME/.cargo/bin/cargo ]]; then
	PATH=$PATH:$HOME/.cargo/bin
fi
if ! command -v cargo >/dev/null; then
	if [[ ${REQUIRE_REFERENCE:-} == 1 ]]; then
		echo "reference: REQUIRE_REFERENCE is 1 but there is no cargo to build puzzlefs $version with" >&2
		exit 1
	fi
	echo "reference: no cargo, so no puzzlefs $version: the tests against it will be skipped" >&2
	exit 0
fi

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # another run may be building it
if ! is_current; then
	echo "reference: building puzzlefs $version with cargo in $cache (once; some minutes)" >&2
	# The crate uses features of the language that the stable compiler hides.
	if ! RUSTC_BOOTSTRAP=1 cargo install puzzlefs --version "$version" --locked --force --quiet --root "$cache" >&2; then
		echo "reference: cargo could not build puzzlefs $version; its output is above" >&2
		exit 1
	fi
fi
echo "$program"
