// Package v1alpha1 holds the API types of group checkpoint.podstasis.dev. Their
// shape is that of checkpoint.k8s.io/v1alpha1 in KEP-5823, so that a manifest
// moves upstream by changing its group; what Stasis adds is marked as such.
//
// +kubebuilder:object:generate=true
// +k8s:openapi-model-package=dev.podstasis.checkpoint.v1alpha1
// +groupName=checkpoint.podstasis.dev
package v1alpha1
