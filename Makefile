# Two commands do everything on a fresh Debian 12 machine with Go, as root:
#   make demo    the main job on a real Kubernetes
#   make test    all tests
# "make help" lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help
export GOFLAGS := -buildvcs=false

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

include test/devcluster/devcluster.mk
include hack/images/images.mk
include demo/demo.mk
include config/config.mk
-include test/mutants/mutants.mk
include test/soak/soak.mk
include test/zoo/zoo.mk
include test/checkpointctl/checkpointctl.mk
include test/store/store.mk
include test/bench/bench.mk
include test/matrix/matrix.mk
include test/upgrade/upgrade.mk
-include internal/contents/contents.mk

.PHONY: help programs up install-stasis test lint test-unit test-control test-cri test-podman conformance test-install test-e2e gvisor test-gvisor

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

programs: deps bin/devcluster bin/kubectl-checkpoint bin/kubectl-restore ## build what a user calls
	ln -sf kubectl-checkpoint bin/kubectl_complete-checkpoint # what kubectl calls to complete
	ln -sf kubectl-restore bin/kubectl_complete-restore

bin/kubectl-checkpoint bin/kubectl-restore: bin/%: FORCE
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $@ ./cmd/$*

up: programs images ## bring up the development cluster with Stasis on it; NODES=2 for two nodes
	bin/devcluster up --nodes $(NODES)
	hack/install.sh
	@echo; echo "export KUBECONFIG=$(CURDIR)/.devcluster/kubeconfig PATH=$(CURDIR)/bin:\$$PATH"

test: deps lint test-unit test-images test-devcluster test-store test-control test-cri test-install test-e2e test-gvisor test-soak test-zoo ## all tests

lint: ## formatting, vet, static analysis
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not formatted:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	go tool -modfile=config/tools/go.mod staticcheck ./...

test-unit: ## tests that need nothing but this checkout
	go test $$(go list ./... | grep -v '/test/') ./test/document ./test/e2e/portable ./test/formats ./test/gotest ./test/matrix ./test/mutants ./test/zoo ./test/soak ./test/bench/...

test-control: cluster-programs ## the control plane against a real API server
	STASIS_KUBE_BIN=$$(dirname $$(bin/devcluster build)) go test -count=1 ./test/control

test-podman: cluster-programs image-files ## stasis-runtime as what conmon starts; needs Debian's podman
	go test -count=1 ./test/podman

test-install: cluster-programs programs images images-e2e ## installing, its parts' deaths, uninstalling, on a node of its own
	go test -count=1 -timeout 15m ./test/install

test-cri: cluster-programs bin/checkpointctl image-files ## the CRI layer on a node without Kubernetes
	go test -count=1 -timeout 15m ./test/cri

conformance: ## CheckpointPod and RestorePod of any container runtime; ENDPOINT=/run/containerd/containerd.sock (docs/conformance.md)
	go test -count=1 -v ./test/cri/conformance -args -endpoint '$(ENDPOINT)' $(CONFORMANCE)

test-e2e: cluster-programs programs images images-e2e bin/docker-registry bin/versitygw ## everything, on a cluster of two nodes
	go test -count=1 -timeout 30m ./test/e2e

gvisor: cluster-programs programs images images-e2e bin/docker-registry bin/versitygw ## all end-to-end tests that are not CRIU's alone, with Pods of gVisor; UPDATE=docs/compatibility.md
	go run ./test/e2e/portable -update='$(UPDATE)'

test-gvisor: cluster-programs programs images images-e2e ## the quick ones of them
	go run ./test/e2e/portable -quick
