# Real applications. Included by the Makefile in the root.
#   make zoo                       every application, restored five times in a row, and a table
#   make zoo APPS=redis,nginx ROUNDS=1
#   make zoo ENGINE=gvisor UPDATE=docs/applications.md

.PHONY: zoo test-zoo
APPS ?=
ENGINE ?= criu

zoo: programs images dist/images/stasis-zoo.tar ## checkpoint and restore real applications; APPS=redis,nginx ROUNDS=5 ENGINE=gvisor
	go run ./test/zoo -engine='$(ENGINE)' -update='$(UPDATE)' -apps='$(APPS)' -rounds=$(if $(filter file default undefined,$(origin ROUNDS)),5,$(ROUNDS)) -o dist/zoo.md

test-zoo: programs images dist/images/stasis-zoo.tar ## the quick ones of them, once
	go run ./test/zoo -quick -rounds=1

dist/bin/zoo-programs: FORCE
	@mkdir -p $(@D)
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $@.new ./test/zoo/programs
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

dist/bin/zoo-simulation: test/zoo/simulation/simulation.c
	@mkdir -p $(@D)
	$(or $(CC),cc) -std=c11 -D_GNU_SOURCE -O2 -frounding-math -Wall -Wextra -Werror -static -pthread -s -o $@ $< -lm

dist/images/stasis-zoo.tar: test/zoo/Dockerfile dist/bin/images dist/bin/zoo-programs dist/bin/zoo-simulation
	dist/bin/images -f $< -t localhost/stasis-zoo:dev -o $@ .
