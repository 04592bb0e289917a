// Package vm holds the tests that need the kernel's fs-verity. They run the csi-puzzlefs program as root in a
// virtual machine whose temporary files are on an ext4 with fs-verity, and damage its disk.
// hack/test-vm.sh (make test-vm) fetches the machine and runs them in it; anywhere else they fail.
//
// Command run in this module starts the machine, command guest is its first process.
package vm
