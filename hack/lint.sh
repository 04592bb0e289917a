#!/usr/bin/env bash
# Checks the modules: formatting (gofumpt), golangci-lint with .golangci.yml, which holds the map
# of who may import whom, and known vulnerabilities (govulncheck). The tools are the versions that
# tools.mod pins, built on first use, which takes two minutes on two cores.
#
# govulncheck needs its database from the network (GOVULNDB names another). Where that cannot be
# reached the check is said to be unrun; what it finds is fatal.
#
# usage: hack/lint.sh [--fix]      --fix formats the code instead of complaining
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD
modules=(. test test/signature hack/image)
# Never shipped and never given foreign input: no check for vulnerabilities. For test/kube and test/node
# the linters would compile all of Kubernetes and of CoreDNS; only a package without these is linted.
test_modules=(test/deploy test/e2e test/vm)
unlinted=(test/kube test/node)

# tool NAME builds a tool of tools.mod when necessary and prints its path.
tool() {
	go tool -n -modfile="$root/tools.mod" "$1"
}

golangci_lint=$(tool golangci-lint)
govulncheck=$(tool govulncheck)

if [[ ${1:-} == --fix ]]; then
	"$(tool gofumpt)" -w .
fi

failed=0
for module in "${modules[@]}" "${test_modules[@]}"; do
	echo "== golangci-lint in $module"
	(cd "$module" && "$golangci_lint" run --config "$root/.golangci.yml" ./...) || failed=1
done
echo "== golangci-lint in cmd/csi-puzzlefs, as the writer of manual pages"
"$golangci_lint" run --config "$root/.golangci.yml" --build-tags man ./cmd/csi-puzzlefs || failed=1
echo "== golangci-lint in test/kube/upstream/cases"
(cd test/kube && "$golangci_lint" run --config "$root/.golangci.yml" ./upstream/cases) || failed=1

badly_formatted=$("$(tool gofumpt)" -l "${unlinted[@]}")
if [[ -n $badly_formatted ]]; then
	echo "lint: gofumpt would change: $badly_formatted" >&2
	failed=1
fi

for module in "${modules[@]}"; do
	echo "== govulncheck in $module"
	status=0
	output=$(cd "$module" && timeout 600 "$govulncheck" ./... 2>&1) || status=$?
	if [[ $status -eq 0 ]]; then
		continue
	fi
	if [[ $output == *"fetching vulnerabilities"* || $status -eq 124 ]]; then
		echo "lint: govulncheck was NOT run, its database could not be reached: ${output##*$'\n'}" >&2
		continue
	fi
	echo "$output" >&2
	failed=1
done
exit "$failed"
