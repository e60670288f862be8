# Upgrades. Included by the Makefile in the root.
#   make test-upgrade FROM=HEAD~50     from that revision of the repository to this tree

.PHONY: test-upgrade
FROM ?=

test-upgrade: programs images ## upgrade a cluster step by step from an earlier revision, with the main job at each; FROM=revision
	test/upgrade/upgrade.sh '$(FROM)'
