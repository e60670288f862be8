# Mutants: one feature taken out at a time, and the test named for it must fail.
#   make mutants RUN='digest'   only those whose name matches

.PHONY: mutants
RUN ?=
mutants: programs bin/checkpointctl bin/docker-registry bin/versitygw images images-e2e ## take features out one at a time and show that tests notice
	STASIS_KUBE_BIN=$$(dirname $$(bin/devcluster build)) go run ./test/mutants -run '$(RUN)'
