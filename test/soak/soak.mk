# The crash test. Included by the Makefile in the root.
#   make soak ROUNDS=200 SEED=7          checkpoints and restores under an adversary, on a cluster of its own
#   make soak ROUNDS=1 FIRST=12 SEED=7   round 12 of that alone

.PHONY: soak test-soak
ROUNDS ?= 50
SEED ?= $(shell date +%s)
FIRST ?= 1

soak: programs images images-e2e ## checkpoint and restore while components are killed; ROUNDS=50 SEED=…
	go run ./test/soak -rounds=$(ROUNDS) -seed=$(SEED) -first=$(FIRST)

test-soak: programs images images-e2e ## a short soak, of a fixed seed
	go run ./test/soak -rounds=3 -seed=1

# Memory that is captured while processes run on, by helpers that are killed.
#   make soak-cow ROUNDS=500 SEED=7
.PHONY: soak-cow
soak-cow: ## capture processes copy-on-write while they and the helpers are killed; ROUNDS=50 SEED=…
	COW_ROUNDS=$(ROUNDS) COW_SEED=$(SEED) go test -count=1 -timeout 0 -v -run 'Rounds|Killed' ./internal/engine/criu/cow
