package control

import (
	"context"
	"errors"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

func crd() *unstructured.Unstructured {
	object := &unstructured.Unstructured{}
	object.SetAPIVersion("apiextensions.k8s.io/v1")
	object.SetKind("CustomResourceDefinition")
	object.SetName("podcheckpoints.checkpoint.podstasis.dev")
	return object
}

// P33: what deletes the CRD deletes every checkpoint.
func TestTheCRDIsNotDeletedByMistake(t *testing.T) {
	must(t, once())
	remove := func() error { return shared.client.Delete(t.Context(), crd(), client.DryRunAll) }
	annotate := func(value string) {
		t.Helper()
		must(t, shared.client.Patch(t.Context(), crd(), client.RawPatch(types.MergePatchType,
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

// P33: a fresh start would pass for a restored one.
func TestAPodThatAsksToBeRestoredIsRefusedWhereStasisDoesNotRun(t *testing.T) {
	ns, _, _, _ := ready(t)
	create := func() error { return shared.client.Create(t.Context(), restoring(t, ns, "r", "c"), client.DryRunAll) }
	must(t, create())
	var away []client.Object
	t.Cleanup(func() {
		for _, webhooks := range away {
			webhooks.SetResourceVersion("")
			if err := shared.client.Create(context.Background(), webhooks); err != nil {
				t.Error(err)
			}
		}
		// The next test begins when all are in force.
		if err := eventually(context.Background(), shared.webhooksAnswer); err != nil {
			t.Error(err)
		}
	})
	for _, webhooks := range []client.Object{&admissionv1.MutatingWebhookConfiguration{}, &admissionv1.ValidatingWebhookConfiguration{}} {
		must(t, shared.client.Get(t.Context(), client.ObjectKey{Name: "stasis-admission"}, webhooks))
		must(t, shared.client.Delete(t.Context(), webhooks))
		away = append(away, webhooks)
	}
	// The API server hears of it a moment later.
	must(t, eventually(t.Context(), func() error {
		if err := create(); !apierrors.IsForbidden(err) {
			return errors.Join(errors.New("it is not refused"), err)
		}
		return nil
	}))
	refused(t, create(), apierrors.IsForbidden, "asks to be restored", "Stasis does not run in this cluster", "kubectl apply -k config/install")
	ordinary := restoring(t, ns, "o", "c")
	ordinary.Annotations = nil
	must(t, shared.client.Create(t.Context(), ordinary, client.DryRunAll))
}
