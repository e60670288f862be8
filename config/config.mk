# What is generated from the API types: deepcopy functions, the CRD, docs/api.md.
# The generators' versions are pinned in config/tools/go.mod, a module of its own
# that keeps them out of the product's go.mod.

CONFIG_TOOL := go tool -modfile=config/tools/go.mod

.PHONY: generate
generate: ## regenerate code, CRD and API reference from the types
	$(CONFIG_TOOL) controller-gen object paths=./api/...
	$(CONFIG_TOOL) controller-gen crd paths=./api/... output:crd:dir=config/crd
	go run -C config/tools ./apidoc -package ../../api/v1alpha1 -out ../../docs/api.md

.PHONY: verify-generate
verify-generate: generate ## fail if what is generated differs from what is committed
	@git diff --exit-code -- api config/crd docs/api.md || \
		{ echo "generated files are out of date: commit what 'make generate' changed" >&2; exit 1; }
