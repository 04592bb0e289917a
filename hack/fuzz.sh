#!/usr/bin/env bash
# Runs every fuzz target of the module, one after another, for FUZZTIME each (default 1m). An
# input that fails is written to the package's testdata/fuzz, to be committed with its fix.
#
# Each input that reaches new code is made smaller by ten attempts only. By default that goes on
# for a minute each, which is all of FUZZTIME: FuzzReadTar found a tenth of what it finds so.
#
# usage: [FUZZTIME=1m] hack/fuzz.sh [PACKAGES]
set -euo pipefail
cd "$(dirname "$0")/.."

fuzztime=${FUZZTIME:-1m}
packages=("$@")
if [[ ${#packages[@]} -eq 0 ]]; then
	packages=(./...)
fi

# go test -list prints the names of a package's targets, then a line that begins with "ok" and
# names the package.
list=$(go test -list '^Fuzz' "${packages[@]}")
names=()
targets=0
while read -r first second _; do
	case $first in
	Fuzz*)
		names+=("$first")
		;;
	ok)
		for name in "${names[@]}"; do
			echo "== $second $name for $fuzztime"
			go test -run '^$' -fuzz "^$name\$" -fuzztime "$fuzztime" -fuzzminimizetime 10x "$second"
			targets=$((targets + 1))
		done
		names=()
		;;
	esac
done <<<"$list"

if [[ $targets -eq 0 ]]; then
	echo "fuzz: no fuzz target in ${packages[*]}" >&2
	exit 1
fi
echo "fuzz: $targets targets passed"
