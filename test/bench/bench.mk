# Measurements. Included by the Makefile in the root.
#   make bench                                            lines "bench: NAME VALUE UNIT"
#   make bench BENCH='increment|memory'                   these; a regular expression
#   make bench BENCH=freeze ROUNDS=5 SHAPES=64,1024,2x512
#   make bench BENCH=freeze UPDATE=docs/benchmarks.md     writes its tables and plots there

.PHONY: bench bench-tools
BENCH ?= $(ONLY)
SHAPES ?=
UPDATE ?=
bench: programs images dist/images/stasis-ballast.tar dist/images/stasis-zoo.tar images-e2e bin/docker-registry bin/versitygw bench-tools ## measure freezes, restores and stores next to others' ways, in up to an hour; BENCH=freeze|increment|…
	@mkdir -p bin
	go build -o bin/ ./test/bench ./test/zoo
	bin/devcluster build >/dev/null
	RUNC="$${RUNC:-$$(ls -t "$${STASIS_CACHE:-$$HOME/.cache/stasis}"/devcluster/runtime-*/runc | head -n1)}" \
	bin/bench -only='$(BENCH)' $(if $(filter file default undefined,$(origin ROUNDS)),,-rounds='$(ROUNDS)') -shapes='$(SHAPES)' -update='$(UPDATE)'

dist/bin/ballast: test/bench/ballast/ballast.c
	@mkdir -p $(@D)
	$(or $(CC),cc) -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -static -pthread -s -o $@ $<

dist/images/stasis-ballast.tar: test/bench/ballast/Dockerfile dist/bin/images dist/bin/ballast
	dist/bin/images -f $< -t localhost/stasis-ballast:$(IMAGE_TAG) -o $@ .

# What is measured against, and the programs that are dumped. Debian's podman brings two
# packages of the system's (login, passwd) to the version that it was built with.
bench-tools:
	@missing=; \
	command -v zstd >/dev/null || missing="$$missing zstd"; \
	command -v python3 >/dev/null || missing="$$missing python3"; \
	command -v java >/dev/null || missing="$$missing openjdk-17-jre-headless"; \
	command -v podman >/dev/null || missing="$$missing podman conmon crun"; \
	[ -z "$$missing" ] || DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends --no-upgrade --no-remove $$missing
