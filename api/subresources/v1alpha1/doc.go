// Package v1alpha1 holds what the aggregated API subresources.checkpoint.podstasis.dev/v1alpha1
// speaks (KEP-5901): a checkpoint asked for by a call, and what a checkpoint holds.
// Nothing of it is stored.
//
// +kubebuilder:object:generate=true
// +k8s:openapi-model-package=dev.podstasis.checkpoint.subresources.v1alpha1
// +groupName=subresources.checkpoint.podstasis.dev
package v1alpha1
