# Measurements. Included by the Makefile in the root.
#   make bench                       lines "bench: NAME VALUE UNIT"
#   make bench ONLY='increment|speed'

.PHONY: bench bench-tools
ONLY ?=
bench: deps bench-tools dist/criu/VERSION ## measure stores: growth, speed next to zstd and cp, memory; ONLY=…
	@mkdir -p bin
	go build -o bin/bench ./test/bench
	bin/bench -only='$(ONLY)'

bench-tools: # what is measured against, and the programs that are dumped
	@command -v zstd python3 java >/dev/null && exit 0; missing=; \
	command -v zstd >/dev/null || missing="$$missing zstd"; \
	command -v python3 >/dev/null || missing="$$missing python3"; \
	command -v java >/dev/null || missing="$$missing openjdk-17-jre-headless"; \
	[ -z "$$missing" ] || DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends --no-upgrade $$missing
