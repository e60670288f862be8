# What is generated from the API types: deepcopy functions, the CRD, OpenAPI
# definitions of the aggregated API, docs/api.md.
# The generators' versions are pinned in config/tools/go.mod, a module of its own
# that keeps them out of the product's go.mod.

CONFIG_TOOL := go tool -modfile=config/tools/go.mod

OPENAPI_DIR := internal/apiserver/openapi
OPENAPI_TYPES := podstasis.dev/stasis/api/v1alpha1 podstasis.dev/stasis/api/subresources/v1alpha1 \
	k8s.io/apimachinery/pkg/apis/meta/v1 k8s.io/apimachinery/pkg/runtime k8s.io/apimachinery/pkg/version

.PHONY: generate
generate: ## regenerate code, CRD and API reference from the types
	$(CONFIG_TOOL) controller-gen object paths=./api/...
	$(CONFIG_TOOL) controller-gen crd paths=./api/v1alpha1 output:crd:dir=config/crd
	$(CONFIG_TOOL) openapi-gen --output-dir $(OPENAPI_DIR) --output-pkg podstasis.dev/stasis/$(OPENAPI_DIR) \
		--output-file zz_generated.openapi.go --output-model-name-file zz_generated.model_name.go \
		--readonly-pkg k8s.io/apimachinery/pkg/apis/meta/v1 --readonly-pkg k8s.io/apimachinery/pkg/runtime --readonly-pkg k8s.io/apimachinery/pkg/version \
		--go-header-file /dev/null --report-filename /dev/null $(OPENAPI_TYPES)
	go run -C config/tools ./apidoc -out ../../docs/api.md ../../api/v1alpha1 ../../api/subresources/v1alpha1

.PHONY: verify-generate
verify-generate: generate ## fail if what is generated differs from what is committed
	@git diff --exit-code -- api config/crd $(OPENAPI_DIR) docs/api.md || \
		{ echo "generated files are out of date: commit what 'make generate' changed" >&2; exit 1; }
