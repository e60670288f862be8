package admission

import (
	"context"
	"fmt"
	"net/http"
	"slices"

	"gomodules.xyz/jsonpatch/v2"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// admitToStore refuses a PodCheckpoint that its CheckpointStore has no place for, before
// any Pod stands still for it, and else adds to the response the finalizer by which it
// stays until it was removed from there. A store that is away is no reason to refuse: the
// checkpoint is Ready when it is back.
func (r *router) admitToStore(ctx context.Context, namespace string, checkpoint *checkpointv1alpha1.PodCheckpoint, response admission.Response) admission.Response {
	var store *checkpointv1alpha1.CheckpointStore
	var found checkpointv1alpha1.CheckpointStore
	switch err := r.reader.Get(ctx, client.ObjectKey{Name: checkpoint.Spec.StoreName}, &found); {
	case err == nil:
		store = &found
	case !apierrors.IsNotFound(err):
		return admission.Errored(http.StatusInternalServerError, fmt.Errorf("read CheckpointStore %s: %w", checkpoint.Spec.StoreName, err))
	}
	if no := noPlace(store, checkpoint.Spec.StoreName, namespace); no != "" {
		return deny(apierrors.NewForbidden(checkpointv1alpha1.GroupVersion.WithResource("podcheckpoints").GroupResource(), checkpoint.Name, fmt.Errorf("%s", no)))
	}
	if ready := meta.FindStatusCondition(store.Status.Conditions, checkpointv1alpha1.CheckpointStoreReady); ready == nil {
		response = response.WithWarnings(fmt.Sprintf("CheckpointStore %q was not reached yet: the checkpoint is Ready once it is stored there", store.Name))
	} else if ready.Status != "True" {
		response = response.WithWarnings(fmt.Sprintf("CheckpointStore %q cannot be used now (%s): the checkpoint is Ready once it is stored there", store.Name, ready.Reason))
	}
	switch {
	case slices.Contains(checkpoint.Finalizers, checkpointv1alpha1.FinalizerStore):
	case len(checkpoint.Finalizers) == 0:
		response.Patches = append(response.Patches, jsonpatch.NewOperation("add", "/metadata/finalizers", []string{checkpointv1alpha1.FinalizerStore}))
	default:
		response.Patches = append(response.Patches, jsonpatch.NewOperation("add", "/metadata/finalizers/-", checkpointv1alpha1.FinalizerStore))
	}
	return response
}

// noPlace says why a store takes no checkpoint of a namespace now; empty if it takes one.
// What it is filled by is what the controller last counted.
func noPlace(store *checkpointv1alpha1.CheckpointStore, name, namespace string) string {
	if store == nil {
		return fmt.Sprintf("CheckpointStore %q does not exist: `kubectl get checkpointstores` lists those that do; without spec.storeName the checkpoint stays on its node", name)
	}
	if store.DeletionTimestamp != nil {
		return fmt.Sprintf("CheckpointStore %q is being deleted: name another, or none", name)
	}
	if len(store.Spec.Namespaces) > 0 && !slices.Contains(store.Spec.Namespaces, namespace) {
		return fmt.Sprintf("CheckpointStore %q is not for namespace %q: its administrator adds that to spec.namespaces", name, namespace)
	}
	if most := store.Spec.Capacity; most != nil && store.Status.StoredBytes >= most.Value() {
		return fmt.Sprintf("CheckpointStore %q is full: it holds %s, and its capacity is %s; delete checkpoints that are kept there (their space is free after a collection), or have spec.capacity raised",
			name, resource.NewQuantity(store.Status.StoredBytes, resource.BinarySI), most)
	}
	if most := store.Spec.NamespaceCapacity; most != nil {
		for _, of := range store.Status.Namespaces {
			if of.Name == namespace && of.StoredBytes >= most.Value() {
				return fmt.Sprintf("the %d checkpoints of namespace %q take %s in CheckpointStore %q, and spec.namespaceCapacity is %s; delete some of them, or have it raised",
					of.Checkpoints, namespace, resource.NewQuantity(of.StoredBytes, resource.BinarySI), name, most)
			}
		}
	}
	return ""
}
