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

.PHONY: help programs up install-stasis test lint test-unit test-control test-cri test-e2e

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

programs: deps bin/devcluster bin/kubectl-checkpoint bin/kubectl-restore ## build what a user calls

bin/kubectl-checkpoint bin/kubectl-restore: bin/%: FORCE
	CGO_ENABLED=0 go build -trimpath -o $@ ./cmd/$*

up: programs images ## bring up the development cluster with Stasis on it; NODES=2 for two nodes
	bin/devcluster up --nodes $(NODES)
	hack/install.sh

test: deps lint test-unit test-images test-control test-devcluster test-cri test-e2e ## all tests

lint: ## formatting, vet, import rules
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not formatted:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	go tool -modfile=config/tools/go.mod staticcheck ./...

test-unit: ## tests that need nothing but this checkout
	go test $$(go list ./... | grep -v /test/)
