# Versions that people run. Included by the Makefile in the root.
#   make matrix ROWS='containerd v1.7' UPDATE=docs/compatibility.md
# The row of Podman needs Debian's podman, that of systemd its qemu-system-x86 and debootstrap.

.PHONY: matrix
ROWS ?=
matrix: programs images images-e2e bin/docker-registry bin/versitygw ## the main job and five tests on each set of versions that people run; an hour, and as much again to build them all the first time
	go run ./test/matrix -rows='$(ROWS)' -update='$(UPDATE)'
