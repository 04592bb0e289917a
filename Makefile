# csi-puzzlefs. "make" lists what there is; README.md says what it is for.

GO       ?= go
FUZZTIME ?= 1m
LOADTIME ?= 5m

BINARY = bin/csi-puzzlefs

.DEFAULT_GOAL := help

.PHONY: help
help: ## List these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/csi-puzzlefs, one static program
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BINARY) ./cmd/csi-puzzlefs

.PHONY: image
image: ## Build dist/csi-puzzlefs-image.tar for amd64 and arm64, without a container engine
	$(GO) run -C hack/image . -source $(CURDIR) -o $(CURDIR)/dist/csi-puzzlefs-image.tar $(IMAGEFLAGS)

.PHONY: demo
demo: build ## From a directory to a verified volume, in front of your eyes (root)
	@hack/install-deps.sh
	@cd test && CSI_PUZZLEFS=$(CURDIR)/$(BINARY) $(GO) run ./demo

.PHONY: test
test: ## Install what the tests need, and run them all
	hack/test.sh

.PHONY: test-vm
test-vm: ## Test the kernel's fs-verity in a virtual machine that is made for it
	hack/test-vm.sh

.PHONY: load
load: ## Publish, read and unpublish 200 volumes for LOADTIME (5m), look for leaks, print p99 (root)
	@hack/install-deps.sh
	cd test && $(GO) test -count=1 -v -timeout 2h ./load -load.duration $(LOADTIME)

# A KUBECONFIG that is only in the environment is somebody's everyday cluster, where the suite has no business:
# it must be given on the command line. E2EFLAGS are for the shell: make leaves a dollar in them alone.
.PHONY: e2e
e2e: ## The end-to-end suite on a cluster that it starts (root), or on any other: make e2e KUBECONFIG=FILE
	KUBECONFIG=$(if $(filter command,$(origin KUBECONFIG)),'$(KUBECONFIG)') hack/e2e.sh $(value E2EFLAGS)

.PHONY: e2e-shell
e2e-shell: ## A shell in a cluster made for it, with kubectl, helm and the suite's images (root)
	hack/lab.sh bash

.PHONY: kind-up
kind-up: ## A kind cluster with the images of the driver and of the suite (a container engine)
	hack/kind.sh up

.PHONY: kind-down
kind-down: ## Remove it
	hack/kind.sh down

.PHONY: e2e-kind
e2e-kind: kind-up ## The same suite on that cluster
	KUBECONFIG=$(CURDIR)/dist/kind.kubeconfig E2E_MACHINES=kind hack/e2e.sh $(value E2EFLAGS)

.PHONY: lint
lint: ## Formatting, golangci-lint, the map of imports, known vulnerabilities
	hack/lint.sh

.PHONY: generate
generate: ## Regenerate the wire format's code, the manifests and the table of values
	hack/install-deps.sh
	hack/generate.sh

.PHONY: man
man: ## Write the manual pages of all commands to dist/man
	hack/install-deps.sh
	hack/man.sh

.PHONY: docs
docs: ## Record the quick start of the README on a cluster of its own (root)
	hack/docs.sh

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME (1m) each
	FUZZTIME=$(FUZZTIME) hack/fuzz.sh

.PHONY: bench
bench: build ## Measure beside the reference, squashfs, EROFS and casync (root, an hour)
	hack/install-deps.sh bench
	@reference=$$(hack/reference.sh) && CSI_PUZZLEFS=$(CURDIR)/$(BINARY) PUZZLEFS_REFERENCE=$$reference $(GO) run ./bench $(BENCHFLAGS)

.PHONY: clean
clean: ## Remove what the above built in this directory
	rm -rf bin dist
