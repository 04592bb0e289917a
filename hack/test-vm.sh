#!/usr/bin/env bash
# Runs the tests that need the kernel's fs-verity, in a virtual machine that has it: those of test/vm, with
# the real program, and those of packages that test as much of it as the file system lets them.
# hack/vm.sh fetches the machine. Without KVM, which is used where the processor shows it, it is emulated.
#
# A test that is skipped in the machine fails, and so does one for which there is no machine.
#
# usage: hack/test-vm.sh [flags of go test]
set -euo pipefail
cd "$(dirname "$0")/.."

machine=$(hack/vm.sh)
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
export CGO_ENABLED=0 # there are no libraries in the machine
go build -trimpath -o "$bin/csi-puzzlefs" ./cmd/csi-puzzlefs
go build -C test/vm -trimpath -ldflags '-s -w' -o "$bin/" ./run ./guest

in_vm="$bin/run -machine $machine -guest $bin/guest -add $PWD/testdata"
go test -count=1 -exec "$in_vm" "$@" -run 'TestEnableAndMeasure' ./pkg/verity
go test -count=1 -exec "$in_vm" "$@" ./pkg/seal
cd test/vm
VM_MACHINE=$machine VM_GUEST=$bin/guest go test -count=1 "$@" ./run
go test -count=1 -exec "$in_vm -add $bin/csi-puzzlefs:/bin/csi-puzzlefs" "$@" .
