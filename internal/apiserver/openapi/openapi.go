// Package openapi holds what OpenAPI says of the types of the aggregated API.
package openapi

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/validation/spec"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// Definitions are those that are generated, and three kinds that this API serves
// nothing of but subresources: what they look like, others say.
func Definitions(ref common.ReferenceCallback) map[string]common.OpenAPIDefinition {
	all := GetOpenAPIDefinitions(ref)
	for _, name := range []string{corev1.Pod{}.OpenAPIModelName(), checkpointv1alpha1.PodCheckpoint{}.OpenAPIModelName(), checkpointv1alpha1.CheckpointStore{}.OpenAPIModelName()} {
		all[name] = common.OpenAPIDefinition{Schema: spec.Schema{SchemaProps: spec.SchemaProps{Type: []string{"object"}}}}
	}
	return all
}
