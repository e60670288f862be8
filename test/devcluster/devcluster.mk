# Rules for the development cluster; the Makefile includes this file.

NODES ?= 1

DEVCLUSTER_SOURCES := $(shell find test/devcluster -name '*.go' -not -path 'test/devcluster/build/*' -not -name '*_test.go') test/devcluster/go.mod test/devcluster/go.sum

bin/devcluster: $(DEVCLUSTER_SOURCES)
	go build -C test/devcluster -trimpath -o $(CURDIR)/bin/devcluster .

.PHONY: devcluster cluster-programs deps down test-devcluster

devcluster: bin/devcluster ## build the development cluster's program

# Tests have time limits, and those of devcluster itself no network to fetch sources from.
cluster-programs: deps bin/devcluster ## build what clusters are made of, where it is missing
	bin/devcluster build --gvisor >/dev/null

deps: ## install the Debian packages that the project needs, where they are missing
	hack/deps.sh

down: bin/devcluster ## end the development cluster
	bin/devcluster down

test-devcluster: cluster-programs ## unit tests of the development cluster, and that it leaves nothing behind
	go -C test/devcluster vet -tags devcluster ./...
	cd test/devcluster && go tool -modfile=$(CURDIR)/config/tools/go.mod staticcheck -tags devcluster ./...
	go -C test/devcluster test ./...
	go -C test/devcluster test -tags devcluster -count=1 -timeout 15m ./internal/cluster
