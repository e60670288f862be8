package control

import (
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// P33: what deletes the CRD deletes every checkpoint.
func TestTheCRDIsNotDeletedByMistake(t *testing.T) {
	must(t, once())
	crd := &unstructured.Unstructured{}
	crd.SetAPIVersion("apiextensions.k8s.io/v1")
	crd.SetKind("CustomResourceDefinition")
	crd.SetName("podcheckpoints.checkpoint.podstasis.dev")
	remove := func() error { return shared.client.Delete(t.Context(), crd.DeepCopy(), client.DryRunAll) }
	annotate := func(value string) {
		t.Helper()
		must(t, shared.client.Patch(t.Context(), crd.DeepCopy(), client.RawPatch(types.MergePatchType,
			[]byte(`{"metadata":{"annotations":{"checkpoint.podstasis.dev/delete":`+value+`}}}`))))
	}
	defer annotate("null")

	refused(t, remove(), apierrors.IsForbidden, "deletes every PodCheckpoint of the cluster and its data",
		"kubectl annotate crd podcheckpoints.checkpoint.podstasis.dev checkpoint.podstasis.dev/delete=true")
	annotate(`"false"`)
	refused(t, remove(), apierrors.IsForbidden, "deletes every PodCheckpoint")
	annotate(`"true"`)
	must(t, remove())
}
