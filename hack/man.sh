#!/usr/bin/env bash
# Writes the manual pages of all commands to dist/man, from the commands themselves, and has mandoc
# check them where that is installed. Their date is that of SOURCE_DATE_EPOCH, in seconds since
# 1970, or of the commit; with the same date the same source gives the same bytes.
#
# They are not committed: nothing but Go is needed to make them, and every change of a flag would
# be in two places.
#
# usage: hack/man.sh
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z ${SOURCE_DATE_EPOCH:-} ]] && ! SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null); then
	echo "man: this is no git checkout: set SOURCE_DATE_EPOCH" >&2
	exit 1
fi
export SOURCE_DATE_EPOCH

rm -rf dist/man
go run -tags man ./cmd/csi-puzzlefs dist/man
if command -v mandoc >/dev/null; then
	mandoc -T lint -W warning dist/man/*.1
fi
echo "man: $(find dist/man -name '*.1' | wc -l) pages in dist/man; to read one: man -l dist/man/csi-puzzlefs-build.1" >&2
